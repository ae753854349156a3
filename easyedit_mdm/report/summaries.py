"""Numbers of run files: one row of figures a case, means with intervals, paired differences.

Intervals are 95 % bootstrap intervals that resample subjects, not cases: prompts about one subject stand or
fall together. Each interval starts from the same seed, so it does not depend on what else is in the
comparison.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import Float

from easyedit_mdm.errors import DataError
from easyedit_mdm.evaluation.records import CaseRecord, Header, Judgement, Run, Rung, scores


class Interval(TypedDict):
    """A mean with its 95 % interval; None without values, the bounds also with fewer than two subjects."""

    mean: float | None
    low: float | None
    high: float | None


class Estimate(Interval):
    """The same, with the numbers of values and of subjects that it is of."""

    n: int
    subjects: int


class Difference(Estimate):
    """A mean difference of two runs, and what to make of it; see `verdict`."""

    verdict: str


class Median(TypedDict):
    """Median and quartiles."""

    median: float | None
    q25: float | None
    q75: float | None
    n: int


class Summary(TypedDict):
    """All numbers of one run, without measures that no case has. `errors`, `skipped`: counts by reason."""

    file: str
    model: str | None
    method: str | None
    schedule: str | None
    cases: int
    subjects: int
    failed: int
    errors: dict[str, int]
    skipped: dict[str, int]
    measures: dict[str, Estimate]
    success_by_length: dict[str, Estimate]
    cost: dict[str, Median]
    header: Header


class Pair(TypedDict):
    """Differences on the cases that two runs share; `n` counts those where both have the measure."""

    shared: int
    measures: dict[str, Difference]
    success_by_length: dict[str, Difference]


class NamedPair(Pair):
    """The same, with the runs' names."""

    first: str
    second: str


Columns = dict[str, list[float | None]]

# a failed case never reached its target; what it would have kept or cost is unknown
ZERO_IF_FAILED = (
    "success", "success_one_step", "token_acc", "first_commit", "rephrase_exact", "portability_exact",
)  # fmt: skip
PAIRED = (*ZERO_IF_FAILED[:5], "locality_kept", "portability_exact", "mirage_gap", "mirage_gap_exact")
DECODINGS = ("multi_step", "steps_half", "one_step", "left_to_right", "random")
SCORES = ("ES", "PS", "NS", "EM", "PM", "NM")
DIGITS = 6


def failed(case: CaseRecord) -> bool:
    """Whether the case ended in an error, or has no result."""
    return "error" in case or "post" not in case


def subject_of(case: CaseRecord) -> str:
    """What the case is resampled by: its subject; a case that names none stands alone."""
    return f"subject {case['subject']}" if "subject" in case else f"case {case['case_id']}"


def length_of(case: CaseRecord) -> int | None:
    """Tokens of the target, None where the file does not say."""
    parts = [case, *scores(case.get("post", {}).get("multi_step", {}).get("rewrite"))]
    return next((int(part["n_tokens"]) for part in parts if "n_tokens" in part), None)


def key_of(case: CaseRecord) -> tuple[int | str, str]:
    """What makes cases of two runs the same one."""
    return case["case_id"], str(case.get("target_new"))


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def case_figures(case: CaseRecord) -> dict[str, float | None]:
    """Every figure of one case that did not fail, None where the file has none."""
    post, pre = case["post"], case.get("pre", {})
    sections = post.get("multi_step", {})
    rewrite, rephrase = scores(sections.get("rewrite")), scores(sections.get("rephrase"))
    kept, rungs = post.get("locality_kept", {}), post.get("ladder", {})
    figures = {
        "success": _mean(s.get("exact") for s in rewrite),
        "success_one_step": _mean(s.get("one_step_exact") for s in rewrite),
        "token_acc": _mean(s.get("token_acc") for s in rewrite),
        "first_commit": _mean(s.get("first_commit") for s in rewrite),
        "rephrase_exact": _mean(s.get("exact") for s in rephrase),
        "portability_exact": _mean(s.get("exact") for s in scores(sections.get("portability"))),
        "locality_kept": _mean(kept.values()),
        **{f"locality_kept.{name}": share for name, share in kept.items()},
        "same_subject_kept": post.get("same_subject_kept"),
        "every_decoding": _every_decoding(rungs),
        "mirage_gap": post.get("mirage_gap"),
        "mirage_gap_exact": post.get("mirage_gap_exact"),
        "success_before": _mean(s.get("exact") for s in scores(pre.get("multi_step", {}).get("rewrite"))),
        **{f"ladder.{name}": rung.get("exact") for name, rung in rungs.items()},
        **{f"ladder_token_acc.{name}": rung.get("token_acc") for name, rung in rungs.items()},
        **_likelihoods(post),
        **_extras(pre, post),
    }
    return {name: None if value is None else float(value) for name, value in figures.items()}


def _every_decoding(rungs: Mapping[str, Rung]) -> bool | None:
    """Whether a masked model writes the target whichever way it is decoded: N steps, half as many, one, from
    left to right, and in a random order.
    """
    exact = [rungs[name].get("exact") for name in DECODINGS if name in rungs]
    return all(exact) if len(exact) == len(DECODINGS) else None


def _likelihoods(post: Judgement) -> dict[str, float | None]:
    """CounterFact's scores; a masked model's come from a bound of log p, and go by a name of their own."""
    preferences = post.get("counterfact", {})
    bound = "" if preferences.get("likelihood") == "causal" else "bound."
    kinds = (("sum", preferences.get("sum", {})), ("per_token", preferences.get("per_token", {})))
    return {f"{bound}{kind}.{name}": values.get(name) for kind, values in kinds for name in SCORES}


def _extras(pre: Judgement, post: Judgement) -> dict[str, bool | int | float | None]:
    """Success given k tokens, where the first wrong token was committed, what became of other text."""
    extras: dict[str, bool | int | float | None] = {}
    extras |= {f"given_k.{k}": right for k, right in enumerate(post.get("given_k", []))}
    extras["first_wrong_step"] = (post.get("first_wrong") or {}).get("step")
    for name, part in (("with_statement_acc", post), ("with_statement_acc_before", pre)):
        scored = scores(part.get("multi_step", {}).get("with_statement"))
        extras[name] = _mean(s.get("token_acc") for s in scored)
    entropies = (part.get("fluency", {}).get("ngram_entropy") for part in (post, pre))
    perplexities = (part.get("perplexity", {}).get("value") for part in (post, pre))
    return {**extras, "fluency_ratio": _ratio(*entropies), "perplexity_ratio": _ratio(*perplexities)}


def _ratio(after: float | None, before: float | None) -> float | None:
    return after / before if after is not None and before else None


def columns(run: Run) -> Columns:
    """The figures of all cases by name, each as long as the run; a failed case is 0 wherever it should have
    reached its target.
    """
    rows = [None if failed(case) else case_figures(case) for case in run.cases]
    there = [name for row in rows if row is not None for name, value in row.items() if value is not None]
    names = list(dict.fromkeys(there))
    names = ["success"] if rows and all(row is None for row in rows) else names
    return {
        name: [_if_failed(name, case) if row is None else row.get(name) for case, row in zip(run.cases, rows)]
        for name in names
    }


def _if_failed(name: str, case: CaseRecord) -> float | None:
    """What a failed case counts as: nothing on a canvas that its target would not have fitted on."""
    canvas = re.search(r"canvas(\d+)$", name)
    if canvas and (length_of(case) or 0) > int(canvas[1]):
        return None
    return 0.0 if name in ZERO_IF_FAILED or name.startswith("ladder") else None


@lru_cache(maxsize=16)
def _draws(clusters: int, seed: int, resamples: int) -> Float[np.ndarray, "resamples clusters"]:
    """How often each cluster is drawn in each resample."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(float)


def bootstrap_mean(
    values: Sequence[int | float | None],
    clusters: Sequence[Hashable],
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """Mean and interval (95 %, or another level), by resampling whole clusters with replacement.

    Args:
        values: None where a case has no value; it is left out.
        clusters: the cluster of each value.
    """
    kept = [
        (float(value), cluster) for value, cluster in zip(values, clusters, strict=True) if value is not None
    ]
    # sorted, so that the order of the file does not matter
    index = {cluster: i for i, cluster in enumerate(sorted({c for _, c in kept}, key=str))}
    estimate: Estimate = {"mean": None, "low": None, "high": None, "n": len(kept), "subjects": len(index)}
    if not kept:
        return estimate
    where = np.array([index[cluster] for _, cluster in kept])
    sums = np.bincount(where, weights=np.array([value for value, _ in kept]))
    sizes = np.bincount(where).astype(float)
    estimate["mean"] = _rounded(sums.sum() / sizes.sum())
    if len(index) > 1:
        drawn = _draws(len(index), seed, resamples)
        bounds = np.quantile((drawn @ sums) / (drawn @ sizes), [0.5 - level / 2, 0.5 + level / 2])
        estimate["low"], estimate["high"] = map(_rounded, bounds)
    return estimate


def _rounded(value: float) -> float:
    """Without the last digits, that depend on the order of summing, and without a negative zero."""
    return round(float(value), DIGITS) + 0.0


def median(values: Iterable[float | None]) -> Median:
    """Of the values that are there."""
    numbers = [value for value in values if value is not None]
    quartiles = [_rounded(q) for q in np.quantile(numbers, [0.25, 0.5, 0.75])] if numbers else [None] * 3
    return {"median": quartiles[1], "q25": quartiles[0], "q75": quartiles[2], "n": len(numbers)}


def by_length(
    run: Run, values: Sequence[float | None], seed: int = 0, resamples: int = 2000
) -> dict[str, Estimate]:
    """Means of one column by length of the target, shortest first."""
    lengths = [length_of(case) for case in run.cases]
    result = {}
    for length in sorted({n for n in lengths if n is not None}):
        at = [i for i, n in enumerate(lengths) if n == length]
        result[str(length)] = bootstrap_mean(
            [values[i] for i in at], [subject_of(run.cases[i]) for i in at], seed, resamples
        )
    return {length: estimate for length, estimate in result.items() if estimate["n"]}


def summary(run: Run, seed: int = 0, resamples: int = 2000) -> Summary:
    """All numbers of one run."""
    table = columns(run)
    subjects = [subject_of(case) for case in run.cases]
    bad = [case for case in run.cases if failed(case)]
    done = [case for case in run.cases if not failed(case)]
    skipped = run.header.get("dataset", {}).get("skipped", [])
    return {
        "file": run.path.name,
        "model": run.model,
        "method": run.method,
        "schedule": run.schedule,
        "cases": len(run.cases),
        "subjects": len(set(subjects)),
        "failed": len(bad),
        "errors": _counted([case.get("error") or "no result" for case in bad]),
        "skipped": _counted([entry.get("reason") or "no reason given" for entry in skipped]),
        "measures": {
            name: bootstrap_mean(values, subjects, seed, resamples) for name, values in table.items()
        },
        "success_by_length": by_length(run, table["success"], seed, resamples) if "success" in table else {},
        "cost": {
            "edit_seconds": median(case.get("time", {}).get("edit_seconds") for case in done),
            "forwards": median(case.get("edit", {}).get("forwards") for case in done),
            "steps": median(case.get("edit", {}).get("steps") for case in done),
            **_further_costs(done),
        },
        "header": run.header,
    }


def _further_costs(cases: Sequence[CaseRecord]) -> dict[str, Median]:
    """Costs that only newer files have."""
    edits, times = [case.get("edit", {}) for case in cases], [case.get("time", {}) for case in cases]
    costs = {
        "layer_passes": median(edit.get("layer_passes") for edit in edits),
        "stored_bytes": median(edit.get("stored_bytes") for edit in edits),
        "edit_peak_bytes": median(time.get("edit_peak_bytes") for time in times),
    }
    return {name: value for name, value in costs.items() if value["n"]}


def _counted(reasons: Sequence[object]) -> dict[str, int]:
    return dict(sorted(Counter(map(str, reasons)).items(), key=lambda pair: (-pair[1], pair[0])))


def paired(first: Run, second: Run, seed: int = 0, resamples: int = 2000) -> Pair:
    """Differences, first minus second, on the cases that both runs have (same case_id and target)."""
    where = {key_of(case): i for i, case in enumerate(second.cases)}
    at = [(i, where[key_of(case)]) for i, case in enumerate(first.cases) if key_of(case) in where]
    shared = Run(first.path, first.header, [first.cases[i] for i, _ in at])
    subjects = [subject_of(case) for case in shared.cases]
    tables = columns(first), columns(second)
    both = [name for name in PAIRED if all(name in table for table in tables)]
    values = {name: _minus(tables[0][name], tables[1][name], at) for name in both}
    measures = {name: bootstrap_mean(column, subjects, seed, resamples) for name, column in values.items()}
    lengths = by_length(shared, values["success"], seed, resamples) if "success" in values else {}
    return {
        "shared": len(at),
        "measures": {name: _difference(estimate) for name, estimate in measures.items() if estimate["n"]},
        "success_by_length": {length: _difference(estimate) for length, estimate in lengths.items()},
    }


def _difference(estimate: Estimate) -> Difference:
    return {**estimate, "verdict": verdict(estimate)}


def _minus(
    first: Sequence[float | None], second: Sequence[float | None], at: Sequence[tuple[int, int]]
) -> list[float | None]:
    return [None if (a := first[i]) is None or (b := second[j]) is None else a - b for i, j in at]


def verdict(estimate: Estimate) -> str:
    """`no difference seen` where the interval holds 0, else which run is higher; `too few subjects` where
    there is no interval.
    """
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return "too few subjects"
    return "no difference seen" if low <= 0 <= high else "first higher" if low > 0 else "second higher"


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run, no two alike: what two runs share is told apart by their files, then by their
    place.
    """
    names = [run.name for run in runs]
    names = [f"{name} ({run.path.stem})" if names.count(name) > 1 else name for name, run in zip(names, runs)]
    return [
        f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def all_pairs(
    runs: Sequence[Run],
    names: Sequence[str],
    seed: int = 0,
    resamples: int = 2000,
    against: str | Path | None = None,
) -> list[NamedPair]:
    """Paired differences of every two runs, or of every run with one.

    Args:
        against: the run that the others are held against (others minus this one): its name, its file, or the
            file's name without the ending.

    Raises:
        DataError: where no run, or more than one, is called that.
    """
    named = list(zip(names, runs))
    pairs = list(combinations(named, 2))
    if against is not None:
        matching = [
            (n, run) for n, run in named if str(against) in (n, run.name, run.path.stem, str(run.path))
        ]
        if len(matching) != 1:
            given = f"{len(matching)} runs are called {str(against)!r}"
            raise DataError(f"{given}: give one of {', '.join(names)}, or its file")
        pairs = [(other, matching[0]) for other in named if other[1] is not matching[0][1]]
    return [
        {"first": a, "second": b, **paired(run, other, seed, resamples)} for (a, run), (b, other) in pairs
    ]
