"""The types of what a trace writes: `trace.json`, a model's part of it, and a fact's part of that."""

from __future__ import annotations

from typing import Any, TypedDict

Table = list[list[float]]  # layers x tokens


class StateRecord(TypedDict):
    """One state of the answer, with `k` slots revealed: each measure in both runs, and the indirect effects,
    `{kind: {measure: layers x tokens}}`.
    """

    revealed: list[int]
    k: int
    clean: dict[str, float]
    corrupted: dict[str, float]
    effects: dict[str, dict[str, Table]]


class Joint(TypedDict):
    """The answer's whole log-likelihood in both runs, and how it was computed."""

    method: str
    clean: float
    corrupted: float


class Through(TypedDict):
    """An expert and its weight."""

    expert: int
    weight: float


class _Experts(TypedDict, total=False):
    """Of a model that has any: the experts of each mixture that the subject's last token goes through."""

    experts: dict[str, list[Through]]


class FactRecord(_Experts):
    """One traced fact."""

    prompt: str
    subject: str
    answer: str
    n_tokens: int
    tokens: list[str]
    classes: list[str]
    samples: int
    joint: Joint
    states: list[StateRecord]
    forwards: int
    rows: int
    seconds: float


class Profile(TypedDict):
    """An average indirect effect by layer, with its interval, and the numbers of facts and subjects."""

    mean: list[float]
    low: list[float | None]
    high: list[float | None]
    n: int
    subjects: int


Averages = dict[str, dict[str, dict[str, dict[str, Profile]]]]  # by group, kind, measure and class of token

# `class` is a word of Python, so this one cannot be written as a class
Peak = TypedDict(
    "Peak",
    {
        "group": str,
        "kind": str,
        "class": str,
        "layer": int,
        "effect": float,
        "low": float | None,
        "high": float | None,
        "n": int,
        "band": list[int],
    },
)


class Pair(TypedDict):
    """Two models, held side by side in one kind of module."""

    first: str
    second: str
    kind: str
    peaks: list[int]
    bands: list[list[int]]
    overlap: float
    correlation: float | None


class ModelTrace(TypedDict):
    """What one model's facts showed. `totals` is `{group: {measure: {run: estimate}}}` and the joint
    likelihood.
    """

    name: str
    fingerprint: str
    paradigm: str
    family: str
    layers: int
    window: int
    dtype: str
    forwards_a_fact: float
    rows_a_fact: float
    seconds: float
    left_out: list[dict[str, str]]
    totals: dict[str, Any]
    peaks: list[Peak]
    averages: Averages
    facts: list[FactRecord]


class TraceReport(TypedDict):
    """What `trace.json` holds."""

    version: str
    config: dict[str, Any]
    facts: dict[str, Any]
    checked: dict[str, Any]
    resamples: int
    notes: list[str]
    models: list[ModelTrace]
    pairs: list[Pair]
