"""Stable-DiffCoder (Seed-Coder adapted): a Llama that sees blocks, its `model_type` Llama's own."""

from __future__ import annotations

from dataclasses import replace

from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.families._registry import FAMILIES
from easyedit_mdm.models.families.llama import LLAMA
from easyedit_mdm.models.spec import Config

_BLOCK = 4  # of its own `generate`; its config.json does not say


def attention(config: Config) -> Attention:
    """Blocks counted from the row's start."""
    return Attention(config.get("block_size", _BLOCK))


FAMILIES.register("stable-diffcoder")(
    replace(
        LLAMA,
        name="stable-diffcoder",
        paradigm="masked",
        architectures=("StableDiffcoderForCausalLM",),
        shift=False,
        attention=attention,
        mask_id=5,
        native_model_types=(),
        releases="Stable-DiffCoder-8B",
        verified="modelling and sampling code read only: no checkpoint of it was at hand",
    )
)
