"""GPT-2: the model that ROME was first shown on, and the one on which EasyEdit's own ROME runs everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_mdm.models.families._registry import FAMILIES, pick
from easyedit_mdm.models.spec import FamilySpec, ModulePaths

_KEYS = (
    "vocab_size n_positions n_embd n_layer n_head n_inner activation_function resid_pdrop embd_pdrop"
    " attn_pdrop layer_norm_epsilon bos_token_id eos_token_id tie_word_embeddings"
).split()


def native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2's own configuration, unknown entries left out."""
    return pick(config, _KEYS)


FAMILIES.register("gpt2")(
    FamilySpec(
        name="gpt2",
        paradigm="causal",
        architectures=("GPT2LMHeadModel",),
        probe="transformer.h.0.mlp.c_proj.weight",
        native="GPT2",
        native_config=native_config,
        rename=(
            ("wte.", "transformer.wte."),
            ("wpe.", "transformer.wpe."),
            ("h.{}.", "transformer.h.{}."),
            ("ln_f.", "transformer.ln_f."),
        ),
        paths=ModulePaths(
            backbone="transformer",
            block="transformer.h.{}",
            mlp="transformer.h.{}.mlp",
            down="transformer.h.{}.mlp.c_proj",
            attention="transformer.h.{}.attn",
            embedding="transformer.wte",
            norm=("transformer.ln_f",),
        ),
        shift=True,
        tokenizer="GPT2TokenizerFast",
        releases="GPT-2",
        verified="EasyEdit's own ROME: same update",
        absolute_positions=True,
        native_model_types=("gpt2",),
    )
)
