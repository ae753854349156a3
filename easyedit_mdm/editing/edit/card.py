"""What an edit says about itself: the types of `Edit.card`, which `edit.json` holds."""

from __future__ import annotations

from typing import Any, TypedDict


class FactRecord(TypedDict, total=False):
    """A fact, and how its value was found.

    Attributes:
        n_tokens: tokens of the target.
        schedule: of states, as it was run.
        steps: of the optimiser.
        forwards, layer_passes: rows that went through the model, and through one layer.
        losses: one a step.
    """

    prompt: str
    subject: str
    target_new: str
    n_tokens: int
    schedule: str
    steps: int
    forwards: int
    layer_passes: int
    losses: list[float]


class Base(TypedDict, total=False):
    """The model that an edit belongs to.

    Attributes:
        fingerprint: of its weights, without the edit.
        weights: SHA-256 of each weight that the edit changes, before it.
        carries: ids of the edits that were in it.
    """

    name: str
    family: str | None
    paradigm: str | None
    dtype: str
    fingerprint: str
    weights: dict[str, str]
    carries: list[str | None]


class Verdict(TypedDict, total=False):
    """What the collapse guard found; with `on` false, `why` nobody asked it."""

    on: bool
    why: str
    verdict: str
    reasons: list[str]
    figures: dict[str, float | None]
    thresholds: dict[str, float | None]


class Composed(TypedDict):
    """Of which edits one was made, and what overlaps in them."""

    edits: list[dict[str, Any]]
    conflicts: list[str]


class Card(TypedDict, total=False):
    """Everything that is known of an edit but its changes.

    Attributes:
        hyperparameters: of the method, as in a file.
        delta_norm: ||v* - v||, and `denominator`, `key_norm` of the rank-one update: ROME_MDM, R-ROME_MDM.
        layers: figures of each layer's system: the methods of several facts.
        base, edited, versions, norms: once it is sealed: the model, SHA-256 of the weights with the edit,
            versions of the packages, `norm` and `norm_ratio` of each change.
        metrics: what `easyedit-mdm edit` measured before and after.
    """

    id: str
    method: str
    facts: list[FactRecord]
    hyperparameters: dict[str, Any]
    seed: int | None
    delta_norm: float
    denominator: float
    key_norm: float
    layers: dict[str, dict[str, float]]
    guard: Verdict
    base: Base
    edited: dict[str, str]
    versions: dict[str, str]
    norms: dict[str, dict[str, float]]
    metrics: dict[str, Any]
    composed: Composed
