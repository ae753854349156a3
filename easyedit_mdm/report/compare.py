"""What `easyedit-mdm compare` does: put run files side by side, as text, table, JSON and one self-contained page.

Every mean stands with its n and a 95 % interval. Whatever a run file does not hold is left out of the report, never an error.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyedit_mdm.common.files import explained, write_text
from easyedit_mdm.errors import DataError, HyperParameterError
from easyedit_mdm.report.figures import DASHES, HATCHES, INK, MARKERS, SERIES, SOFT, dressed, legend, new_figure, rendered, short, spans, svg
from easyedit_mdm.report.summaries import (
    PAIRED,
    RUNGS,
    SCORES,
    Run,
    all_pairs,
    dig,
    failed,
    key_of,
    length_of,
    names_of,
    number,
    read_run,
    scores,
    summary,
)
from easyedit_mdm.version import __version__

MEASURES = {
    "success": "success",
    "token_acc": "token accuracy",
    "first_commit": "first commit right",
    "rephrase_exact": "paraphrase exact",
    "locality_kept": "locality kept",
    "portability_exact": "portability exact",
    "mirage_gap": "mirage gap",
    "success_before": "right before the edit",
}
EXTRAS = {
    **{f"sum.{s}": f"{s} (log-probabilities summed)" for s in SCORES},
    **{f"per_token.{s}": f"{s} (per token)" for s in SCORES},
    **{f"given_k.{k}": f"exact, given {k} right token{'s' if k > 1 else ''}" for k in range(1, 8)},
    "first_wrong_step": "step of the first wrong token (where there is one; the first is 0)",
    "same_subject_kept": "same subject kept",
    "with_statement_acc": "neighbours right after the edit is said (token accuracy)",
    "with_statement_acc_before": "the same before the edit",
    "fluency_ratio": "n-gram entropy, after / before",
    "perplexity_ratio": "perplexity of held-out text, after / before",
}
COST = {"edit_seconds": "seconds an edit", "forwards": "forwards an edit"}
NOTES = (
    "Success: all tokens of the target are right after multi-step denoising. A failed case counts 0 in success, token accuracy, first commit, "
    "paraphrase, portability and the ladder, and is left out of locality, mirage gap and cost.",
    "In brackets: 95 % bootstrap intervals that resample subjects. They are too narrow with fewer than about ten subjects, and have no width where "
    "all values are alike.",
    "Mirage gap: exact when teacher-forced minus exact in context. Cost: medians of the edits that did not fail.",
    "Paired differences are first minus second on the cases that both runs have. One interval in twenty misses 0 by chance: "
    "the more pairs, the more of these.",
)


def compare(paths: Sequence[str | Path], out: str | Path, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Compare run files; writes `report.md`, `report.csv`, `report.json` and `report.html` into `out`.

    Args:
        paths: run files of `easyedit-mdm bench`.
        seed, resamples: of the bootstrap.

    Returns:
        what `report.json` holds: `{"version", "seed", "resamples", "confidence", "notes", "runs": [summary], "pairs": [paired]}`.

    Raises:
        DataError: without paths, or for a broken file; nothing is written then.
        HyperParameterError: for less than one resample.
        MissingPackageError: where matplotlib or jinja2 is not installed.
    """
    if not paths:
        raise DataError("no run files to compare: give at least one that `easyedit-mdm bench` wrote")
    if resamples < 1:
        raise HyperParameterError(f"resamples {resamples}: give at least 1, 2000 is usual")
    runs = [read_run(path) for path in paths]
    names = names_of(runs)
    report = {
        "version": __version__,
        "seed": seed,
        "resamples": resamples,
        "confidence": 0.95,
        "notes": list(NOTES),
        "runs": [{"name": name, **summary(run, seed, resamples)} for name, run in zip(names, runs)],
        "pairs": all_pairs(runs, names, seed, resamples),
    }
    texts = {
        "report.json": json.dumps(report, indent=1) + "\n",
        "report.csv": _csv(report),
        "report.md": _markdown(report),
        "report.html": _html(report, case_pages(runs, names)),
    }
    folder = Path(out)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text, errors="backslashreplace")  # lone surrogates can come out of JSON, and cannot be written as they are
    _tell(report, folder)
    return report


def show(estimate: dict[str, Any] | None) -> str:
    """`0.75 [0.60, 0.88]`, `0.75` where there is no interval, a dash where there is no value; a difference with its sign."""
    if estimate is None or estimate["mean"] is None:
        return "–"
    return f"{middle(estimate)} {bounds(estimate)}".rstrip()


def middle(estimate: dict[str, Any]) -> str:
    """The mean; a difference has a sign and a digit more, so that its interval is not rounded onto 0."""
    return "–" if estimate["mean"] is None else f"{estimate['mean']:+.3f}" if "verdict" in estimate else f"{estimate['mean']:.2f}"


def bounds(estimate: dict[str, Any]) -> str:
    """`[0.60, 0.88]`, or nothing where there is no interval."""
    digits = 3 if "verdict" in estimate else 2
    return "" if estimate["low"] is None else f"[{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def show_median(estimate: dict[str, Any]) -> str:
    """The median: counts and large ones without decimals, others with three digits, a dash where there is none."""
    value = estimate["median"]
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:#.3g}"


def words(pair: dict[str, Any], estimate: dict[str, Any]) -> str:
    """The verdict on a difference with the run's name in it."""
    return {"first higher": f"{pair['first']} higher", "second higher": f"{pair['second']} higher"}.get(estimate["verdict"], estimate["verdict"])


def _present(report: dict[str, Any], names: Sequence[str], part: str = "measures", key: str = "n") -> list[str]:
    """Of `names` those that at least one run has a value for."""
    return [name for name in names if any(run[part].get(name, {key: 0})[key] for run in report["runs"])]


def _rungs(report: dict[str, Any]) -> list[str]:
    """The ladder's rungs that some run has: the known ones in their order, then any others."""
    found = [name.removeprefix("ladder.") for run in report["runs"] for name in run["measures"] if name.startswith("ladder.")]
    return [name for name in RUNGS if name in found] + sorted(set(found) - set(RUNGS))


def _rung_title(rung: str) -> str:
    """`canvas16` -> `canvas 16`."""
    return re.sub(r"(?<=[a-z])(?=\d)", " ", rung.replace("_", " "))


def _beside(report: dict[str, Any]) -> dict[str, str]:
    """Measures that stand beside the ladder, with their titles; sections of locality only where there are several."""
    found = {name: MEASURES[name] for name in _present(report, ("success", "rephrase_exact", "locality_kept", "portability_exact"))}
    sections = sorted({name for run in report["runs"] for name in run["measures"] if name.startswith("locality_kept.")})
    found |= {name: "same subject kept" for name in _present(report, ("same_subject_kept",))}
    return found | ({name: f"kept: {name.partition('.')[2]}" for name in sections} if len(sections) > 1 else {})


def _lengths(report: dict[str, Any]) -> list[int]:
    return sorted({int(length) for run in report["runs"] for length in run["success_by_length"]})


# the tables, once for Markdown and the page


def _main_table(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows; a cell is a text, a number or an Estimate."""
    measures, cost = _present(report, list(MEASURES)), _present(report, list(COST), "cost")
    heads = ["run", "cases", "subjects", "failed", *(MEASURES[m] for m in measures), *(COST[c] for c in cost)]
    rows = [
        [
            run["name"],
            run["cases"],
            run["subjects"],
            run["failed"],
            *(run["measures"].get(m) for m in measures),
            *(show_median(run["cost"][c]) for c in cost),
        ]
        for run in report["runs"]
    ]
    return heads, rows


def _length_table(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    lengths = _lengths(report)
    heads = ["run", *(f"N = {length}" for length in lengths)]
    return heads, [[run["name"], *(run["success_by_length"].get(str(length)) for length in lengths)] for run in report["runs"]]


def _ladder_table(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rungs, beside = _rungs(report), _beside(report)
    rows = [[_rung_title(rung), *(run["measures"].get(f"ladder.{rung}") for run in report["runs"])] for rung in rungs]
    rows += [[title, *(run["measures"].get(name) for run in report["runs"])] for name, title in beside.items() if name != "success"]
    return ["share", *(run["name"] for run in report["runs"])], rows


def _extra_table(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = [[EXTRAS[name], *(run["measures"].get(name) for run in report["runs"])] for name in _present(report, list(EXTRAS))]
    return ["measure", *(run["name"] for run in report["runs"])], rows


def _pair_table(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    heads = ["first", "second", "shared cases", "measure", "first minus second", "in words"]
    rows: list[list[Any]] = []
    for pair in report["pairs"]:
        start = [pair["first"], pair["second"], pair["shared"]]
        found = [(MEASURES[name], pair["measures"][name]) for name in PAIRED if name in pair["measures"]]
        found += [(f"success, N = {length}", estimate) for length, estimate in pair["success_by_length"].items()]
        rows += [[*start, title, estimate, words(pair, estimate)] for title, estimate in found]
        if not found:
            rows.append([*start, "–", None, "no shared cases" if not pair["shared"] else "nothing measured in both"])
    return heads, rows


def _settings_table(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a setting: its name, its value in every run, and whether the runs differ in it."""
    flat = [_flattened(run["header"]) for run in report["runs"]]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [{"key": key, "values": [settings.get(key, "–") for settings in flat]} for key in keys]
    return [{**row, "differs": len(set(row["values"])) > 1} for row in rows]


def _flattened(value: Any, name: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    items = [(f"{name}.{key}" if name else str(key), part) for key, part in value.items()]
    return {key: text for path, part in items if path not in ("header", "label", "dataset.skipped") for key, text in _flattened(part, path).items()}


def _sections(report: dict[str, Any]) -> list[tuple[str, tuple[list[str], list[list[Any]]]]]:
    found = [
        ("Overall", _main_table(report)),
        ("Success by length of the target", _length_table(report)),
        ("Ladder of honesty, paraphrase and locality", _ladder_table(report)),
        ("Likelihoods, partly revealed targets, side effects", _extra_table(report)),
        ("Paired differences", _pair_table(report)),
    ]
    return [(title, (heads, rows)) for title, (heads, rows) in found if rows and len(heads) > 1]


# report.csv and report.md


def _csv(report: dict[str, Any]) -> str:
    """Every number in one long table; `low` and `high` are the interval of a mean and the quartiles of a median."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("run", "against", "model", "method", "schedule", "measure", "length", "statistic", "value", "low", "high", "n", "subjects"))
    for run in report["runs"]:
        start = (run["name"], "", run["model"], run["method"], run["schedule"])
        _write_estimates(writer, start, "mean", run["measures"], run["success_by_length"])
        for name, cost in run["cost"].items():
            writer.writerow((*start, name, "", "median", cost["median"], cost["q25"], cost["q75"], cost["n"], ""))
        for name in ("cases", "failed"):
            writer.writerow((*start, name, "", "count", run[name], "", "", run["cases"], run["subjects"]))
    for pair in report["pairs"]:
        _write_estimates(writer, (pair["first"], pair["second"], "", "", ""), "mean difference", pair["measures"], pair["success_by_length"])
    return stream.getvalue()


def _write_estimates(writer: Any, start: tuple, statistic: str, measures: dict[str, Any], lengths: dict[str, Any]) -> None:
    rows = [(name, "", estimate) for name, estimate in measures.items()] + [("success", length, estimate) for length, estimate in lengths.items()]
    for name, length, estimate in rows:
        writer.writerow((*start, name, length, statistic, *(estimate[key] for key in ("mean", "low", "high", "n", "subjects"))))


def _markdown(report: dict[str, Any]) -> str:
    lines = ["# Edits compared", "", f"easyedit_mdm {report['version']}, {report['resamples']} resamples, seed {report['seed']}", ""]
    for title, (heads, rows) in _sections(report):
        lines += [f"## {title}", "", *_markdown_table(heads, [[_markdown_cell(cell) for cell in row] for row in rows]), ""]
    lines += [f"- {note}" for note in report["notes"]]
    settings = [[row["key"], *row["values"]] for row in _settings_table(report) if row["differs"]]
    if settings:
        heads = ["setting", *(run["name"] for run in report["runs"])]
        lines += ["", "## Settings in which the runs differ", "", *_markdown_table(heads, [[_markdown_text(c) for c in row] for row in settings])]
    for title, key in (("Failed cases", "errors"), ("Records left out of the data set", "skipped")):
        rows = [[_markdown_text(run["name"]), str(count), _markdown_text(reason)] for run in report["runs"] for reason, count in run[key].items()]
        lines += ["", f"## {title}", "", *_markdown_table(["run", "count", "reason"], rows)] if rows else []
    return "\n".join(lines) + "\n"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in ([_markdown_text(head) for head in heads], ["---"] * len(heads), *rows)]


def _markdown_cell(cell: Any) -> str:
    if isinstance(cell, dict):
        return f"{_markdown_text(show(cell))}, n {cell['n']}"
    return "–" if cell is None else _markdown_text(str(cell))


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


# the figures


def length_figure(report: dict[str, Any]) -> str:
    """Success against the length of the target, one line a run; empty where no run has lengths."""
    lengths = _lengths(report)
    if not lengths:
        return ""
    figure = new_figure(figsize=(7.6, 3.9 + 0.16 * len(report["runs"])))
    axes = figure.add_subplot()
    dressed(axes, "share of cases, 95 % interval")
    drawn = [(i, run) for i, run in enumerate(report["runs"]) if run["success_by_length"]]
    handles = []
    for place, (i, run) in enumerate(drawn):
        estimates = list(run["success_by_length"].values())
        # side by side, so that whiskers do not hide each other
        at = [int(length) + (place - (len(drawn) - 1) / 2) * min(0.09, 0.6 / len(drawn)) for length in run["success_by_length"]]
        look = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        handles.append(
            axes.errorbar(at, [e["mean"] for e in estimates], spans(estimates), capsize=3, elinewidth=1, markersize=6, clip_on=False, **look)
        )
    axes.set(xticks=lengths, xlim=(lengths[0] - 0.5, lengths[-1] + 0.5), ylim=(0, 1))
    axes.set_xlabel("tokens of the target, N", color=INK)
    axes.grid(axis="y", color=SOFT, alpha=0.25, linewidth=0.7)
    legend(figure, handles, [short(run["name"]) for _, run in drawn], 7.6)
    return svg(figure, "length")


def ladder_figure(report: dict[str, Any]) -> str:
    """Bars of the ladder of honesty; paraphrase and locality beside it, on the same scale. Empty where there is neither."""
    groups = [
        ("ladder of honesty: share exact", {f"ladder.{rung}": _rung_title(rung) for rung in _rungs(report)}),
        ("success, paraphrase, locality", _beside(report)),
    ]
    groups = [(title, rows) for title, rows in groups if rows]
    if not groups:
        return ""
    most, runs = max(len(rows) for _, rows in groups), len(report["runs"])
    width = 5.2 * len(groups)
    figure = new_figure(figsize=(width, 0.9 + 0.2 * runs + most * (0.17 * runs + 0.12)))
    for axes, (title, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        handles = _bars(axes, report["runs"], rows)
        dressed(axes, title)
        axes.set(xlim=(0, 1.16), ylim=(most - 0.5, -0.5), xticks=[0, 0.25, 0.5, 0.75, 1])
        axes.set_yticks(range(len(rows)), [short(text) for text in rows.values()])
    legend(figure, handles, [short(run["name"]) for run in report["runs"]], width)
    return svg(figure, "ladder")


def _bars(axes: Any, runs: Sequence[dict[str, Any]], rows: dict[str, str]) -> list[Any]:
    """Horizontal bars with their values, so that a share of 0 is not taken for one that is missing."""
    thick = 0.82 / len(runs)
    handles = []
    for i, run in enumerate(runs):
        found = [(place, e) for place, name in enumerate(rows) if (e := run["measures"].get(name)) and e["mean"] is not None]
        at = [place + (i - (len(runs) - 1) / 2) * thick for place, _ in found]
        look = {"color": SERIES[i % len(SERIES)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": INK, "linewidth": 0.6}
        if not found:  # still in the legend
            handles.append(axes.barh([0], [0], 0, **look))
            continue
        reaches = spans([e for _, e in found])
        whiskers = {"ecolor": INK, "capsize": 2, "elinewidth": 0.9}
        handles.append(axes.barh(at, [e["mean"] for _, e in found], thick * 0.92, xerr=reaches, error_kw=whiskers, **look))
        for y, (_, estimate), reach in zip(at, found, reaches[1]):
            axes.text(estimate["mean"] + reach + 0.015, y, f"{estimate['mean']:.2f}", color=INK, fontsize=7, va="center")
    return handles


# the pages of cases, and the whole page


def case_pages(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """What the page's script shows of each case.

    Returns:
        `{"runs": names, "cases": [{"id", "subject", "prompt", "target", "n", "runs": [[run, right, before, after, error, before's
        denoising, after's denoising]]}]}`; a denoising is `[tokens, steps, confidences]` or None.
    """
    pages: dict[tuple[int | str, str], dict[str, Any]] = {}
    for i, run in enumerate(runs):
        for case in run.cases:
            page = pages.setdefault(key_of(case), {"id": case["case_id"], "target": str(case.get("target_new", "–")), "runs": []})
            page.setdefault("n", length_of(case))
            for name in ("subject", "prompt"):
                page.setdefault(name, str(case.get(name) or "–"))
            page["runs"].append([i, *_outcome(case)])
    return {"runs": list(names), "cases": list(pages.values())}


def _outcome(case: dict[str, Any]) -> list[Any]:
    written = [next((s.get("text") for s in scores(dig(case, when, "multi_step", "rewrite"))), None) for when in ("pre", "post")]
    right = None if failed(case) else next((number(s.get("exact")) for s in scores(dig(case, "post", "multi_step", "rewrite"))), None)
    error = str(case.get("error") or "no result") if failed(case) else None
    texts = [None if text is None else str(text) for text in written]
    return [right, *texts, error, *(_denoising(dig(case, "history", when)) for when in ("pre", "post"))]


def _denoising(history: Any) -> list[list[Any]] | None:
    tokens = dig(history, "tokens")
    if not isinstance(tokens, list) or not tokens:
        return None
    steps, sure = (list(part) if isinstance(part := dig(history, name), list) else [] for name in ("step", "confidence"))
    steps = [int(x) if (x := number(step)) is not None else None for step in steps]
    sure = [round(x, 3) if (x := number(value)) is not None else None for value in sure]
    padding: list[None] = [None] * len(tokens)
    return [[str(token) for token in tokens], (steps + padding)[: len(tokens)], (sure + padding)[: len(tokens)]]


def _html(report: dict[str, Any], pages: dict[str, Any]) -> str:
    return rendered(
        "report.html",
        report=report,
        tables=dict(_sections(report)),
        bounds=bounds,
        middle=middle,
        paired={
            "Measures": ("measures", {name: MEASURES[name] for name in PAIRED if any(name in pair["measures"] for pair in report["pairs"])}),
            "Success by length of the target": ("success_by_length", {str(length): f"N = {length}" for length in _lengths(report)}),
        },
        figures={"length": length_figure(report), "ladder": ladder_figure(report)},
        settings=_settings_table(report),
        pages=pages,
    )


def _tell(report: dict[str, Any], folder: Path) -> None:
    heads, rows = _main_table(report)
    # runs side by side: their names may fold, the numbers under them should not
    table = Table(title=f"{len(rows)} runs, 95 % intervals over subjects ({report['resamples']} resamples)")
    for i, head in enumerate(["", *(row[0] for row in rows)]):
        table.add_column(escape(head), justify="right" if i else "left", overflow="fold")
    for head, *cells in list(zip(heads, *rows))[1:]:
        table.add_row(head, *[show(cell) if cell is None or isinstance(cell, dict) else str(cell) for cell in cells])
    console = Console()
    console.print(table)
    for pair in report["pairs"]:
        if "success" in pair["measures"]:
            estimate = pair["measures"]["success"]
            console.print(escape(f"success, {pair['first']} minus {pair['second']}: {show(estimate)}, n {estimate['n']}: {words(pair, estimate)}"))
    console.print(f"{folder / 'report.html'}, report.md, report.csv and report.json written", markup=False)
