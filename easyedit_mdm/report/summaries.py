"""Numbers of run files: reading them, one row of figures a case, means with intervals, paired differences.

Intervals are 95 % bootstrap intervals that resample subjects, not cases: prompts about one subject stand or fall together. Each
interval starts from the same seed, so it does not depend on what else is in the comparison.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from easyedit_mdm.errors import DataError

Estimate = dict[str, float | int | None]
Columns = dict[str, list[float | None]]

# from the most generous reading of an edit to the strictest use of it
RUNGS = (
    "teacher_forced", "one_step", "multi_step", "canvas8", "canvas16", "canvas32", "steps_half", "steps_1", "random", "left_to_right", "in_context",
)  # fmt: skip
PAIRED = ("success", "token_acc", "first_commit", "rephrase_exact", "locality_kept", "portability_exact", "mirage_gap")
SCORES = ("ES", "PS", "NS", "EM", "PM", "NM")
# a failed case never reached its target; what it would have kept or cost is unknown
ZERO_IF_FAILED = ("success", "token_acc", "first_commit", "rephrase_exact", "portability_exact")
DIGITS = 6


@dataclass(frozen=True)
class Run:
    """One run file: where it was, its header, and its cases in the order of the file."""

    path: Path
    header: dict[str, Any]
    cases: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The header's label, or model, method and schedule."""
        parts = (self.header.get("label"), " ".join(str(p) for p in self.parts.values() if p), self.path.stem)
        return next(str(p) for p in parts if p)

    @property
    def parts(self) -> dict[str, Any]:
        """Model, method and schedule, None where the header does not say."""
        return {
            "model": dig(self.header, "model", "name"),
            "method": self.header.get("alg_name"),
            "schedule": dig(self.header, "hparams", "state_schedule"),
        }


def read_run(path: str | Path) -> Run:
    """Read a run file as `easyedit-mdm bench` writes it.

    Raises:
        DataError: for a file that cannot be read, a line that is no JSON object, a header that is missing or comes twice, a
            case without an id, or two cases with the same one; it names the file, the line and what to do.
    """
    path = Path(path)
    try:
        raw = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a run file that `easyedit-mdm bench` wrote") from None
    lines = [(number, line) for number, line in enumerate(raw, 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}, line 1: the file is empty, not even the header was written: start the run again")
    records = [(number, _record(path, number, line, last=number == lines[-1][0])) for number, line in lines]
    (number, header), *rest = records
    if header.get("header") is not True:
        raise DataError(f'{path}, line {number}: the header (an object with "header": true) is missing: give a file that `easyedit-mdm bench` wrote')
    _check_cases(path, rest)
    return Run(path, header, [case for _, case in rest])


def _record(path: Path, number: int, line: bytes, last: bool) -> dict[str, Any]:
    try:
        # NaN and infinities are no figures; None is how a missing one reads
        record = json.loads(line.decode("utf-8"), parse_constant=lambda _: None, parse_float=_finite)
    except ValueError:
        if last and number > 1:
            raise DataError(f"{path}, line {number}: the last line is half-written: finish the run with --resume") from None
        cure = "start the run again" if number == 1 else "delete this line and finish the run with --resume"
        raise DataError(f"{path}, line {number}: not JSON: {cure}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: not a JSON object: delete this line and finish the run with --resume")
    return record


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _check_cases(path: Path, records: Sequence[tuple[int, dict[str, Any]]]) -> None:
    seen: dict[int | str, int] = {}
    for number, case in records:
        if case.get("header"):
            raise DataError(f"{path}, line {number}: a second header: two runs were written into one file; split it here, one file a run")
        name = case.get("case_id")
        if not isinstance(name, int | str):
            raise DataError(f"{path}, line {number}: no case_id: delete this line and finish the run with --resume")
        if name in seen:
            raise DataError(f"{path}, line {number}: case_id {name!r} was already in line {seen[name]}: delete one of the two lines")
        seen[name] = number


def dig(record: Any, *keys: str) -> Any:
    """What lies under nested keys, None where any of them is missing."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def number(value: Any) -> float | None:
    """A finite number or truth value as a float, None for anything else."""
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None


def failed(case: dict[str, Any]) -> bool:
    """Whether the case ended in an error, or has no result."""
    return case.get("error") is not None or not isinstance(case.get("post"), dict)


def subject_of(case: dict[str, Any]) -> str:
    """What the case is resampled by: its subject; a case that names none stands alone."""
    subject = case.get("subject")
    return f"case {case['case_id']}" if subject is None else f"subject {subject}"


def length_of(case: dict[str, Any]) -> int | None:
    """Tokens of the target, None where the file does not say."""
    found = (case.get("n_tokens"), dig(case, "post", "multi_step", "rewrite", "n_tokens"))
    return next((int(n) for n in found if isinstance(n, int)), None)


def key_of(case: dict[str, Any]) -> tuple[int | str, str]:
    """What makes cases of two runs the same one."""
    return case["case_id"], str(case.get("target_new"))


def scores(part: Any) -> list[dict[str, Any]]:
    """The scores of a section: one, a list of them, or lists by name, as one flat list."""
    if isinstance(part, list):
        return [s for entry in part for s in scores(entry)]
    if not isinstance(part, dict):
        return []
    return [part] if "token_acc" in part or "exact" in part else [s for entry in part.values() for s in scores(entry)]


def _mean(values: Sequence[Any]) -> float | None:
    found = [x for value in values if (x := number(value)) is not None]
    return sum(found) / len(found) if found else None


def case_figures(case: dict[str, Any]) -> dict[str, float | None]:
    """Every figure of one case that did not fail, None where the file has none."""
    post = case["post"]
    parts = {name: scores(dig(post, "multi_step", name)) for name in ("rewrite", "rephrase", "portability")}
    kept = dig(post, "locality_kept")
    kept = kept if isinstance(kept, dict) else {}
    ladder = dig(post, "ladder")
    rungs = {name: rung for name, rung in ladder.items() if isinstance(rung, dict)} if isinstance(ladder, dict) else {}
    return {
        "success": _mean([s.get("exact") for s in parts["rewrite"]]),
        "token_acc": _mean([s.get("token_acc") for s in parts["rewrite"]]),
        "first_commit": _mean([s.get("first_commit") for s in parts["rewrite"]]),
        "rephrase_exact": _mean([s.get("exact") for s in parts["rephrase"]]),
        "portability_exact": _mean([s.get("exact") for s in parts["portability"]]),
        "locality_kept": _mean(list(kept.values())),
        **{f"locality_kept.{name}": number(share) for name, share in kept.items()},
        "same_subject_kept": number(post.get("same_subject_kept")),
        "mirage_gap": _gap(post, rungs),
        "success_before": _mean([s.get("exact") for s in scores(dig(case, "pre", "multi_step", "rewrite"))]),
        **{f"ladder.{name}": number(rung.get("exact")) for name, rung in rungs.items()},
        **{f"ladder_token_acc.{name}": number(rung.get("token_acc")) for name, rung in rungs.items()},
        **_extras(case, post),
    }


def _extras(case: dict[str, Any], post: dict[str, Any]) -> dict[str, float | None]:
    """Likelihoods, success given k tokens, where the first wrong token was committed, and what the edit did to text in general."""
    given = dig(post, "given_k")
    found = {f"{kind}.{name}": number(dig(post, "counterfact", kind, name)) for kind in ("sum", "per_token") for name in SCORES}
    found |= {f"given_k.{k}": number(x) for k, x in enumerate(given if isinstance(given, list) else [])}
    found["first_wrong_step"] = number(dig(post, "first_wrong", "step"))
    for name, part in (("with_statement_acc", post), ("with_statement_acc_before", case.get("pre"))):
        found[name] = _mean([s.get("token_acc") for s in scores(dig(part, "multi_step", "with_statement"))])
    for name, key in (("fluency", "ngram_entropy"), ("perplexity", "value")):
        after, before = number(dig(post, name, key)), number(dig(case, "pre", name, key))
        found[f"{name}_ratio"] = after / before if after is not None and before else None
    return found


def _gap(post: dict[str, Any], rungs: dict[str, Any]) -> float | None:
    own = number(post.get("mirage_gap"))
    first, last = (number(dig(rungs, name, "exact")) for name in (RUNGS[0], RUNGS[-1]))
    return own if own is not None else None if first is None or last is None else first - last


def columns(run: Run) -> Columns:
    """The figures of all cases by name, each as long as the run; a failed case is 0 wherever it should have reached its target."""
    rows = [None if failed(case) else case_figures(case) for case in run.cases]
    names = list(dict.fromkeys(name for row in rows if row is not None for name, value in row.items() if value is not None))
    names = ["success"] if rows and all(row is None for row in rows) else names
    return {name: [_if_failed(name, case) if row is None else row.get(name) for case, row in zip(run.cases, rows)] for name in names}


def _if_failed(name: str, case: dict[str, Any]) -> float | None:
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


def bootstrap_mean(values: Sequence[int | float | None], clusters: Sequence[Hashable], seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean and 95 % interval, by resampling whole clusters with replacement.

    Args:
        values: None where a case has no value; it is left out.
        clusters: the cluster of each value.

    Returns:
        `{"mean", "low", "high", "n", "subjects"}`: `mean` None without values, `low` and `high` None with fewer than two clusters.
    """
    kept = [(float(value), cluster) for value, cluster in zip(values, clusters, strict=True) if value is not None]
    # sorted, so that the order of the file does not matter
    index = {cluster: i for i, cluster in enumerate(sorted({c for _, c in kept}, key=str))}
    found: Estimate = {"mean": None, "low": None, "high": None, "n": len(kept), "subjects": len(index)}
    if not kept:
        return found
    where = np.array([index[cluster] for _, cluster in kept])
    sums = np.bincount(where, weights=np.array([value for value, _ in kept]))
    sizes = np.bincount(where).astype(float)
    found["mean"] = _rounded(sums.sum() / sizes.sum())
    if len(index) > 1:
        drawn = _draws(len(index), seed, resamples)
        low, high = np.quantile((drawn @ sums) / (drawn @ sizes), [0.025, 0.975])
        found |= {"low": _rounded(low), "high": _rounded(high)}
    return found


def _rounded(value: float) -> float:
    """Without the last digits, that depend on the order of summing, and without a negative zero."""
    return round(float(value), DIGITS) + 0.0


def median(values: Sequence[float | None]) -> Estimate:
    """`{"median", "q25", "q75", "n"}` of the values that are there."""
    found = [value for value in values if value is not None]
    quartiles = [_rounded(q) for q in np.quantile(found, [0.25, 0.5, 0.75])] if found else [None] * 3
    return {"median": quartiles[1], "q25": quartiles[0], "q75": quartiles[2], "n": len(found)}


def by_length(run: Run, values: Sequence[float | None], seed: int = 0, resamples: int = 2000) -> dict[str, Estimate]:
    """Means of one column by length of the target, shortest first."""
    lengths = [length_of(case) for case in run.cases]
    result = {}
    for length in sorted({n for n in lengths if n is not None}):
        at = [i for i, n in enumerate(lengths) if n == length]
        result[str(length)] = bootstrap_mean([values[i] for i in at], [subject_of(run.cases[i]) for i in at], seed, resamples)
    return {length: estimate for length, estimate in result.items() if estimate["n"]}


def summary(run: Run, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """All numbers of one run.

    Returns:
        `{"file", "model", "method", "schedule", "cases", "subjects", "failed", "errors": {message: count}, "skipped": {reason: count},
        "measures": {name: Estimate}, "success_by_length": {N: Estimate}, "cost": {name: median}, "header"}`; a measure that no
        case has is absent.
    """
    table = columns(run)
    subjects = [subject_of(case) for case in run.cases]
    bad = [case for case in run.cases if failed(case)]
    done = [case for case in run.cases if not failed(case)]
    skipped = dig(run.header, "dataset", "skipped")
    cost = {"edit_seconds": ("time", "edit_seconds"), "forwards": ("edit", "forwards"), "steps": ("edit", "steps")}
    return {
        "file": run.path.name,
        **run.parts,
        "cases": len(run.cases),
        "subjects": len(set(subjects)),
        "failed": len(bad),
        "errors": _counted([case.get("error") or "no result" for case in bad]),
        "skipped": _counted([dig(entry, "reason") or "no reason given" for entry in skipped] if isinstance(skipped, list) else []),
        "measures": {name: bootstrap_mean(values, subjects, seed, resamples) for name, values in table.items()},
        "success_by_length": by_length(run, table["success"], seed, resamples) if "success" in table else {},
        "cost": {name: median([number(dig(case, *keys)) for case in done]) for name, keys in cost.items()},
        "header": run.header,
    }


def _counted(reasons: Sequence[Any]) -> dict[str, int]:
    return dict(sorted(Counter(map(str, reasons)).items(), key=lambda pair: (-pair[1], pair[0])))


def paired(first: Run, second: Run, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Differences, first minus second, on the cases that both runs have (same case_id and target).

    Returns:
        `{"shared", "measures": {name: Estimate}, "success_by_length": {N: Estimate}}`; `n` counts the shared cases where both runs
        have the measure.
    """
    where = {key_of(case): i for i, case in enumerate(second.cases)}
    at = [(i, where[key_of(case)]) for i, case in enumerate(first.cases) if key_of(case) in where]
    shared = Run(first.path, first.header, [first.cases[i] for i, _ in at])
    subjects = [subject_of(case) for case in shared.cases]
    tables = columns(first), columns(second)
    differences = {name: _minus(tables[0][name], tables[1][name], at) for name in PAIRED if all(name in table for table in tables)}
    measures = {name: bootstrap_mean(values, subjects, seed, resamples) for name, values in differences.items()}
    return {
        "shared": len(at),
        "measures": {name: {**estimate, "verdict": verdict(estimate)} for name, estimate in measures.items() if estimate["n"]},
        "success_by_length": {
            length: {**estimate, "verdict": verdict(estimate)}
            for length, estimate in by_length(shared, differences.get("success", [None] * len(at)), seed, resamples).items()
        },
    }


def _minus(first: Sequence[float | None], second: Sequence[float | None], at: Sequence[tuple[int, int]]) -> list[float | None]:
    return [None if (a := first[i]) is None or (b := second[j]) is None else a - b for i, j in at]


def verdict(estimate: Estimate) -> str:
    """`no difference seen` where the interval holds 0, else which run is higher; `too few subjects` where there is no interval."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return "too few subjects"
    return "no difference seen" if low <= 0 <= high else "first higher" if low > 0 else "second higher"


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run, no two alike: what two runs share is told apart by their files, then by their place."""
    names = [run.name for run in runs]
    names = [f"{name} ({run.path.stem})" if names.count(name) > 1 else name for name, run in zip(names, runs)]
    return [f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def all_pairs(runs: Sequence[Run], names: Sequence[str], seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """`paired` for every two runs, with their names as `first` and `second`."""
    found = combinations(zip(names, runs), 2)
    return [{"first": a, "second": b, **paired(run, other, seed, resamples)} for (a, run), (b, other) in found]
