"""Prompts, subjects and targets as tokens of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from easyedit_mdm.errors import RequestError
from easyedit_mdm.models.adapter import Adapter


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt, and the column where the fact is read and written (by default that of the
    subject's last token).
    """

    ids: Int[Tensor, " length"]
    fact_at: int


def encode(adapter: Adapter, text: str) -> list[int]:
    """Token ids of a prompt, with whatever the tokenizer puts in front of every text (BOS, [CLS] or nothing).

    What it puts behind a text (BERT's [SEP]) is left out: the target stands there.

    Raises:
        RequestError: if the model has no tokenizer.
    """
    if adapter.tokenizer is None:
        raise RequestError(
            f"{adapter.name} has no tokenizer: load it from a folder that has one, or pass tokenizer="
        )
    ids = list(adapter.tokenizer(text)["input_ids"])
    return ids[: len(ids) - _closing(adapter.tokenizer)]


def _closing(tokenizer: Any) -> int:
    """How many tokens a tokenizer puts behind every text."""
    added = tokenizer.num_special_tokens_to_add()
    if not added:
        return 0
    both, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next((i for i in range(added + 1) if both[i : i + len(plain)] == plain), added)
    return added - start


def target_ids(adapter: Adapter, prompt: str, target: str) -> Int[Tensor, " tokens"]:
    """The target's tokens as they stand after the prompt, one space between them; the same ids edit and
    score.

    Where the prompt's own last tokens would change with the target behind them, the target is tokenised by
    itself.

    Raises:
        RequestError: if the target has no tokens.
    """
    before = encode(adapter, prompt.rstrip())
    both = encode(adapter, f"{prompt.rstrip()} {target.strip()}")
    ids = both[len(before) :] if both[: len(before)] == before else _alone(adapter, target)
    if not ids:
        raise RequestError(f"target {target!r} has no tokens after {prompt!r}")
    return torch.tensor(ids)


def _alone(adapter: Adapter, target: str) -> list[int]:
    return list(adapter.tokenizer(" " + target.strip(), add_special_tokens=False)["input_ids"])


def span(adapter: Adapter, text: str, start: int, end: int) -> tuple[list[int], int, int]:
    """Token ids of `text`, and the first and last token that overlap characters start..end-1."""
    tok = adapter.tokenizer
    if tok is None:
        encode(adapter, text)
    if getattr(tok, "is_fast", False):
        encoded = tok(text, return_offsets_mapping=True)
        inside = [
            i
            for i, (a, b) in enumerate(encoded["offset_mapping"])
            if a < end and b > start and b > a and text[a:b].strip()
        ]
        if inside:
            ids = list(encoded["input_ids"])
            return ids[: len(ids) - _closing(tok)], inside[0], inside[-1]
    ids = encode(adapter, text)
    return (
        ids,
        len(encode(adapter, text[:start].rstrip())) if text[:start].strip() else 0,
        len(encode(adapter, text[:end])) - 1,
    )
