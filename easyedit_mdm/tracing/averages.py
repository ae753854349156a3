"""Traces put into numbers: average indirect effects by layer, the layers that light up, and two models held
side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float

from easyedit_mdm.report.summaries import bootstrap_mean
from easyedit_mdm.tracing import CLASSES, KINDS, MEASURES
from easyedit_mdm.tracing.records import Averages, FactRecord, ModelTrace, Pair, Peak, Profile, StateRecord

# groups of states: an autoregressive model has one, which is compared with the masked models' first
GROUPS = {"none": "no slot revealed", "some": "some slots revealed"}
GRID = 840  # points of relative depth, a multiple of most numbers of layers


def group_of(state: StateRecord) -> str:
    """The group of a state's record."""
    return "some" if state["k"] else "none"


def fact_profile(
    fact: FactRecord, group: str, kind: str, measure: str, name: str
) -> Float[np.ndarray, " layers"] | None:
    """Indirect effect of a fact by layer: the mean over a class's tokens and the group's states; None where
    it has none of either.
    """
    at = [i for i, word_class in enumerate(fact["classes"]) if word_class == name]
    tables = [
        s["effects"][kind][measure]
        for s in fact["states"]
        if group_of(s) == group and measure in s["effects"][kind]
    ]
    return np.array(tables)[:, :, at].mean(axis=(0, 2)) if at and tables else None


def averages(facts: Sequence[FactRecord], seed: int = 0, resamples: int = 2000) -> Averages:
    """Average indirect effects (AIE) with 95 % intervals over subjects.

    Args:
        facts: records of traced facts.

    Returns:
        `{group: {kind: {measure: {class: {"mean": [by layer], "low", "high", "n", "subjects"}}}}}`; what no
        fact has is absent.
    """
    result: Averages = {}
    subjects = [fact["subject"] for fact in facts]
    for group, kind, measure, name in (
        (g, k, m, c) for g in GROUPS for k in KINDS for m in MEASURES for c in CLASSES
    ):
        profiles = [fact_profile(fact, group, kind, measure, name) for fact in facts]
        kept = [(profile, subject) for profile, subject in zip(profiles, subjects) if profile is not None]
        if kept:
            table = _estimates(
                np.stack([profile for profile, _ in kept]), [subject for _, subject in kept], seed, resamples
            )
            result.setdefault(group, {}).setdefault(kind, {}).setdefault(measure, {})[name] = table
    return result


def _estimates(
    values: Float[np.ndarray, "facts layers"], subjects: list[str], seed: int, resamples: int
) -> Profile:
    each = [bootstrap_mean(column.tolist(), subjects, seed, resamples) for column in values.T]
    return {
        "mean": [cast(float, e["mean"]) for e in each],  # there are values
        "low": [e["low"] for e in each],
        "high": [e["high"] for e in each],
        "n": each[0]["n"],
        "subjects": each[0]["subjects"],
    }


def totals(facts: Sequence[FactRecord], seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Means over facts of every measure in the clean and the corrupted run, `{group: {measure: {"clean",
    "corrupted"}}}`, and of the whole answer's likelihood under `joint`."""
    subjects = [fact["subject"] for fact in facts]
    result: dict[str, Any] = {}
    for group, measure in ((g, m) for g in GROUPS for m in MEASURES):
        runs = {
            run: [_mean_of(_state_values(fact, group, run, measure)) for fact in facts]
            for run in ("clean", "corrupted")
        }
        if any(value is not None for value in runs["clean"]):
            result.setdefault(group, {})[measure] = {
                run: bootstrap_mean(values, subjects, seed, resamples) for run, values in runs.items()
            }
    joint = {
        run: bootstrap_mean([fact["joint"][run] for fact in facts], subjects, seed, resamples)
        for run in ("clean", "corrupted")
    }
    return {**result, "joint": {**joint, "methods": sorted({fact["joint"]["method"] for fact in facts})}}


def _state_values(fact: FactRecord, group: str, run: str, measure: str) -> list[float]:
    runs = [s["clean"] if run == "clean" else s["corrupted"] for s in fact["states"] if group_of(s) == group]
    return [measures[measure] for measures in runs if measure in measures]


def _mean_of(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def band(profile: Sequence[float]) -> list[int]:
    """Layers at which the effect is at least half of its largest; none where nothing comes back."""
    most = max(profile)
    return [layer for layer, value in enumerate(profile) if value >= most / 2] if most > 0 else []


def ranges(layers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`; `none` without layers."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return (
        ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in zip(starts, ends))
        or "none"
    )


def peaks(average: Averages, measure: str = "probability") -> list[Peak]:
    """Where each class's effect is largest: `{"group", "kind", "class", "layer", "effect", "low", "high",
    "n", "band"}`.
    """
    rows: list[Peak] = []
    for group, kinds in average.items():
        for kind, measures in kinds.items():
            for name, table in measures.get(measure, {}).items():
                layer = int(np.argmax(table["mean"]))
                rows.append(
                    {
                        "group": group,
                        "kind": kind,
                        "class": name,
                        "layer": layer,
                        "effect": table["mean"][layer],
                        "low": table["low"][layer],
                        "high": table["high"][layer],
                        "n": table["n"],
                        "band": band(table["mean"]),
                    }
                )
    return rows


def side_by_side(
    names: Sequence[str],
    models: Sequence[ModelTrace],
    at: str = "subject_last",
    measure: str = "probability",
) -> list[Pair]:
    """Every two models, kind by kind: do the same layers light up?

    Profiles over layers are laid over each other by relative depth. `overlap` is the share of depth that lies
    in both bands, of what lies in either; `correlation` is Pearson's, None where a profile is flat.

    Returns:
        `{"first", "second", "kind", "peaks": [layer, layer], "bands": [[...], [...]], "overlap",
        "correlation"}` each.
    """
    rows: list[Pair] = []
    for (a, first), (b, second) in combinations(list(zip(names, models)), 2):
        for kind in KINDS:
            tables = [
                m["averages"].get("none", {}).get(kind, {}).get(measure, {}).get(at) for m in (first, second)
            ]
            profiles = [table["mean"] for table in tables if table is not None]
            if len(profiles) < 2:
                continue
            one, other = profiles
            rows.append(
                {
                    "first": a,
                    "second": b,
                    "kind": kind,
                    "peaks": [int(np.argmax(one)), int(np.argmax(other))],
                    "bands": [band(one), band(other)],
                    "overlap": _overlap(one, other),
                    "correlation": correlation(_by_depth(one), _by_depth(other)),
                }
            )
    return rows


def _by_depth(profile: Sequence[float]) -> Float[np.ndarray, " grid"]:
    """The profile over relative depth, between the middles of its layers in straight lines."""
    layers = len(profile)
    return np.interp((np.arange(GRID) + 0.5) / GRID, (np.arange(layers) + 0.5) / layers, profile)


def _overlap(first: Sequence[float], second: Sequence[float]) -> float:
    a, b = (_within(band(p), len(p)) for p in (first, second))
    return float((a & b).sum() / max(1, (a | b).sum()))


def _within(layers: Sequence[int], count: int) -> Bool[np.ndarray, " grid"]:
    return np.isin(np.arange(GRID) * count // GRID, layers)


def correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    """Pearson's correlation; None with fewer than three values, or where one side is flat."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(a) < 3 or a.std() < 1e-12 or b.std() < 1e-12:
        return None
    return round(float(np.corrcoef(a, b)[0, 1]), 4)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: Pearson's of the ranks, ties sharing theirs."""
    return correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> Float[np.ndarray, " n"]:
    array = np.asarray(values, dtype=float)
    return np.array([(array < x).sum() + ((array == x).sum() - 1) / 2 for x in array], dtype=float)
