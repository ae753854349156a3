"""Autoregressive families adapted to masked denoising: what `easyedit-mdm adapt` writes.

The checkpoint is the base's own, names and all. Its `config.json` says what is different: `architectures` is
`["<native class>ForMaskedDiffusion"]`, `mask_token_id` the mask, and `masked_diffusion` holds

    attention     "full", or "block" for block-causal
    block_size    tokens of a block; null where attention is full
    edges         "canvas" or "start": where blocks begin (`models.attention.Attention`)
    context       "causal" or "blocks": whether what stands before the canvas stays causal
    logit_shift   whether token j is predicted at j - 1, as the base did
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.families._registry import FAMILIES
from easyedit_mdm.models.spec import Config, FamilySpec

SECTION = "masked_diffusion"


def register_adapted(base: FamilySpec) -> None:
    """Register the masked relative of an autoregressive family."""
    name = f"masked-{base.name}"
    FAMILIES.register(name)(
        replace(
            base, name=name, paradigm="masked", architectures=(f"{base.native}ForMaskedDiffusion",),
            attention=_attention, shift=_shift,
            native_model_types=(), releases="what `easyedit-mdm adapt` writes",
            verified="transformers' own class under the mask of who sees whom, spelled out in a test",
        )
    )  # fmt: skip


def _section(config: Config) -> Mapping[str, Any]:
    section = config.get(SECTION)
    if not isinstance(section, Mapping):
        raise CheckpointError(
            f"config.json of an adapted model needs a section {SECTION!r}; found {section!r}"
        )
    return section


def _attention(config: Config) -> Attention:
    """Full or block-causal, with or without a causal context."""
    section = _section(config)
    kind, block = section.get("attention"), section.get("block_size")
    if kind not in ("full", "block") or (kind == "full") != (block is None):
        raise CheckpointError(
            f"config.json says {SECTION}.attention={kind!r} with block_size={block!r}: it must be 'full' with"
            " null, or 'block' with a number"
        )
    return Attention(block, str(section.get("edges", "canvas")), str(section.get("context", "blocks")))


def _shift(config: Config) -> bool:
    shift = _section(config).get("logit_shift")
    if not isinstance(shift, bool):
        raise CheckpointError(f"config.json says {SECTION}.logit_shift={shift!r}: it must be true or false")
    return shift
