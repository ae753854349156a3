"""Qwen3's mixtures of experts: Qwen3-MoE itself, RND1, which sees both sides, and SDAR's, which sees
blocks.
"""

from __future__ import annotations

from dataclasses import replace

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.attention import FULL
from easyedit_mdm.models.families._registry import FAMILIES
from easyedit_mdm.models.families.qwen3 import QWEN3
from easyedit_mdm.models.families.sdar import attention
from easyedit_mdm.models.mixture import Experts
from easyedit_mdm.models.spec import Config, FamilySpec


def experts(config: Config) -> Experts:
    """Softmax over all experts; the weights of the chosen sum to 1 where `norm_topk_prob` says so.

    Raises:
        CheckpointError: if no layer is a mixture.
    """
    dense, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step", 1)
    layers = frozenset(
        n for n in range(config["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0
    )
    if not layers:
        raise CheckpointError(
            f"no layer is a mixture of experts with decoder_sparse_step={step!r},"
            f" mlp_only_layers={sorted(dense)}"
        )
    count, top, inner = (
        config[key] for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    )
    return Experts(layers, count, top, inner, normalise=bool(config.get("norm_topk_prob", False)))


QWEN3_MOE: FamilySpec = replace(
    QWEN3,
    name="qwen3-moe",
    architectures=("Qwen3MoeForCausalLM",),
    experts=experts,
    native_model_types=(),
    releases="Qwen3-30B-A3B",
    verified="transformers' own Qwen3MoeForCausalLM: logits to 1e-4",
)
_MASKED = replace(QWEN3_MOE, paradigm="masked", attention=FULL, mask_id=151669)

FAMILIES.register("qwen3-moe")(QWEN3_MOE)
FAMILIES.register("rnd1")(
    replace(
        _MASKED,
        name="rnd1",
        architectures=("RND1LM",),
        releases="RND1-Base",
        verified=(
            "published code on a tiny checkpoint, its table of sizes replaced by config.json's: logits to"
            " 1e-4, greedy diffusion_sample token for token"
        ),
    )
)
FAMILIES.register("sdar-moe")(
    replace(
        _MASKED,
        name="sdar-moe",
        architectures=("SDARMoeForCausalLM",),
        attention=attention,
        shift=False,
        releases="SDAR-30B-A3B",
        verified=(
            "nothing run: taken to be Qwen3-MoE's arithmetic under SDAR's attention, whose parts are verified"
        ),
    )
)
