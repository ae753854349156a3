"""The committed run files of the study, with means and paired differences, clustered by subject."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cost import with_cost
from study import APART, ARMS, RESULTS

from easyedit_mdm.report.summaries import bootstrap_mean

MODELS = ("twin-llama", "twin-llada", "twin-qwen", "twin-dream")
FAMILIES = (("twin-llama", "twin-llada"), ("twin-qwen", "twin-dream"))
MASKED = tuple(masked for _, masked in FAMILIES)
METHODS = ("ROME_MDM", "MEMIT_MDM")
LENGTHS = range(1, 9)
# what a failed optimisation counts as nothing in
ZERO_IF_FAILED = ("exact", "one_step_exact", "paraphrase", "first_commit", "one_step")

Line = dict[str, Any]
Keep = Callable[[int], bool]


def several(n: int) -> bool:
    """The lengths that claims are about: targets of more than one token."""
    return n > 1


class Runs:
    """The run files, each read once.

    `one_step` has two meanings in a run file. In a masked model's it is the share of the target's tokens
    that are right when all are committed at once. It keeps that name, with `one_step_exact` (all of them
    are) beside it. In an autoregressive model's it is teacher-forced accuracy: it is called
    `teacher_forced` here. The lines of masked models also say what they cost: see cost.py.
    """

    def __init__(self, folder: Path = RESULTS):
        self.folder = folder
        self._read: dict[tuple[str, str], list[Line]] = {}
        self._series: dict[tuple[str, str, str], list[Line]] = {}

    def lines(self, command: str, model: str, known: bool = True) -> list[Line]:
        """The lines of a command, by default of facts that the model knew before; [] if it was not run."""
        if (command, model) not in self._read:
            path = self.folder / f"{command}-{model}.jsonl"
            texts = path.read_text().splitlines()[1:] if path.exists() else []
            found = [_named(json.loads(text), model in MASKED) for text in texts]
            costed = model in MASKED and command in ("run", "best", "ablate")
            self._read[command, model] = with_cost(found, command, model, METHODS) if costed else found
        rows = self._read[command, model]
        return [row for row in rows if row["known"]] if known else rows

    def series(self, model: str, method: str, arm: str) -> list[Line]:
        """One arm on the test split."""
        key = (model, method, arm)
        if key not in self._series:
            rows = self.lines("best" if arm == "best" else "run", model)
            self._series[key] = [row for row in rows if (row["method"], row["arm"]) == (method, arm)]
        return self._series[key]

    def arms(self, model: str, method: str) -> list[str]:
        """The arms that a model was run with on the test split, but for the null control."""
        return [arm for arm in (*ARMS, APART, "best") if self.series(model, method, arm)]


def _named(row: Line, masked: bool) -> Line:
    if "one_step" in row:
        if masked:
            row["one_step_exact"] = row["one_step"] == 1.0
        else:
            row["teacher_forced"] = row.pop("one_step")
    return row


def value(line: Line, measure: str) -> float | None:
    """One measure of one edit; a failed optimisation succeeded in nothing."""
    found = line.get(measure)
    if found is None:
        return 0.0 if "error" in line and measure in ZERO_IF_FAILED else None
    return float(found)


def estimate(rows: Sequence[Line], measure: str) -> Line:
    """Mean and 95 % interval, clustered by subject."""
    return bootstrap_mean([value(row, measure) for row in rows], [row["subject"] for row in rows])


def mean(rows: Sequence[Line], measure: str) -> float | None:
    """Mean alone."""
    found = [x for row in rows if (x := value(row, measure)) is not None]
    return sum(found) / len(found) if found else None


def paired(
    first: Sequence[Line],
    second: Sequence[Line],
    measure: str = "exact",
    other: str | None = None,
    keep: Keep = several,
) -> Line:
    """First minus second on the cases (subject, length) that both have, lengths that `keep` holds for.

    Args:
        measure: of the first.
        other: of the second; by default the same.
    """
    theirs = {(row["subject"], row["n_tokens"]): value(row, other or measure) for row in second}
    ours = [row for row in first if keep(row["n_tokens"])]
    pairs = [
        (value(row, measure), theirs.get((row["subject"], row["n_tokens"])), row["subject"]) for row in ours
    ]
    both = [(a - b, subject) for a, b, subject in pairs if a is not None and b is not None]
    return bootstrap_mean([difference for difference, _ in both], [subject for _, subject in both])


def of_length(rows: Sequence[Line], n: int) -> list[Line]:
    """The edits to a target of n tokens."""
    return [row for row in rows if row["n_tokens"] == n]


def longer(rows: Sequence[Line]) -> list[Line]:
    """The edits to targets of more than one token."""
    return [row for row in rows if several(row["n_tokens"])]


def verdict(e: Line) -> str:
    """Yes, no or undecided, by PROTOCOL.md."""
    if e["low"] is None:
        return "-"
    if e["low"] > 0 and e["mean"] >= 0.05:
        return "yes"
    return "no" if e["low"] > -0.05 and e["high"] < 0.05 else "undecided"


def told(e: Line, digits: int = 2, signed: bool = False) -> str:
    """`0.95 [0.93, 0.97]`, or `-` where there is nothing."""
    if e["mean"] is None:
        return "-"
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    low, high = ("-" if e[key] is None else form.format(e[key]) for key in ("low", "high"))
    return f"{form.format(e['mean'])} [{low}, {high}]"


def difference(e: Line, digits: int = 3) -> str:
    """`+0.076 [+0.049, +0.105]`."""
    return told(e, digits, signed=True)


def plain_number(x: float | None, digits: int = 2) -> str:
    """`0.95`, or `-`."""
    return "-" if x is None else f"{x:.{digits}f}"


def whole(x: float | None) -> str:
    """`1,250`, or `-`."""
    return "-" if x is None else f"{x:,.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"
