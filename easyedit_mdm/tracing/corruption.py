"""Corrupted runs: the subject made unreadable, everything else left as it was.

noise    its embeddings plus Gaussian noise, `level` times the standard deviation of the model's embeddings
(Meng et al.,
         arXiv 2202.05262, section 2.1: nu = 3 sigma; there sigma is taken over subjects, here over all of the
             vocabulary, so that
         a fact's trace does not depend on the facts beside it),
replace  the tokens of other subjects with as many tokens (symmetric token replacement, Zhang and Nanda, arXiv
2309.16042), mask     mask tokens, which a masked model has seen at every place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.errors import HyperParameterError, RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.hooks import changing_output
from easyedit_mdm.tracing.facts import Placed, TracedFact, place


@dataclass(frozen=True)
class Corruption:
    """Corrupted versions ("samples") of one prompt.

    Attributes:
        ids: the prompt's tokens in each.
        first: where the subject begins.
        noise: what is added to the subject's embeddings in each, in float32; None where the tokens themselves
            differ.
    """

    ids: Int[Tensor, "samples prompt"]
    first: int
    noise: Float[Tensor, "samples subject width"] | None = None

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.ids)

    @contextmanager
    def at(self, adapter: Adapter, rows: Int[Tensor, " rows"]) -> Iterator[None]:
        """Inside the block, row r of whatever enters the embedding is corrupted as sample `rows[r]`; its ids
        must be that sample's.

        One number stands for all rows.
        """
        if self.noise is None:
            yield
            return
        noise = self.noise

        def add(out: Tensor) -> Tensor:
            """The noise at the subject."""
            if len(rows) not in (1, len(out)):
                raise RequestError(f"{len(out)} rows entered the embedding of a corrupted run of {len(rows)}")
            noisy = out.clone()
            noisy[:, self.first : self.first + noise.shape[1]] += noise[rows.to(noise.device)].to(
                out.device, out.dtype
            )
            return noisy

        with changing_output(adapter.module(adapter.spec.paths.embedding), add):
            yield


# (adapter, fact, samples, level, other subjects, generator) -> its corrupted versions
Corrupter = Callable[[Adapter, Placed, int, float, Sequence[str], torch.Generator], Corruption]
CORRUPTIONS: Registry[Corrupter] = Registry("corruption")


def fact_generator(placed: Placed, seed: int) -> torch.Generator:
    """The random numbers of one fact: the same whatever other facts are traced, and on every device."""
    digest = hashlib.sha256(repr((seed, placed.ids.tolist(), placed.answer.tolist())).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def embedding_deviation(adapter: Adapter) -> float:
    """Standard deviation of all numbers in the embeddings of the tokens that exist."""
    weight = adapter.weight_of(adapter.spec.paths.embedding)[: adapter.vocabulary]
    return float(weight.detach().float().std())


@CORRUPTIONS.register("noise")
def add_noise(
    adapter: Adapter,
    placed: Placed,
    samples: int,
    level: float,
    others: Sequence[str],
    generator: torch.Generator,
) -> Corruption:
    """Gaussian noise of `level` standard deviations on the subject's embeddings, another draw in each
    sample.
    """
    width = adapter.weight_of(adapter.spec.paths.embedding).shape[1]
    noise = torch.randn(samples, placed.end - placed.first, width, generator=generator)
    return Corruption(
        placed.ids.repeat(samples, 1), placed.first, level * embedding_deviation(adapter) * noise
    )


@CORRUPTIONS.register("replace")
def replace_subject(
    adapter: Adapter,
    placed: Placed,
    samples: int,
    level: float,
    others: Sequence[str],
    generator: torch.Generator,
) -> Corruption:
    """Other subjects of as many tokens in the subject's place, as many as there are up to `samples`, drawn
    without repetition.

    Raises:
        RequestError: if none of the others has as many tokens.
    """
    order = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
    rows: list[Tensor] = []
    for other in dict.fromkeys(order):
        if len(rows) == samples:
            break
        ids = None if other == placed.fact.subject else _with_subject(adapter, placed, other)
        rows += [] if ids is None else [ids]
    if not rows:
        raise RequestError(
            f"none of {len(others)} other subjects has the {placed.end - placed.first} tokens of"
            f" {placed.fact.subject!r}: give more facts or --replace-with, or corrupt with noise"
        )
    return Corruption(torch.stack(rows), placed.first)


def _with_subject(adapter: Adapter, placed: Placed, other: str) -> Int[Tensor, " prompt"] | None:
    """The prompt's tokens about another subject; None where that moves any token outside the subject."""
    text, start = placed.fact.parts()
    replaced = place(
        adapter,
        TracedFact(
            text[:start] + other + text[start + len(placed.fact.subject) :], other, placed.fact.answer
        ),
    )
    fits = len(replaced.ids) == len(placed.ids) and (replaced.first, replaced.end) == (
        placed.first,
        placed.end,
    )
    changed = (replaced.ids != placed.ids).nonzero().flatten().tolist() if fits else []
    return replaced.ids if fits and all(placed.first <= i < placed.end for i in changed) else None


@CORRUPTIONS.register("mask")
def mask_subject(
    adapter: Adapter,
    placed: Placed,
    samples: int,
    level: float,
    others: Sequence[str],
    generator: torch.Generator,
) -> Corruption:
    """Mask tokens in the subject's place; nothing is random, so that there is one sample.

    Raises:
        HyperParameterError: for an autoregressive model.
    """
    if adapter.ids.mask is None:
        raise HyperParameterError(
            f"corruption 'mask' needs a mask token, and {adapter.name} is {adapter.spec.paradigm}: use noise"
            " or replace"
        )
    ids = placed.ids.clone()
    ids[placed.first : placed.end] = adapter.ids.mask
    return Corruption(ids[None], placed.first)
