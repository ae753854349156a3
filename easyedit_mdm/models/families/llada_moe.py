"""LLaDA-MoE: Qwen3's attention, seeing both sides, and a mixture of experts in every layer. Its `model_type`
is dense LLaDA's.
"""

from __future__ import annotations

from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.families._registry import FAMILIES, LLAMA_KEYS, pick
from easyedit_mdm.models.mixture import Experts
from easyedit_mdm.models.spec import Config, FamilySpec

_MUST_BE = {
    "qk_layernorm": True, "clip_qkv": None, "partial_rotary_factor": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False, "router_num_group": None, "shared_expert_intermediate_size": None,
}  # fmt: skip


def native_config(config: Config) -> dict[str, Any]:
    """Qwen3's configuration.

    Raises:
        CheckpointError: for a variant whose arithmetic is another.
    """
    for key, wanted in _MUST_BE.items():
        if config.get(key, wanted) != wanted:
            raise CheckpointError(
                f"LLaDA-MoE with {key}={config[key]!r} is not supported (only {wanted!r} is)"
            )
    sizes = {
        "intermediate_size": config.get("dense_intermediate_size") or config["expert_intermediate_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
    }
    return {**pick(config, LLAMA_KEYS), **sizes, "use_sliding_window": False}


def experts(config: Config) -> Experts:
    """Softmax over all experts; the weights of the chosen are not normalised, whatever `norm_topk_prob`
    says.
    """
    frequency = config.get("moe_layer_freq") or [1] * config["num_hidden_layers"]
    layers = frozenset(layer for layer, on in enumerate(frequency) if on)
    return Experts(
        layers, config["num_experts"], config["num_experts_per_tok"], config["expert_intermediate_size"]
    )


FAMILIES.register("llada-moe")(
    FamilySpec(
        name="llada-moe",
        paradigm="masked",
        architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
        probe="model.layers.0.self_attn.q_norm.weight",
        native="Qwen3",
        native_config=native_config,
        experts=experts,
        mask_id=156895,
        since="4.51",
        releases="LLaDA-MoE-7B-A1B",
        verified="published code on a tiny checkpoint: logits to 1e-4, LLaDA's generate.py token for token",
    )
)
