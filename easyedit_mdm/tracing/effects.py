"""Indirect effects of a fact: for each layer and token, how much of the answer comes back when that state
alone is restored.

    IE(layer, token) = m(restored there) - m(corrupted),    averaged over the corruption's samples,

with m one of `MEASURES`: the joint probability of the slots that are read, its logarithm, or (masked models)
the final log-probability of `tracing.temporal`. In a state S of a masked model the joint is sum_{i not in S}
log p(y_i | prompt, y_S), the slots read side by side in one pass: at N - |S| = 1, and for N = 1, it is exact;
beyond, it is what one denoising step sees, and cheap. On an autoregressive model it is the exact sum_i log
p(y_i | prompt, y_<i). The answer's whole likelihood, any-order and exact up to five tokens, stands beside it
for the clean and the corrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from easyedit_mdm.denoising import decode, log_likelihood
from easyedit_mdm.denoising.likelihood import MOST_STATES
from easyedit_mdm.denoising.states import Slots
from easyedit_mdm.errors import HyperParameterError, RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.tracing.corruption import CORRUPTIONS, Corruption, fact_generator
from easyedit_mdm.tracing.facts import Placed, TracedFact, place
from easyedit_mdm.tracing.records import FactRecord, Joint, StateRecord
from easyedit_mdm.tracing.restoring import KINDS, Answer, Count, Runs, counting
from easyedit_mdm.tracing.temporal import final

MEASURES = ("probability", "log_probability", "final_log_probability")
REVEALS = ("path", "random")
DIGITS = 7


@dataclass(frozen=True)
class TraceConfig:
    """What is corrupted, restored and read.

    Attributes:
        corrupt: a name in `CORRUPTIONS`.
        level: standard deviations of the noise, in those of the embeddings.
        samples: corrupted runs a fact (`mask` has one, `replace` no more than there are other subjects).
        window: layers whose MLP or attention outputs are restored together; None means ROME's share, 10 of
            48, at least one.
        revealed: numbers k of slots that show their right token; each gives one state. None means 0 and half
            of them. Numbers as large as the answer are left out, and autoregressive models have one state
            whatever this says.
        reveal: which k slots: those that the model itself writes first (`path`, so that the state is step k
            of its own denoising), or `random` ones.
        max_rows: rows of one forward pass.
        seed: of noise, other subjects and random slots.
    """

    corrupt: str = "noise"
    level: float | int = 3.0
    samples: int = 10
    window: int | None = None
    revealed: tuple[int, ...] | None = None
    reveal: str = "path"
    max_rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        CORRUPTIONS[self.corrupt]
        if self.reveal not in REVEALS:
            raise HyperParameterError(f"reveal={self.reveal!r} is not one of {', '.join(REVEALS)}")
        for name in ("samples", "max_rows", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HyperParameterError(f"trace setting {name}={value!r} must be at least 1")
        if not 0 < self.level < float("inf"):
            raise HyperParameterError(
                f"trace setting level={self.level!r} must be positive: with no noise nothing is corrupted"
            )
        if self.revealed is not None and (not self.revealed or min(self.revealed) < 0):
            raise HyperParameterError(
                f"trace setting revealed={self.revealed!r}: give numbers of revealed slots, 0 for none"
            )

    def window_for(self, layers: int) -> int:
        """Layers restored together in a model of `layers` layers."""
        return self.window or max(1, round(layers * 10 / 48))

    def counts(self, slots: int) -> list[int]:
        """The numbers k of revealed slots for an answer of `slots` tokens."""
        wanted = (0, slots // 2) if self.revealed is None else self.revealed
        return sorted({k for k in wanted if k < slots})

    def record(self) -> dict[str, Any]:
        """The settings as they go into records."""
        return asdict(self)


@dataclass(frozen=True)
class StateTrace:
    """One state of the answer.

    Attributes:
        revealed: the slots that show their token.
        clean, corrupted: each measure without and with the corruption.
        effects: indirect effects, `{kind: {measure: layers x tokens}}`, tokens in the order of the row.
    """

    revealed: list[int]
    clean: dict[str, float]
    corrupted: dict[str, float]
    effects: dict[str, dict[str, Float[Tensor, "layers tokens"]]]

    def record(self) -> StateRecord:
        """As JSON holds it."""
        effects = {
            kind: {name: _rounded(values) for name, values in table.items()}
            for kind, table in self.effects.items()
        }
        return {
            "revealed": self.revealed,
            "k": len(self.revealed),
            "clean": self.clean,
            "corrupted": self.corrupted,
            "effects": effects,
        }


@dataclass(frozen=True)
class FactTrace:
    """One fact.

    Attributes:
        tokens, classes: text and class (`tracing.facts.CLASSES`) of each token that is restored.
        samples: corrupted runs.
        joint: the answer's whole log-likelihood: `{"method", "clean", "corrupted"}`.
        experts: of each layer that is a mixture, by number: the experts that the subject's last token goes
            through in the clean run with nothing revealed, the heaviest first, as (number, weight).
        passes, rows: forward passes that all of it took, and rows in them.
    """

    placed: Placed
    tokens: list[str]
    classes: list[str]
    samples: int
    joint: Joint
    states: list[StateTrace]
    experts: dict[int, list[tuple[int, float]]]
    passes: int
    rows: int
    seconds: float

    def record(self) -> FactRecord:
        """As JSON holds it; `experts` only of a model that has any."""
        fact = self.placed.fact
        record: FactRecord = {
            "prompt": fact.prompt, "subject": fact.subject, "answer": fact.answer,
            "n_tokens": len(self.placed.answer), "tokens": self.tokens,
            "classes": self.classes, "samples": self.samples,
            "joint": self.joint, "states": [state.record() for state in self.states], "forwards": self.passes,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip
        if self.experts:
            record["experts"] = {
                str(layer): [{"expert": n, "weight": round(weight, DIGITS)} for n, weight in through]
                for layer, through in self.experts.items()
            }
        return record


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(x, DIGITS) + 0.0 for x in row] for row in values.tolist()]


def trace_facts(
    adapter: Adapter,
    facts: Sequence[TracedFact],
    config: TraceConfig = TraceConfig(),
    others: Sequence[str] = (),
    progress: bool = True,
) -> tuple[list[FactTrace], list[dict[str, str]]]:
    """Trace facts one after the other, with a bar over their layers.

    Args:
        others: other subjects, for the corruption `replace`.

    Returns:
        the traces, and `{"prompt", "reason"}` of each fact that could not be corrupted (no other subject has
        as many tokens).

    Raises:
        RequestError: if that is so for all of them.
    """
    traces, left_out = [], []
    placed = [place(adapter, fact) for fact in facts]
    total = sum(_states_of(adapter, p, config) * len(KINDS) * adapter.layers for p in placed)
    with tqdm(total=total, desc=f"tracing {adapter.name}", unit="layer", disable=not progress) as bar:
        for one in placed:
            try:
                traces.append(trace_fact(adapter, one.fact, config, others, bar.update))
            except RequestError as reason:
                left_out.append({"prompt": one.fact.prompt, "reason": str(reason)})
    if not traces:
        raise RequestError(
            f"no fact could be traced; the first: {left_out[0]['reason'] if left_out else 'none was given'}"
        )
    return traces, left_out


def _states_of(adapter: Adapter, placed: Placed, config: TraceConfig) -> int:
    return max(1, len(config.counts(len(placed.answer)))) if adapter.denoises else 1


def trace_fact(
    adapter: Adapter,
    fact: TracedFact,
    config: TraceConfig = TraceConfig(),
    others: Sequence[str] = (),
    tick: Callable[[], Any] = lambda: None,
) -> FactTrace:
    """Trace one fact; whether the model knows it is for the caller to check (`tracing.check_known`).

    Args:
        others: other subjects, for the corruption `replace`.
        tick: called after each layer of each kind.

    Raises:
        RequestError: for a fact that does not fit the model, or that nothing can replace the subject of.
        HyperParameterError: for a corruption that the model has no means for.
    """
    began, placed = time.perf_counter(), place(adapter, fact)
    generator = fact_generator(placed, config.seed)
    corruption = CORRUPTIONS[config.corrupt](adapter, placed, config.samples, config.level, others, generator)
    window = config.window_for(adapter.layers)
    with counting(adapter) as count:
        revealed = _revealed(adapter, placed, config, generator)
        states = [
            trace_state(Runs(adapter, placed, corruption, shown, window, config.max_rows), tick)
            for shown in revealed
        ]
        joint = whole_likelihood(adapter, placed, corruption)
    slots = len(placed.answer) if adapter.denoises else len(placed.answer) - 1
    return _fact_trace(
        adapter, placed, slots, corruption.samples, joint, states, count, time.perf_counter() - began
    )


def _fact_trace(
    adapter: Adapter,
    placed: Placed,
    slots: int,
    samples: int,
    joint: Joint,
    states: list[StateTrace],
    count: Count,
    seconds: float,
) -> FactTrace:
    hidden = adapter.hidden.slots(slots) if adapter.denoises else placed.answer[:slots]
    tokens = [adapter.tokenizer.decode([t]) for t in placed.ids.tolist() + hidden.tolist()]
    experts = experts_of(adapter, placed)
    classes = placed.classes(slots)
    return FactTrace(
        placed, tokens, classes, samples, joint, states, experts, count.passes, count.rows, seconds
    )


def experts_of(adapter: Adapter, placed: Placed) -> dict[int, list[tuple[int, float]]]:
    """Through which experts of each mixture the subject's last token goes, with nothing revealed, as
    `FactTrace.experts` says; empty for a model without mixtures.
    """
    shown = torch.zeros(len(placed.answer), dtype=torch.bool)
    row = torch.cat([placed.ids, adapter.behind(placed.answer, shown)])[None].to(adapter.device)
    canvas = torch.tensor([len(placed.ids)], device=row.device)
    shares = {}
    for layer in adapter.mixtures:
        weights, numbers = (part[0, placed.end - 1] for part in adapter.routes(layer, row, canvas=canvas))
        through = zip(numbers.tolist(), weights.float().tolist())
        shares[layer] = sorted(through, key=lambda one: -one[1])
    return shares


def _revealed(
    adapter: Adapter, placed: Placed, config: TraceConfig, generator: torch.Generator
) -> list[Bool[Tensor, " slots"]]:
    """The states to trace: which slots of the answer show their token in each."""
    slots = len(placed.answer)
    if not adapter.denoises:
        return [torch.zeros(slots, dtype=torch.bool)]
    counts = config.counts(slots)
    if not counts:
        raise RequestError(
            f"{placed.fact.answer!r} has {slots} tokens: none of revealed={config.revealed} leaves a slot to"
            " read"
        )
    if config.reveal == "random":
        blocks = adapter.attention.blocks(len(placed.ids), slots)
        starts = [sum(blocks[:i]) for i in range(len(blocks))]
        order = torch.cat(
            [start + torch.randperm(size, generator=generator) for start, size in zip(starts, blocks)]
        )
    else:
        order = (
            decode(adapter, [placed.ids], [slots])[0].step.argsort() if max(counts) else torch.arange(slots)
        )
    return [torch.zeros(slots, dtype=torch.bool).index_fill(0, order[:k], True) for k in counts]


def trace_state(runs: Runs, tick: Callable[[], Any] = lambda: None) -> StateTrace:
    """Restore every layer at every token, for each kind, from every corrupted run; all tokens and samples of
    a layer go through together.
    """
    layers, samples = runs.adapter.layers, runs.corruption.samples
    where = torch.eye(runs.tokens, runs.placed.length, dtype=torch.bool).repeat_interleave(
        samples, 0
    )  # tokens * samples rows
    which = torch.arange(samples).repeat(runs.tokens)
    corrupted = _measured(runs, runs.corrupted, torch.arange(samples))
    effects = {}
    for kind in KINDS:
        answers = []
        for layer in range(layers):
            answers.append(runs.restored(kind, layer, where, which))
            tick()
        every = Answer(
            *(torch.cat([getattr(a, name) for a in answers]) for name in ("right", "token", "sure"))
        )
        measured = _measured(runs, every, which.repeat(layers))
        effects[kind] = {
            name: values.view(layers, runs.tokens, samples).mean(2) - corrupted[name].mean()
            for name, values in measured.items()
        }
    clean = {name: float(values[0]) for name, values in _measured(runs, runs.clean, None).items()}
    shown = [i for i in range(len(runs.placed.answer)) if i not in runs.hidden.tolist()]
    return StateTrace(
        shown, clean, {name: float(values.mean()) for name, values in corrupted.items()}, effects
    )


def _measured(runs: Runs, answer: Answer, samples: Tensor | None) -> dict[str, Float[Tensor, " rows"]]:
    """Every measure of some runs, in float64."""
    measured = {"probability": answer.joint.exp(), "log_probability": answer.joint}
    return (
        {**measured, "final_log_probability": final(runs, answer, samples)}
        if runs.adapter.denoises
        else measured
    )


def whole_likelihood(adapter: Adapter, placed: Placed, corruption: Corruption) -> Joint:
    """log p(answer | prompt), clean and as the mean over corrupted runs: causal, or any-order (exact), or
    beyond five tokens from left to right.
    """
    slots = Slots(adapter.attention.blocks(len(placed.ids), len(placed.answer)))
    method = "causal" if not adapter.denoises else "exact" if slots.states <= MOST_STATES else "left_to_right"
    corrupted = []
    for sample in range(corruption.samples):
        with corruption.at(adapter, torch.tensor([sample])):
            corrupted += log_likelihood(adapter, [corruption.ids[sample]], [placed.answer], method)
    clean = log_likelihood(adapter, [placed.ids], [placed.answer], method)[0]
    return {"method": method, "clean": clean, "corrupted": sum(corrupted) / len(corrupted)}
