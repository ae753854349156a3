"""Qwen2 and Qwen2.5: the autoregressive relative of Dream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.families._adapted import register_adapted
from easyedit_mdm.models.families._registry import FAMILIES, LLAMA_KEYS, pick
from easyedit_mdm.models.spec import FamilySpec


def native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen2's own configuration.

    Raises:
        CheckpointError: if the checkpoint uses a sliding window, which the adapters' masks do not model.
    """
    if config.get("use_sliding_window"):
        raise CheckpointError(
            "Qwen2 with use_sliding_window=true is not supported: its attention is not full"
        )
    return {**pick(config, LLAMA_KEYS), "use_sliding_window": False}


QWEN2 = FamilySpec(
    name="qwen2",
    paradigm="causal",
    architectures=("Qwen2ForCausalLM",),
    probe="model.layers.0.self_attn.q_proj.bias",
    native="Qwen2",
    native_config=native_config,
    shift=True,
    tokenizer="Qwen2TokenizerFast",
    releases="Qwen2, Qwen2.5",
    verified="EasyEdit's own ROME: same update",
    native_model_types=("qwen2",),
)
FAMILIES.register("qwen2")(QWEN2)
register_adapted(QWEN2)
