"""What `easyedit-mdm compare` does: put run files side by side, as text, table, JSON and one self-contained
page.

Every mean stands with its n and a 95 % interval. Whatever a run file does not hold is left out of the report,
never an error.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyedit_mdm.common.files import explained, write_text
from easyedit_mdm.errors import DataError, HyperParameterError
from easyedit_mdm.evaluation.records import RUNGS, CaseRecord, Denoising, Run, read_run, scores
from easyedit_mdm.report.figures import (
    DASHES,
    HATCHES,
    INK,
    MARKERS,
    SERIES,
    SOFT,
    dressed,
    legend,
    new_figure,
    rendered,
    short,
    spans,
    svg,
)
from easyedit_mdm.report.summaries import (
    PAIRED,
    SCORES,
    Difference,
    Estimate,
    Interval,
    Median,
    NamedPair,
    Summary,
    all_pairs,
    failed,
    key_of,
    length_of,
    names_of,
    summary,
)
from easyedit_mdm.version import __version__

MEASURES = {
    "success": "success",
    "success_one_step": "success, one step",
    "token_acc": "token accuracy",
    "first_commit": "first commit right",
    "rephrase_exact": "paraphrase exact",
    "locality_kept": "locality kept",
    "portability_exact": "portability exact",
    "mirage_gap": "mirage gap",
    "mirage_gap_exact": "mirage gap, version 1",
    "success_before": "right before the edit",
}
EXTRAS = {
    **{f"sum.{s}": f"{s} (log-probabilities summed)" for s in SCORES},
    **{f"per_token.{s}": f"{s} (log-probabilities per token)" for s in SCORES},
    **{f"bound.sum.{s}": f"{s} (any-order bound, summed)" for s in SCORES},
    **{f"bound.per_token.{s}": f"{s} (any-order bound, per token)" for s in SCORES},
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
    (
        "Success: all tokens of the target are right after decoding N masks in N steps (autoregressive: N"
        " greedy tokens). One step: all masks committed at once. A failed case counts 0 in success, token"
        " accuracy, first commit, paraphrase, portability and the ladder. It is left out of locality, mirage"
        " gap and cost."
    ),
    (
        "In brackets: 95 % bootstrap intervals that resample subjects. They are too narrow with fewer than "
        "about ten subjects, and have no width where all values are alike."
    ),
    (
        "Mirage gap: token accuracy when teacher-forced, minus token accuracy when decoded, both from left to"
        " right. Files of version 1 hold another one: exact when teacher-forced (masked: in any order), minus"
        " exact in context. Cost: medians of the edits that did not fail."
    ),
    (
        "A masked model's likelihoods are bounds. They stand in rows of their own, apart from autoregressive "
        "ones."
    ),
    (
        "Paired differences are first minus second on the cases that both runs have. One interval in twenty "
        "misses 0 by chance: the more pairs, the more of these."
    ),
)

Cell = str | int | Estimate | None
Rows = tuple[list[str], list[list[Cell]]]
# tokens, steps and confidences of the slots
Slots = tuple[list[str], list[int | None], list[float | None]]


class NamedSummary(Summary):
    """The numbers of one run, and what it is called."""

    name: str


class Report(TypedDict):
    """What `report.json` holds."""

    version: str
    seed: int
    resamples: int
    confidence: float
    notes: list[str]
    runs: list[NamedSummary]
    pairs: list[NamedPair]


def compare(
    paths: Sequence[str | Path],
    out: str | Path,
    seed: int = 0,
    resamples: int = 2000,
    against: str | Path | None = None,
) -> Report:
    """Compare run files; writes `report.md`, `report.csv`, `report.json` and `report.html` into `out`.

    Args:
        paths: run files of `easyedit-mdm bench`.
        seed, resamples: of the bootstrap.
        against: the run that all others are held against, by name or file. A file that is not among `paths`
            is added. By default every two runs are compared.

    Raises:
        DataError: without paths, for a broken file, or where `against` is none of the runs. Nothing is
            written.
        HyperParameterError: for less than one resample.
        MissingPackageError: where matplotlib or jinja2 is not installed.
    """
    if not paths:
        raise DataError("no run files to compare: give at least one that `easyedit-mdm bench` wrote")
    if resamples < 1:
        raise HyperParameterError(f"resamples {resamples}: give at least 1, 2000 is usual")
    files = [Path(path) for path in paths]
    if against is not None and Path(against).is_file():
        against = Path(against)
        files += [against] if against not in files else []
    runs = [read_run(path) for path in files]
    names = names_of(runs)
    report: Report = {
        "version": __version__,
        "seed": seed,
        "resamples": resamples,
        "confidence": 0.95,
        "notes": list(NOTES),
        "runs": [{"name": name, **summary(run, seed, resamples)} for name, run in zip(names, runs)],
        "pairs": all_pairs(runs, names, seed, resamples, against),
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
        write_text(
            folder / name, text, errors="backslashreplace"
        )  # lone surrogates can come out of JSON, and cannot be written as they are
    _print_pairs(report, folder)
    return report


def show(estimate: Interval | None) -> str:
    """`0.75 [0.60, 0.88]`, `0.75` where there is no interval, a dash where there is no value; a difference
    with its sign.
    """
    if estimate is None or estimate["mean"] is None:
        return "–"
    return f"{middle(estimate)} {bounds(estimate)}".rstrip()


def middle(estimate: Interval) -> str:
    """The mean; a difference has a sign and a digit more, so that its interval is not rounded onto 0."""
    mean = estimate["mean"]
    return "–" if mean is None else f"{mean:+.3f}" if "verdict" in estimate else f"{mean:.2f}"


def bounds(estimate: Interval) -> str:
    """`[0.60, 0.88]`, or nothing where there is no interval."""
    digits = 3 if "verdict" in estimate else 2
    return "" if estimate["low"] is None else f"[{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def show_median(estimate: Median) -> str:
    """The median: counts and large ones without decimals, others with three digits, a dash where there is
    none.
    """
    value = estimate["median"]
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:#.3g}"


def words(pair: NamedPair, difference: Difference) -> str:
    """The verdict on a difference with the run's name in it."""
    higher = {"first higher": f"{pair['first']} higher", "second higher": f"{pair['second']} higher"}
    return higher.get(difference["verdict"], difference["verdict"])


def _present(report: Report, names: Iterable[str]) -> list[str]:
    """Of `names` those measures that at least one run has a value for."""
    measured = {name for run in report["runs"] for name, estimate in run["measures"].items() if estimate["n"]}
    return [name for name in names if name in measured]


def _rungs(report: Report) -> list[str]:
    """The ladder's rungs that some run has: the known ones in their order, then any others."""
    names = [name for run in report["runs"] for name in run["measures"]]
    rungs = [name.removeprefix("ladder.") for name in names if name.startswith("ladder.")]
    return [name for name in RUNGS if name in rungs] + sorted(set(rungs) - set(RUNGS))


def _rung_title(rung: str) -> str:
    """`canvas16` -> `canvas 16`."""
    return re.sub(r"(?<=[a-z])(?=\d)", " ", rung.replace("_", " "))


def _beside(report: Report) -> dict[str, str]:
    """Measures that stand beside the ladder, with their titles; sections of locality only where there are
    several.
    """
    columns = {
        name: MEASURES[name]
        for name in _present(report, ("success", "rephrase_exact", "locality_kept", "portability_exact"))
    }
    sections = sorted(
        {name for run in report["runs"] for name in run["measures"] if name.startswith("locality_kept.")}
    )
    columns |= {name: "same subject kept" for name in _present(report, ("same_subject_kept",))}
    return columns | (
        {name: f"kept: {name.partition('.')[2]}" for name in sections} if len(sections) > 1 else {}
    )


def _lengths(report: Report) -> list[int]:
    return sorted({int(length) for run in report["runs"] for length in run["success_by_length"]})


# the tables, once for Markdown and the page


def _main_table(report: Report) -> Rows:
    """Heads and rows."""
    runs = report["runs"]
    measures = _present(report, MEASURES)
    cost = [name for name in COST if any(run["cost"][name]["n"] for run in runs)]
    heads = ["run", "cases", "subjects", "failed", *(MEASURES[m] for m in measures), *(COST[c] for c in cost)]
    rows: list[list[Cell]] = []
    for run in runs:
        cells = [*(run["measures"].get(m) for m in measures), *(show_median(run["cost"][c]) for c in cost)]
        rows.append([run["name"], run["cases"], run["subjects"], run["failed"], *cells])
    return heads, rows


def _length_table(report: Report) -> Rows:
    lengths = _lengths(report)
    heads = ["run", *(f"N = {length}" for length in lengths)]
    cells = [[run["success_by_length"].get(str(length)) for length in lengths] for run in report["runs"]]
    return heads, [[run["name"], *row] for run, row in zip(report["runs"], cells)]


def _ladder_table(report: Report) -> Rows:
    named = {f"ladder.{rung}": _rung_title(rung) for rung in _rungs(report)}
    named |= {name: title for name, title in _beside(report).items() if name != "success"}
    return _turned("share", named, report)


def _extra_table(report: Report) -> Rows:
    return _turned("measure", {name: EXTRAS[name] for name in _present(report, EXTRAS)}, report)


def _turned(head: str, named: dict[str, str], report: Report) -> Rows:
    """A row a measure, a column a run."""
    rows: list[list[Cell]] = [
        [title, *(run["measures"].get(name) for run in report["runs"])] for name, title in named.items()
    ]
    return [head, *(run["name"] for run in report["runs"])], rows


def _pair_table(report: Report) -> Rows:
    heads = ["first", "second", "shared cases", "measure", "first minus second", "in words"]
    rows: list[list[Cell]] = []
    for pair in report["pairs"]:
        start: list[Cell] = [pair["first"], pair["second"], pair["shared"]]
        estimates = [(MEASURES[name], pair["measures"][name]) for name in PAIRED if name in pair["measures"]]
        estimates += [
            (f"success, N = {length}", estimate) for length, estimate in pair["success_by_length"].items()
        ]
        rows += [[*start, title, estimate, words(pair, estimate)] for title, estimate in estimates]
        if not estimates:
            reason = "no shared cases" if not pair["shared"] else "nothing measured in both"
            rows.append([*start, "–", None, reason])
    return heads, rows


class Setting(TypedDict):
    """A setting, its value in every run, and whether the runs differ in it."""

    key: str
    values: list[str]
    differs: bool


def _settings_table(report: Report) -> list[Setting]:
    flat = [_flattened(run["header"]) for run in report["runs"]]
    values = {key: [part.get(key, "–") for part in flat] for settings in flat for key in settings}
    return [{"key": key, "values": row, "differs": len(set(row)) > 1} for key, row in values.items()]


def _flattened(value: object, name: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    items = [(f"{name}.{key}" if name else str(key), part) for key, part in value.items()]
    shown = [(path, part) for path, part in items if path not in ("header", "label", "dataset.skipped")]
    return {key: text for path, part in shown for key, text in _flattened(part, path).items()}


def _sections(report: Report) -> list[tuple[str, Rows]]:
    tables = [
        ("Overall", _main_table(report)),
        ("Success by length of the target", _length_table(report)),
        ("Ladder of honesty, paraphrase and locality", _ladder_table(report)),
        ("Likelihoods, partly revealed targets, side effects", _extra_table(report)),
        ("Paired differences", _pair_table(report)),
    ]
    return [(title, (heads, rows)) for title, (heads, rows) in tables if rows and len(heads) > 1]


# report.csv and report.md


def _csv(report: Report) -> str:
    """Every number in one long table; `low` and `high` are the interval of a mean and the quartiles of a
    median.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    heads = "run against model method schedule measure length statistic value low high n subjects"
    writer.writerow(heads.split())
    for run in report["runs"]:
        start = (run["name"], "", run["model"], run["method"], run["schedule"])
        writer.writerows(_csv_rows((*start,), "mean", run["measures"], run["success_by_length"]))
        for name, cost in run["cost"].items():
            writer.writerow(
                (*start, name, "", "median", cost["median"], cost["q25"], cost["q75"], cost["n"], "")
            )
        for name, count in (("cases", run["cases"]), ("failed", run["failed"])):
            writer.writerow((*start, name, "", "count", count, "", "", run["cases"], run["subjects"]))
    for pair in report["pairs"]:
        start = (pair["first"], pair["second"], "", "", "")
        writer.writerows(_csv_rows(start, "mean difference", pair["measures"], pair["success_by_length"]))
    return stream.getvalue()


def _csv_rows(
    start: tuple[str | None, ...],
    statistic: str,
    measures: Mapping[str, Estimate],
    lengths: Mapping[str, Estimate],
) -> list[tuple[str | int | float | None, ...]]:
    rows = [(name, "", e) for name, e in measures.items()]
    rows += [("success", length, e) for length, e in lengths.items()]
    numbers = [(e["mean"], e["low"], e["high"], e["n"], e["subjects"]) for _, _, e in rows]
    return [(*start, name, length, statistic, *row) for (name, length, _), row in zip(rows, numbers)]


def _markdown(report: Report) -> str:
    lines = [
        "# Edits compared",
        "",
        f"easyedit_mdm {report['version']}, {report['resamples']} resamples, seed {report['seed']}",
        "",
    ]
    for title, (heads, rows) in _sections(report):
        lines += [
            f"## {title}",
            "",
            *_markdown_table(heads, [[_markdown_cell(cell) for cell in row] for row in rows]),
            "",
        ]
    lines += [f"- {note}" for note in report["notes"]]
    settings = [[row["key"], *row["values"]] for row in _settings_table(report) if row["differs"]]
    if settings:
        heads = ["setting", *(run["name"] for run in report["runs"])]
        texts = [[_markdown_text(cell) for cell in row] for row in settings]
        lines += ["", "## Settings in which the runs differ", "", *_markdown_table(heads, texts)]
    runs = report["runs"]
    lines += _reasons("Failed cases", [(run["name"], run["errors"]) for run in runs])
    lines += _reasons("Records left out of the data set", [(run["name"], run["skipped"]) for run in runs])
    return "\n".join(lines) + "\n"


def _reasons(title: str, counted: Sequence[tuple[str, dict[str, int]]]) -> list[str]:
    rows = [
        [_markdown_text(name), str(count), _markdown_text(reason)]
        for name, reasons in counted
        for reason, count in reasons.items()
    ]
    return ["", f"## {title}", "", *_markdown_table(["run", "count", "reason"], rows)] if rows else []


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(row) + " |"
        for row in ([_markdown_text(head) for head in heads], ["---"] * len(heads), *rows)
    ]


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, dict):
        return f"{_markdown_text(show(cell))}, n {cell['n']}"
    return "–" if cell is None else _markdown_text(str(cell))


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


# the figures


def length_figure(report: Report) -> str:
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
        at = [
            int(length) + (place - (len(drawn) - 1) / 2) * min(0.09, 0.6 / len(drawn))
            for length in run["success_by_length"]
        ]
        look = {
            "color": SERIES[i % len(SERIES)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
        }
        handles.append(
            axes.errorbar(
                at,
                [e["mean"] for e in estimates],
                spans(estimates),
                capsize=3,
                elinewidth=1,
                markersize=6,
                clip_on=False,
                **look,
            )
        )
    axes.set(xticks=lengths, xlim=(lengths[0] - 0.5, lengths[-1] + 0.5), ylim=(0, 1))
    axes.set_xlabel("tokens of the target, N", color=INK)
    axes.grid(axis="y", color=SOFT, alpha=0.25, linewidth=0.7)
    legend(figure, handles, [short(run["name"]) for _, run in drawn], 7.6)
    return svg(figure, "length")


def ladder_figure(report: Report) -> str:
    """Bars of the ladder of honesty; paraphrase and locality beside it, on the same scale. Empty where there
    is neither.
    """
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


def _bars(axes: Any, runs: Sequence[NamedSummary], rows: dict[str, str]) -> list[Any]:
    """Horizontal bars with their values, so that a share of 0 is not taken for one that is missing."""
    thick = 0.82 / len(runs)
    handles = []
    for i, run in enumerate(runs):
        bars = [
            (place, e)
            for place, name in enumerate(rows)
            if (e := run["measures"].get(name)) and e["mean"] is not None
        ]
        at = [place + (i - (len(runs) - 1) / 2) * thick for place, _ in bars]
        look = {
            "color": SERIES[i % len(SERIES)],
            "hatch": HATCHES[i % len(HATCHES)],
            "edgecolor": INK,
            "linewidth": 0.6,
        }
        if not bars:  # still in the legend
            handles.append(axes.barh([0], [0], 0, **look))
            continue
        reaches = spans([e for _, e in bars])
        whiskers = {"ecolor": INK, "capsize": 2, "elinewidth": 0.9}
        handles.append(
            axes.barh(at, [e["mean"] for _, e in bars], thick * 0.92, xerr=reaches, error_kw=whiskers, **look)
        )
        for y, (_, estimate), reach in zip(at, bars, reaches[1]):
            mean = estimate["mean"] or 0.0
            axes.text(mean + reach + 0.015, y, f"{mean:.2f}", color=INK, fontsize=7, va="center")
    return handles


# the pages of cases, and the whole page


class CasePage(TypedDict, total=False):
    """What the page's script shows of a case.

    `runs`: a list for each run that has it, [number of the run, right (1, 0 or None), text before, text
    after, error, denoising before, denoising after].
    """

    id: int | str
    subject: str
    prompt: str
    target: str
    n: int | None
    runs: list[list[Any]]


class CasePages(TypedDict):
    """Names of the runs, and all cases."""

    runs: list[str]
    cases: list[CasePage]


def case_pages(runs: Sequence[Run], names: Sequence[str]) -> CasePages:
    """The cases of all runs, each once."""
    pages: dict[tuple[int | str, str], CasePage] = {}
    for i, run in enumerate(runs):
        for case in run.cases:
            new: CasePage = {"id": case["case_id"], "target": str(case.get("target_new", "–")), "runs": []}
            page = pages.setdefault(key_of(case), new)
            page.setdefault("n", length_of(case))
            page.setdefault("subject", str(case.get("subject") or "–"))
            page.setdefault("prompt", str(case.get("prompt") or "–"))
            page["runs"].append([i, *_outcome(case)])
    return {"runs": list(names), "cases": list(pages.values())}


def _outcome(case: CaseRecord) -> list[Any]:
    judged = case.get("pre", {}), case.get("post", {})
    before, after = (scores(part.get("multi_step", {}).get("rewrite")) for part in judged)
    right = None if failed(case) or not after or "exact" not in after[0] else int(after[0]["exact"])
    texts = [scored[0].get("text") if scored else None for scored in (before, after)]
    error = str(case.get("error") or "no result") if failed(case) else None
    history = case.get("history", {})
    return [right, *texts, error, *(_denoising(history.get(when, {})) for when in ("pre", "post"))]


def _denoising(history: Denoising) -> Slots | None:
    tokens = history.get("tokens")
    if not tokens:
        return None
    padding: list[None] = [None] * len(tokens)
    sure = [value if value is None else round(value, 3) for value in history.get("confidence", [])]
    return tokens, [*history.get("step", []), *padding][: len(tokens)], [*sure, *padding][: len(tokens)]


def _html(report: Report, pages: CasePages) -> str:
    return rendered(
        "report.html",
        report=report,
        tables=dict(_sections(report)),
        bounds=bounds,
        middle=middle,
        paired={
            "Measures": (
                "measures",
                {
                    name: MEASURES[name]
                    for name in PAIRED
                    if any(name in pair["measures"] for pair in report["pairs"])
                },
            ),
            "Success by length of the target": (
                "success_by_length",
                {str(length): f"N = {length}" for length in _lengths(report)},
            ),
        },
        figures={"length": length_figure(report), "ladder": ladder_figure(report)},
        settings=_settings_table(report),
        pages=pages,
    )


def _print_pairs(report: Report, folder: Path) -> None:
    heads, rows = _main_table(report)
    # runs side by side: their names may fold, the numbers under them should not
    table = Table(title=f"{len(rows)} runs, 95 % intervals over subjects ({report['resamples']} resamples)")
    for i, head in enumerate(["", *(run["name"] for run in report["runs"])]):
        table.add_column(escape(head), justify="right" if i else "left", overflow="fold")
    for head, *cells in list(zip(heads, *rows))[1:]:
        table.add_row(head, *[str(cell) if isinstance(cell, str | int) else show(cell) for cell in cells])
    console = Console()
    console.print(table)
    for pair in report["pairs"]:
        if "success" in pair["measures"]:
            estimate = pair["measures"]["success"]
            console.print(
                escape(
                    f"success, {pair['first']} minus {pair['second']}: {show(estimate)}, n {estimate['n']}:"
                    f" {words(pair, estimate)}"
                )
            )
    console.print(f"{folder / 'report.html'}, report.md, report.csv and report.json written", markup=False)
