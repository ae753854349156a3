"""LLaDA2: blocks, fused and partly rotated attention with QK norms, and mixtures with a shared expert behind
a dense first layer.

Qwen3 computes it once the fused rows are taken apart and each head's dimensions stand where Qwen3 looks for
pairs: it turns dimension i with i + size / 2, where LLaDA2 turns i with i + r / 2 for the first r; the others
have frequency 0.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.families._registry import FAMILIES, LLAMA_KEYS, pick
from easyedit_mdm.models.mixture import Experts
from easyedit_mdm.models.spec import Config, FamilySpec, Made

_BLOCK = 32  # of its `generate`; its config.json does not say
_MUST_BE = {
    "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "use_rmsnorm": True,
    "score_function": "sigmoid", "norm_head": False,
    "hidden_act": "silu", "rope_scaling": None, "moe_router_enable_expert_bias": True,
}  # fmt: skip
_HUB, _NATIVE = "model.layers.{}.attention.", "model.layers.{}.self_attn."


def native_config(config: Config) -> dict[str, Any]:
    """Qwen3's configuration.

    Raises:
        CheckpointError: for a variant whose arithmetic is another.
    """
    for key, wanted in _MUST_BE.items():
        if config.get(key, wanted) != wanted:
            raise CheckpointError(f"LLaDA2 with {key}={config[key]!r} is not supported (only {wanted!r} is)")
    return {**pick(config, LLAMA_KEYS), "head_dim": _size(config), "use_sliding_window": False}


def attention(config: Config) -> Attention:
    """Blocks of `block_size` (32 where the configuration is silent), counted from the row's start."""
    return Attention(config.get("block_size", _BLOCK))


def experts(config: Config) -> Experts:
    """Sigmoid scores, an offset that only chooses, groups; the first layers are dense."""
    count, inner = config["num_experts"], config["moe_intermediate_size"]
    return Experts(
        layers=frozenset(range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"])),
        count=count, top=config["num_experts_per_tok"], inner=inner,
        shared=inner * (config.get("num_shared_experts") or 0),
        score="sigmoid", normalise=bool(config.get("norm_topk_prob", True)),
        scale=config.get("routed_scaling_factor", 1.0), bias=True,
        groups=config.get("n_group") or 1, top_groups=config.get("topk_group") or 1,
    )  # fmt: skip


def _size(config: Config) -> int:
    """Dimensions of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _turned(config: Config) -> int:
    """Dimensions of a head that turn."""
    return int(_size(config) * config.get("partial_rotary_factor", 1.0))


def frequencies(config: Config) -> Float[Tensor, " half"]:
    """Those of the dimensions that turn, and 0."""
    turned = _turned(config)
    steps = torch.arange(0, turned, 2, dtype=torch.int64).float() / turned
    values = torch.zeros(_size(config) // 2)
    values[: turned // 2] = 1.0 / config["rope_theta"] ** steps
    return values


def _order(config: Config) -> Int[Tensor, " size"]:
    """Which of LLaDA2's dimensions of a head stands at each place of Qwen3's."""
    half, turned = _size(config) // 2, _turned(config) // 2
    rest = list(range(2 * turned, 2 * half))
    return torch.tensor(
        [*range(turned), *rest[: half - turned], *range(turned, 2 * turned), *rest[half - turned :]]
    )


def made_of(config: Config, name: str) -> Made | None:
    """Queries, keys and values are rows of one tensor, and their heads' dimensions are reordered; so are the
    QK norms'.
    """
    match = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.([qkv])_(proj|norm)\.weight", name)
    if not match:
        return None
    layer, which, kind = match.groups()
    order, size = _order(config), _size(config)
    if kind == "norm":
        norm = {"q": "query", "k": "key"}[which]
        return f"model.layers.{layer}.attention.{norm}_layernorm.weight", lambda tensor: tensor[order]
    rows = [size * config["num_attention_heads"], *[size * config["num_key_value_heads"]] * 2]
    start, count = sum(rows["qkv".index(which) :][1:]), rows["qkv".index(which)]

    def part(tensor: Float[Tensor, "rows width"]) -> Float[Tensor, "some width"]:
        """The rows of one of the three."""
        end = len(tensor) - start
        own = tensor[end - count : end]
        return own if which == "v" else own.unflatten(0, (-1, size))[:, order].flatten(0, 1)

    return f"model.layers.{layer}.attention.query_key_value.weight", part


FAMILIES.register("llada2")(
    FamilySpec(
        name="llada2",
        paradigm="masked",
        architectures=("LLaDA2MoeModelLM",),
        probe="model.layers.0.attention.dense.weight",
        native="Qwen3",
        native_config=native_config,
        rename=((_HUB + "dense.", _NATIVE + "o_proj."), ("model.word_embeddings.", "model.embed_tokens.")),
        attention=attention,
        experts=experts,
        made_of=made_of,
        frequencies=frequencies,
        mask_id=156895,
        since="4.51",
        releases="LLaDA2.0 and 2.1, mini and flash",
        verified=(
            "published code on a tiny checkpoint: logits to 1e-4, the router's choices; 2.0's generate token"
            " for token"
        ),
    )
)
