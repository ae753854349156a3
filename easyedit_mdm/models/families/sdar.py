"""SDAR (arXiv 2510.06303) and TraDo: Qwen3s that see blocks, each block itself and all before it."""

from __future__ import annotations

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.families._registry import FAMILIES
from easyedit_mdm.models.families.qwen3 import native_config
from easyedit_mdm.models.spec import Config, FamilySpec


def attention(config: Config) -> Attention:
    """Blocks of `block_size`, counted from the row's start.

    Raises:
        CheckpointError: if the configuration does not say how large a block is.
    """
    if config.get("block_size") is None:
        raise CheckpointError("config.json of an SDAR model lacks block_size: give block")
    return Attention(config["block_size"])


FAMILIES.register("sdar")(
    FamilySpec(
        name="sdar",
        paradigm="masked",
        architectures=("SDARForCausalLM",),
        probe="model.layers.0.self_attn.q_norm.weight",
        native="Qwen3",
        native_config=native_config,
        attention=attention,
        mask_id=151669,
        tokenizer="Qwen2TokenizerFast",
        since="4.51",
        releases="SDAR-1.7B, 4B, 8B (Chat); TraDo-4B, 8B",
        verified=(
            "published code on a tiny checkpoint: logits to 1e-4, block_diffusion_generate (static, dynamic,"
            " sequential) token for token; TraDo read only (said to be SDAR's class)"
        ),
    )
)
