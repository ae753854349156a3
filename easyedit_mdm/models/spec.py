"""What distinguishes one family of language models from another, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from easyedit_mdm.errors import CheckpointError, ModelError
from easyedit_mdm.models.attention import CAUSAL, FULL, Attention
from easyedit_mdm.models.mixture import Experts

Config = Mapping[str, Any]
Made = tuple[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class ModulePaths:
    """Dotted paths of the modules that editing needs, `{}` standing for the layer's number.

    Attributes:
        embedding: the tokens' embedding.
        entry: what makes layer 0's input of (input_ids, position_ids), where that is more than the embedding.
        norm: what stands between the last layer and the head, in this order.
        head: the linear map that ends in logits.
        context_block: the layers that what stands before the canvas goes through, where it does not go
            through `block` (DiffusionGemma's encoder). Their parameters are those of `block`, their buffers
            are not.
        canvas_entry: what the canvas goes through after the embedding, as (embedded, zeros).
        shares: a module all of whose parameters another one has, too; they go by the other's names.
    """

    backbone: str = "model"
    block: str = "model.layers.{}"
    mlp: str = "model.layers.{}.mlp"
    down: str = "model.layers.{}.mlp.down_proj"
    attention: str = "model.layers.{}.self_attn"
    embedding: str = "model.embed_tokens"
    entry: str = ""
    norm: tuple[str, ...] = ("model.norm",)
    head: str = "lm_head"
    context_block: str = ""
    canvas_entry: str = ""
    shares: str = ""


@dataclass(frozen=True)
class FamilySpec:
    """One family.

    Attributes:
        name: the family's name.
        paradigm: `causal` (writes from left to right), `masked` (writes by denoising masks), or `noised` (by
            denoising random tokens).
        architectures: values of `config.json`'s `architectures[0]` that belong to it.
        probe: a key that a checkpoint of this family contains; tells apart families that share an
            architecture name.
        native: name of the transformers class that computes it, without its ending.
        ending: what its name ends in, such as `ForMaskedLM`; empty for a causal language model's.
        native_config: function from the raw `config.json` to the keyword arguments of the native config
            class.
        rename: (beginning of the hub's parameter name, beginning of the native one) pairs, `{}` standing for
            the layer's number; read in both directions.
        paths: where the native class keeps its modules.
        shift: the raw logits at position j predict token j + 1 (causal models, Dream); where `config.json`
            decides, a function of it.
        attention: who sees whom; where `config.json` decides (a block's size), a function of it. None: causal
            for causal families, full for others.
        mask_id: the mask token's id where neither user, config nor tokenizer names one.
        tokenizer: name of a transformers tokenizer class to fall back on where the folder names one that is
            not native.
        since: the first version of transformers that has the native class, where it is younger than the
            oldest supported.
        releases: published models of the family.
        verified: what was held against what; it goes into docs/families.md.
        absolute_positions: the backbone adds learned positions to its input (GPT-2, BERT), so a stack that
            starts higher up must not.
        bidirectional: the native class lets every token see every other by itself, and takes a 2-D attention
            mask.
        window: of the native configuration, how far a token of a sliding layer sees to each side; where
            there is a `context_block`, the canvas is seen whole, and as far before it as from its first
            token.
        softcap: what the native configuration calls the bound c of logits, which are c tanh(raw / c).
        experts: of `config.json`, the mixtures of experts that stand in place of the native class's MLPs.
        made_of: of `config.json` and a native parameter's name, the checkpoint's tensor that it is made of
            and how, where it is not that tensor as it is (fused or reordered ones); None for all others.
        frequencies: of `config.json`, the rotation's frequencies, where they are not the native class's.
        tied: parameters that are the embedding's (or another's) where `tie_word_embeddings` says so, as
            regular expressions; a checkpoint may leave them out.
        stored: the checkpoint holds buffers, too.
        unused: tensors of checkpoints that the native class has no place for, as regular expressions.
        aliases: (ending, ending) of tensors' names that older checkpoints have, and their native one.
    """

    name: str
    paradigm: str
    architectures: tuple[str, ...]
    probe: str
    native: str
    native_config: Callable[[Config], dict[str, Any]]
    rename: tuple[tuple[str, str], ...] = ()
    paths: ModulePaths = ModulePaths()
    shift: bool | Callable[[Config], bool] = False
    attention: Attention | Callable[[Config], Attention] | None = None
    mask_id: int | None = None
    tokenizer: str = "PreTrainedTokenizerFast"
    absolute_positions: bool = False
    ending: str = ""
    bidirectional: bool = False
    window: Callable[[Any], int] | None = None
    softcap: str = ""
    experts: Callable[[Config], Experts] | None = None
    made_of: Callable[[Config, str], Made | None] = lambda config, name: None
    frequencies: Callable[[Config], Tensor] | None = None
    tied: tuple[str, ...] = (r"lm_head\.weight",)
    stored: bool = False
    unused: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    since: str = ""
    releases: str = ""
    verified: str = ""
    native_model_types: tuple[str, ...] = ()

    def native_name(self, key: str) -> str:
        """The native name of a parameter that the checkpoint calls `key`."""
        for old, new in self.aliases:
            key = key.removesuffix(old) + new if key.endswith(old) else key
        return _substitute(key, self.rename)

    def hub_name(self, name: str) -> str:
        """The checkpoint's name of a native parameter."""
        return _substitute(name, [(native, hub) for hub, native in self.rename])

    def shift_of(self, config: Config) -> bool:
        """Whether the raw logits of a model with this `config.json` predict the next token."""
        return self.shift(config) if callable(self.shift) else self.shift

    def attention_of(self, config: Config, block: int | None = None) -> Attention:
        """Who sees whom in a model with this `config.json`.

        Args:
            block: tokens of a block, in place of what the family and the configuration say.

        Raises:
            CheckpointError: for a block that no model can have, or one for a causal family.
        """
        if block is not None and not self.denoises:
            raise CheckpointError(
                f"block={block!r} was given, but a {self.name} model is causal: leave it out"
            )
        try:
            attention = self.attention(config) if callable(self.attention) else self.attention
            attention = attention or (FULL if self.denoises else CAUSAL)
            return attention if block is None else replace(attention, block=block)
        except ModelError as error:
            raise CheckpointError(
                f"{self.name}: {error}; the block's size is what the loader was given, or config.json says"
            ) from error

    @property
    def denoises(self) -> bool:
        """Whether its models write by denoising, so that slots of a target can be hidden, in any order."""
        return self.paradigm != "causal"

    @property
    def masked(self) -> bool:
        """Whether what a hidden slot shows is a mask."""
        return self.paradigm == "masked"

    @property
    def noised(self) -> bool:
        """Whether what a hidden slot shows is a random token."""
        return self.paradigm == "noised"


def _substitute(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for before, after in pairs:
        match = re.match(re.escape(before).replace(r"\{\}", r"(\d+)"), key)
        if match:
            return after.replace("{}", match.group(1) if match.groups() else "") + key[match.end() :]
    return key
