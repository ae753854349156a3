"""LLaMA and what shares its arithmetic and names (SmolLM2, TinyLlama, ...): the autoregressive relative of
LLaDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_mdm.models.families._adapted import register_adapted
from easyedit_mdm.models.families._registry import FAMILIES, LLAMA_KEYS, pick
from easyedit_mdm.models.spec import FamilySpec


def native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama's own configuration, unknown entries left out."""
    return pick(config, LLAMA_KEYS)


LLAMA = FamilySpec(
    name="llama",
    paradigm="causal",
    architectures=("LlamaForCausalLM",),
    probe="model.layers.0.mlp.gate_proj.weight",
    native="Llama",
    native_config=native_config,
    shift=True,
    tokenizer="LlamaTokenizerFast",
    releases="LLaMA, SmolLM2, TinyLlama",
    verified="EasyEdit's own ROME: same update",
    native_model_types=("llama",),
)
FAMILIES.register("llama")(LLAMA)
register_adapted(LLAMA)
