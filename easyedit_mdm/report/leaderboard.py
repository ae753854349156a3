"""The leaderboard's table, page and picture, from summaries of run files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from easyedit_mdm.common.files import write_text
from easyedit_mdm.report.compare import show, show_median
from easyedit_mdm.report.figures import (
    INK,
    MARKERS,
    SERIES,
    SOFT,
    dressed,
    legend,
    new_figure,
    rendered,
    save,
    svg,
)
from easyedit_mdm.report.summaries import Median, Summary
from easyedit_mdm.version import __version__

# measures of the table; `*`: masked models alone
MEASURES = {
    "success": "success",
    "success_one_step": "in one step",
    "ladder.remasked": "remasked",
    "every_decoding": "every decoding",
    "rephrase_exact": "paraphrase",
    "locality_kept": "locality",
    "portability_exact": "portability",
    "success_before": "unedited",
}
COSTS = {
    "edit_seconds": "seconds",
    "layer_passes": "layer-passes",
    "edit_peak_bytes": "peak MB",
    "stored_bytes": "stored kB",
}
NONE: Median = {"median": None, "q25": None, "q75": None, "n": 0}
UNITS = {"edit_peak_bytes": 1e6, "stored_bytes": 1e3}


class Left(TypedDict):
    """What was not run, and why."""

    model: str
    method: str
    what: str
    why: str


@dataclass(frozen=True)
class Entry:
    """A row: one method on one model and data set, edited in one way.

    Attributes:
        setting: what was chosen of the settings that were tried; empty for the file that ships.
    """

    model: str
    dataset: str
    mode: str
    method: str
    summary: Summary
    setting: dict[str, Any]

    def cells(self) -> list[str]:
        """The row's figures, as the table shows them."""
        measures, cost = self.summary["measures"], self.summary["cost"]
        shown = [show(measures[name]) if name in measures else "–" for name in MEASURES]
        for name in COSTS:
            estimate = cost.get(name, NONE)
            scale = UNITS.get(name, 1.0)
            shown.append(
                show_median({**estimate, "median": estimate["median"] / scale, "q25": None, "q75": None})
                if estimate["median"] is not None
                else "–"
            )
        return shown

    def record(self) -> dict[str, Any]:
        """As `leaderboard.json` holds it."""
        kept = ("cases", "subjects", "failed", "errors", "measures", "success_by_length", "cost")
        figures = {key: value for key, value in self.summary.items() if key in kept}
        named = {"model": self.model, "dataset": self.dataset, "mode": self.mode, "method": self.method}
        return {**named, "setting": self.setting, **figures}


def write_board(entries: Sequence[Entry], left: Sequence[Left], about: dict[str, Any], folder: Path) -> Path:
    """leaderboard.json, .csv, .md, .html and the picture; returns the page."""
    board = {
        "version": __version__,
        **about,
        "entries": [entry.record() for entry in entries],
        "left_out": list(left),
    }
    write_text(folder / "leaderboard.json", json.dumps(board, separators=(",", ":"), sort_keys=True) + "\n")
    write_text(folder / "leaderboard.csv", _csv(entries))
    write_text(folder / "leaderboard.md", _markdown(entries, left, about))
    inline = ""
    if entries:
        figure = pareto(entries)
        inline = svg(figure, "leaderboard")
        save(figure, folder / "leaderboard")
    page = rendered(
        "leaderboard.html", version=__version__, about=about, tables=tables(entries), left=left,
        figure=inline, heads=heads(), lengths=length_tables(entries),
    )  # fmt: skip
    write_text(folder / "leaderboard.html", page, errors="backslashreplace")
    return folder / "leaderboard.html"


def heads() -> list[str]:
    """Of the table's columns."""
    return ["method", "cases", *MEASURES.values(), *COSTS.values(), "setting"]


def tables(entries: Sequence[Entry]) -> dict[str, list[list[str]]]:
    """The rows of each model, data set and mode, most success first."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(f"{entry.model}, {entry.dataset}, {entry.mode}", []).append(entry)
    return {
        title: [
            [e.method, str(e.summary["cases"]), *e.cells(), _said(e.setting)]
            for e in sorted(some, key=_order)
        ]
        for title, some in groups.items()
    }


def _order(entry: Entry) -> tuple[float, float, str]:
    return -_mean(entry, "success"), -_mean(entry, "locality_kept"), entry.method


def _mean(entry: Entry, name: str) -> float:
    estimate = entry.summary["measures"].get(name)
    return 0.0 if estimate is None or estimate["mean"] is None else float(estimate["mean"])


def _said(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in setting.items()) or "as shipped"


def length_tables(entries: Sequence[Entry]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Success by tokens of the target, of edits one at a time."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.mode == "single":
            groups.setdefault(f"{entry.model}, {entry.dataset}", []).append(entry)
    result = {}
    for title, some in groups.items():
        lengths = sorted({int(n) for e in some for n in e.summary["success_by_length"]})
        rows = []
        for entry in sorted(some, key=_order):
            known = entry.summary["success_by_length"]
            rows.append([entry.method, *(show(known[str(n)]) if str(n) in known else "–" for n in lengths)])
        result[title] = (["method", *(f"N = {n}" for n in lengths)], rows)
    return result


def pareto(entries: Sequence[Entry]) -> Any:
    """Success against locality, and against seconds an edit: a panel each for every model, edits one at a
    time; means over data sets.
    """
    models = list(dict.fromkeys(entry.model for entry in entries))
    methods = list(dict.fromkeys(entry.method for entry in entries))
    figure = new_figure(figsize=(8.4, 0.8 + 3.0 * len(models)))
    grid = figure.subplots(len(models), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for (left, right), model in zip(grid, models):
        dressed(left, f"{model}: locality and success")
        dressed(right, f"{model}: seconds an edit and success")
        for i, method in enumerate(methods):
            some = [e for e in entries if (e.model, e.method) == (model, method) and e.mode == "single"]
            some = some or [e for e in entries if (e.model, e.method) == (model, method)]
            if not some:
                continue
            success, locality = (
                sum(_mean(e, n) for e in some) / len(some) for n in ("success", "locality_kept")
            )
            seconds = [s for e in some if (s := e.summary["cost"]["edit_seconds"]["median"]) is not None]
            look = {
                "color": SERIES[i % len(SERIES)],
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": "none",
            }
            handles[method] = left.plot([locality], [success], **look)[0]
            if seconds:
                right.plot([sum(seconds) / len(seconds)], [success], **look)
        right.set_xscale("log")
        for axes in (left, right):
            axes.set_ylim(-0.03, 1.03)
            axes.grid(color=SOFT, alpha=0.2, linewidth=0.7)
        left.set_xlim(-0.03, 1.03)
    for axes, name in zip(grid[-1], ("locality", "seconds")):
        axes.set_xlabel(name, color=INK, fontsize=9)
    legend(figure, list(handles.values()), list(handles), 8)
    return figure


def _csv(entries: Sequence[Entry]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["model", "dataset", "mode", "method", "cases", "measure", "mean", "low", "high", "n"])
    for e in entries:
        for name in MEASURES:
            if name in e.summary["measures"]:
                estimate = e.summary["measures"][name]
                figures = [estimate["mean"], estimate["low"], estimate["high"], estimate["n"]]
                writer.writerow([e.model, e.dataset, e.mode, e.method, e.summary["cases"], name, *figures])
        for name in COSTS:
            median = e.summary["cost"].get(name, NONE)
            figures = [median["median"], median["q25"], median["q75"], median["n"]]
            writer.writerow([e.model, e.dataset, e.mode, e.method, e.summary["cases"], name, *figures])
    return stream.getvalue()


def _markdown(entries: Sequence[Entry], left: Sequence[Left], about: dict[str, Any]) -> str:
    parts = [f"# Leaderboard: {about['suite']}", ""]
    for title, rows in tables(entries).items():
        parts += [f"## {title}", "", *_table(heads(), rows), ""]
    for title, (names, rows) in length_tables(entries).items():
        parts += [f"## Success by target length: {title}", "", *_table(names, rows), ""]
    if left:
        parts += [
            "## Not run",
            "",
            *_table(list(left[0]), [[str(v) for v in one.values()] for one in left]),
            "",
        ]
    return "\n".join(parts)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        """A row of the table."""
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "\\n") for cell in cells) + " |"

    return [line(names), line(["---"] * len(names)), *map(line, rows)]
