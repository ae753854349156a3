"""What a run says when it ends."""

from __future__ import annotations

import shlex
from pathlib import Path

from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.compare import MEASURES, show
from easyedit_mdm.report.summaries import summary

TOLD = ("success", "success_one_step", "rephrase_exact", "locality_kept")


def summary_lines(path: str | Path, resamples: int = 2000) -> list[str]:
    """A run file in a few lines: its figures with 95 % intervals, what failed and why, and the next command.

    Raises:
        DataError: for a file that cannot be read.
    """
    path = Path(path)
    figures = summary(read_run(path), resamples=resamples)
    lines = [f"{figures['cases']} cases, {figures['subjects']} subjects, {figures['failed']} failed"]
    measured = [(MEASURES[name], figures["measures"][name]) for name in TOLD if name in figures["measures"]]
    lines += [f"{title}: {show(estimate)}, n {estimate['n']}" for title, estimate in measured]
    lines += [f"failed, {count} times: {reason}" for reason, count in figures["errors"].items()]
    lines += [
        f"left out of the data set, {count} times: {reason}" for reason, count in figures["skipped"].items()
    ]
    files = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"{path.stem}-report")))
    return [*lines, f"written: {path}", f"next: easyedit-mdm compare {files[0]} --out {files[1]}"]
