"""Qwen3: the autoregressive relative of SDAR, TraDo and dLLM's A2D models. Needs transformers 4.51."""

from __future__ import annotations

from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.families._adapted import register_adapted
from easyedit_mdm.models.families._registry import FAMILIES, LLAMA_KEYS, pick
from easyedit_mdm.models.spec import Config, FamilySpec


def native_config(config: Config) -> dict[str, Any]:
    """Qwen3's own configuration.

    Raises:
        CheckpointError: if the checkpoint uses a sliding window, which the adapters' masks do not model.
    """
    if config.get("use_sliding_window"):
        raise CheckpointError(
            "Qwen3 with use_sliding_window=true is not supported: its attention is not full"
        )
    return {**pick(config, LLAMA_KEYS), "use_sliding_window": False}


QWEN3 = FamilySpec(
    name="qwen3",
    paradigm="causal",
    architectures=("Qwen3ForCausalLM",),
    probe="model.layers.0.self_attn.q_norm.weight",
    native="Qwen3",
    native_config=native_config,
    shift=True,
    tokenizer="Qwen2TokenizerFast",
    since="4.51",
    releases="Qwen3 (dense)",
    verified="transformers' own class: the same logits as its masked relative in blocks of one token",
    native_model_types=("qwen3",),
)
FAMILIES.register("qwen3")(QWEN3)
register_adapted(QWEN3)
