"""What distinguishes one family of language models from another, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModulePaths:
    """Dotted paths of the modules that editing needs, `{}` standing for the layer's number."""

    backbone: str = "model"
    block: str = "model.layers.{}"
    mlp: str = "model.layers.{}.mlp"
    down: str = "model.layers.{}.mlp.down_proj"
    attention: str = "model.layers.{}.self_attn"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class FamilySpec:
    """One family.

    Attributes:
        name: the family's name.
        paradigm: `causal` (each token sees its left) or `masked` (each token sees all).
        architectures: values of `config.json`'s `architectures[0]` that belong to it.
        probe: a key that a checkpoint of this family contains; tells apart families that share an architecture name.
        native: name of the transformers class that computes it.
        native_config: function from the raw `config.json` to the keyword arguments of the native config class.
        rename: (beginning of the hub's parameter name, beginning of the native one) pairs, `{}` standing for the layer's
            number; read in both directions.
        paths: where the native class keeps its modules.
        shift: the raw logits at position j predict token j + 1 (causal models, Dream).
        mask_id: the mask token's id where neither user, config nor tokenizer names one.
        tokenizer: name of a transformers tokenizer class to fall back on where the folder names one that is not native.
        absolute_positions: the backbone adds learned positions to its input (GPT-2), so a stack that starts higher up must not.
    """

    name: str
    paradigm: str
    architectures: tuple[str, ...]
    probe: str
    native: str
    native_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    rename: tuple[tuple[str, str], ...] = ()
    paths: ModulePaths = ModulePaths()
    shift: bool = False
    mask_id: int | None = None
    tokenizer: str = "PreTrainedTokenizerFast"
    absolute_positions: bool = False
    native_model_types: tuple[str, ...] = ()

    def native_name(self, key: str) -> str:
        """The native name of a parameter that the checkpoint calls `key`."""
        return _substitute(key, self.rename)

    def hub_name(self, name: str) -> str:
        """The checkpoint's name of a native parameter."""
        return _substitute(name, [(native, hub) for hub, native in self.rename])

    @property
    def masked(self) -> bool:
        """Whether this is a masked diffusion family."""
        return self.paradigm == "masked"


def _substitute(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for before, after in pairs:
        match = re.match(re.escape(before).replace(r"\{\}", r"(\d+)"), key)
        if match:
            return after.replace("{}", match.group(1) if match.groups() else "") + key[match.end() :]
    return key
