"""The three things that lm-evaluation-harness asks of a model, for both paradigms.

A masked model has no next-token chain. Its log-likelihood of a continuation is the any-order bound of
`denoising.likelihood`: exact for short continuations, else a Monte Carlo estimate, here with its standard
error. A continuation counts as greedy if decoding as many masks as it has tokens, one a step, writes it. For
a whole text (perplexity) the bound is taken window by window.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from easyedit_mdm.denoising import DecodeConfig, decode, log_likelihood
from easyedit_mdm.denoising.likelihood import METHODS, default_method
from easyedit_mdm.denoising.states import Slots
from easyedit_mdm.errors import HyperParameterError, RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import encode

LOG = logging.getLogger(__name__)
GROUPS = 8  # independent shares of the samples, whose spread is the error
_ESTIMATES = ("llada", "dream")
_KNOWN = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k")


@dataclass(frozen=True)
class Likelihood:
    """A log-likelihood in nats.

    Attributes:
        error: its standard error; 0 where it is exact.
        tokens: how many it is of.
    """

    value: float
    error: float
    tokens: int


@dataclass(frozen=True)
class Scoring:
    """How to score: data, never hidden defaults.

    Attributes:
        likelihood: one of `denoising.likelihood.METHODS`, or `auto`: causal, exact, or LLaDA's estimate.
        samples: of an estimate; a multiple of 8, whose shares give the error.
        rows: of one forward pass.
        canvas: masks that a generation starts with, where the task does not say.
        steps: denoising steps of a generation; None means one a mask.
    """

    likelihood: str = "auto"
    samples: int = 128
    seed: int = 0
    rows: int = 128
    canvas: int = 64
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.likelihood not in ("auto", *METHODS):
            raise HyperParameterError(
                f"likelihood={self.likelihood!r} is not one of auto, {', '.join(METHODS)}"
            )
        for name in ("samples", "rows", "canvas"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise HyperParameterError(f"{name}={value!r} must be a whole number, at least 1")
        if self.samples % GROUPS:
            raise HyperParameterError(f"samples={self.samples} must be a multiple of {GROUPS}")


def split(
    adapter: Adapter, context: str, continuation: str
) -> tuple[Int[Tensor, " before"], Int[Tensor, " after"]]:
    """Tokens of a context and of what follows it, cut where the context alone ends.

    Spaces at the context's end go to the continuation, where tokenizers put them. A context that does not fit
    loses its beginning.

    Raises:
        RequestError: if the continuation has no tokens, or more than the model has positions.
    """
    bare = context.rstrip()
    before = encode(adapter, bare) if bare else _prefix(adapter)
    both = encode(adapter, context + continuation)
    after = both[len(before) if bare else len(encode(adapter, "")) :]
    if not after:
        raise RequestError(f"{continuation!r} has no tokens after {context!r}")
    return _fitting(adapter, torch.tensor(before, dtype=torch.long), len(after)), torch.tensor(after)


def _prefix(adapter: Adapter) -> list[int]:
    """What stands before a text: what the tokenizer puts there; for a causal model at least one token."""
    before = encode(adapter, "")
    if before or adapter.denoises:
        return before
    first = getattr(adapter.tokenizer, "bos_token_id", None)
    return [first if first is not None else adapter.ids.pad if adapter.ids.eos is None else adapter.ids.eos]


def _fitting(adapter: Adapter, context: Tensor, room: int) -> Tensor:
    most = adapter.max_positions - room
    if most < (0 if adapter.denoises else 1):
        raise RequestError(f"{room} tokens exceed the {adapter.max_positions} positions of {adapter.name}")
    if len(context) > most:
        LOG.warning("a context of %d tokens was cut to its last %d", len(context), most)
    return context[len(context) - min(most, len(context)) :]


def likelihoods(
    adapter: Adapter,
    pairs: Sequence[tuple[Tensor, Tensor]],
    scoring: Scoring = Scoring(),
    draws: Sequence[int] | None = None,
) -> list[Likelihood]:
    """log p(continuation | context) for pairs of token ids, each with its standard error.

    Args:
        draws: a number a pair; pairs with the same one (the choices of a question) get the same draws.
    """
    draws = list(range(len(pairs))) if draws is None else list(draws)
    scored: dict[int, Likelihood] = {}
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(_method(adapter, pair, scoring), []).append(i)
    for how, members in groups.items():
        chosen, numbers = [pairs[i] for i in members], [draws[i] for i in members]
        shares = GROUPS if how in _ESTIMATES else 1
        columns = [_sums(adapter, chosen, how, scoring, numbers, g, shares) for g in range(shares)]
        for i, values in zip(members, zip(*columns)):
            spread = torch.tensor(values, dtype=torch.float64)
            error = float(spread.std() / math.sqrt(shares)) if shares > 1 else 0.0
            scored[i] = Likelihood(float(spread.mean()), error, len(pairs[i][1]))
    return [scored[i] for i in range(len(pairs))]


def _method(adapter: Adapter, pair: tuple[Tensor, Tensor], scoring: Scoring) -> str:
    if scoring.likelihood != "auto":
        return scoring.likelihood
    return default_method(adapter, Slots(adapter.blocks(len(pair[0]), len(pair[1]))))


def _sums(
    adapter: Adapter,
    pairs: Sequence[tuple[Tensor, Tensor]],
    how: str,
    scoring: Scoring,
    draws: list[int],
    group: int,
    shares: int,
) -> list[float]:
    prompts, targets = [p for p, _ in pairs], [t for _, t in pairs]
    seed = scoring.seed * GROUPS + group
    return log_likelihood(
        adapter, prompts, targets, how, scoring.samples // shares, seed, scoring.rows, draws=draws
    )


def greedy(
    adapter: Adapter, pairs: Sequence[tuple[Tensor, Tensor]], scoring: Scoring = Scoring()
) -> list[bool]:
    """Whether greedy decoding, one token a step, writes each continuation."""
    right = []
    for start in range(0, len(pairs), scoring.rows):
        part = pairs[start : start + scoring.rows]
        written = decode(adapter, [p for p, _ in part], [len(t) for _, t in part])
        right += [torch.equal(w.tokens, t) for w, (_, t) in zip(written, part)]
    return right


def rolling(adapter: Adapter, text: str, scoring: Scoring = Scoring(), draw: int = 0) -> Likelihood:
    """The log-likelihood of a whole text.

    A text that is longer than half the model's positions is cut into windows of that size, each after as much
    of the text before it as fits. For a masked model the sum is the any-order bound of each window, so a
    perplexity made from it is an upper bound, up to the error.

    Raises:
        RequestError: for a text without tokens.
    """
    ids, before = torch.tensor(encode(adapter, text)[len(encode(adapter, "")) :]), _prefix(adapter)
    if not len(ids):
        raise RequestError(f"a text without tokens: {text!r}")
    size = adapter.max_positions // 2
    whole, first = torch.cat([torch.tensor(before, dtype=torch.long), ids]), len(before)
    starts = range(first, len(whole), size)
    pairs = [(whole[max(0, at - adapter.max_positions + size) : at], whole[at : at + size]) for at in starts]
    parts = likelihoods(adapter, pairs, scoring, [draw] * len(pairs))
    error = math.sqrt(sum(part.error**2 for part in parts))
    return Likelihood(sum(part.value for part in parts), error, len(ids))


def write_until(
    adapter: Adapter, context: str, options: Mapping[str, Any], scoring: Scoring = Scoring()
) -> str:
    """What a model writes after a context, up to the first stop string or the end-of-text token.

    A masked model fills a canvas of `max_gen_toks` masks (`scoring.canvas` by default), at most what the
    model has positions for.

    Raises:
        HyperParameterError: for options of a generation that a denoiser does not have.
    """
    unknown = sorted(set(options) - set(_KNOWN))
    if unknown:
        raise HyperParameterError(
            f"generation_kwargs {', '.join(unknown)}: a denoiser has none of these; known are"
            f" {', '.join(_KNOWN)}"
        )
    asked = options.get("max_gen_toks", options.get("max_new_tokens", scoring.canvas))
    canvas = min(int(asked), adapter.max_positions - 1)
    sampled = bool(options.get("do_sample", False))
    heat = float(options.get("temperature", 1.0) or 0.0) if sampled else 0.0
    prompt = _fitting(
        adapter, torch.tensor(encode(adapter, context) or _prefix(adapter), dtype=torch.long), canvas
    )
    config = DecodeConfig(
        None, scoring.steps, temperature=heat, top_k=options.get("top_k"), seed=scoring.seed
    )
    (written,) = decode(adapter, [prompt], [canvas], config)
    return cut(_text(adapter, written.tokens), options.get("until"))


def _text(adapter: Adapter, ids: Tensor) -> str:
    ends = (ids == adapter.ids.eos).nonzero() if adapter.ids.eos is not None else ids.new_zeros(0)
    kept = ids[: int(ends[0])] if len(ends) else ids
    return adapter.tokenizer.decode(kept.tolist(), skip_special_tokens=True)


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of some stop strings."""
    stops = [until] if isinstance(until, str) else until or []
    return text[: min([len(text), *(text.find(stop) for stop in stops if stop and stop in text)])]
