"""What `easyedit-mdm sweep` does: edit the same cases at every layer (and window of layers), and hold it
against the trace.

Settings are ranked by CounterFact's score (Meng et al., arXiv 2210.07229, section 5.1): the harmonic mean of
success, paraphrase success and locality. Windows are contiguous, as in the sweep that chose LLaDA's layers
(arXiv 2606.03924). That tracing need not predict where editing works was found by Hase et al. (arXiv
2301.04213); here both are measured on the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, TypedDict, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyedit_mdm.common.files import write_text
from easyedit_mdm.common.locks import only_writer
from easyedit_mdm.data.cases import Loaded, load_cases
from easyedit_mdm.editing import METHODS, MethodHyperParams
from easyedit_mdm.errors import DataError, HyperParameterError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.models import Adapter
from easyedit_mdm.report.compare import middle, show
from easyedit_mdm.report.figures import (
    DASHES,
    INK,
    MARKERS,
    SERIES,
    SOFT,
    dressed,
    legend,
    new_figure,
    rendered,
    save,
    spans,
    svg,
)
from easyedit_mdm.report.summaries import Estimate, Interval, summary
from easyedit_mdm.runs.methods import load_ours, ours
from easyedit_mdm.runs.run import BenchConfig, header_of, judge_of, run_cases
from easyedit_mdm.tracing import KINDS, TraceConfig, TracedFact, check_known, trace_facts
from easyedit_mdm.tracing.averages import rank_correlation
from easyedit_mdm.tracing.figures import TITLES
from easyedit_mdm.tracing.job import RESAMPLES, model_report, read_trace
from easyedit_mdm.tracing.records import Averages, ModelTrace
from easyedit_mdm.version import __version__

SCORED = {"success": "success", "rephrase_exact": "paraphrase", "locality_kept": "locality"}
WINDOW = 4  # of the batched methods, as in arXiv 2606.03924


@dataclass(frozen=True)
class SweepJob:
    """What is swept.

    Attributes:
        config: method, hyperparameters and cases.
        layers: layers to try; None means all.
        windows: numbers of layers edited together; None means 1, and for batched methods also 4.
        trace_file: a `trace.json` with this model in it; None traces the cases' own facts, up to
            `trace_limit` that the model knows.
    """

    config: BenchConfig
    layers: Sequence[int] | None = None
    windows: Sequence[int] | None = None
    trace_file: str | None = None
    trace_limit: int = 8


class Setting(TypedDict):
    """The cases edited at some layers; `measures` are those of `SCORED`."""

    layers: list[int]
    score: float
    measures: dict[str, Estimate]
    failed: int
    errors: dict[str, int]


class Ranked(Setting):
    """A setting and its rank, 1 for the best."""

    rank: int


class Foretold(TypedDict):
    """How well one kind of trace foretells the sweep of windows of one width; see `prediction`."""

    width: int
    kind: str
    windows: int
    traced_best: list[int]
    its_rank: int
    with_success: float | None
    with_score: float | None


class SweptTrace(TypedDict):
    """What a sweep needs of the trace that it is held against; it keeps the rest too, but for the facts."""

    averages: Averages


class SweepReport(TypedDict):
    """What `sweep.json` holds."""

    version: str
    alg_name: str
    model: str
    layers: int
    hparams: dict[str, Any]
    dataset: str
    seed: int
    cases: int
    settings: list[Ranked]
    chosen: str
    trace: SweptTrace | None
    trace_note: str | None
    prediction: list[Foretold]


def sweep(job: SweepJob, out: str | Path) -> SweepReport:
    """Sweep; writes `sweep.json`, `sweep.html`, the figure, and a run file for each setting (`easyedit-mdm
    compare` reads those) into `out`.

    What stands in `out` from a sweep of the same thing is not run again.

    Returns:
        what `sweep.json` holds: `{"version", "alg_name", "model", "hparams", "cases", "settings": [best
            first: {"layers", "score", "measures",
        "failed", "rank"}], "chosen", "trace", "prediction"}`; facts of a trace that was read from a file stay
        in that file.

    Raises:
        HyperParameterError, UnknownNameError: for a method that is not ours, layers that do not exist,
            windows that it cannot edit.
        DataError: for cases or a trace that cannot be read, or run files of something else.
        FileError: if another process sweeps into the same folder; it is named.
    """
    config, folder = job.config, Path(out)
    if job.trace_limit < 1:
        raise HyperParameterError(f"--trace-limit {job.trace_limit}: give at least 1")
    METHODS[config.alg_name]
    adapter, hparams = load_ours(config.alg_name, config.hparams, config.device)
    choices = layer_choices(adapter.layers, hparams, job.layers, job.windows)
    given = None if job.trace_file is None else read_trace(job.trace_file, adapter)
    if given is not None and "none" not in given["averages"]:
        raise DataError(
            f"{job.trace_file} has no trace with all slots masked: trace with --revealed 0 among the numbers"
        )
    loaded = load_cases(
        config.dataset, config.data_dir, config.data_file, config.limit, config.seed, adapter.tokenizer
    )
    with only_writer(folder / "sweep.json"):
        settings = ranked([_setting(config, adapter, hparams, layers, loaded, folder) for layers in choices])
        traced, note = _trace(adapter, loaded, job) if given is None else (_without_facts(given), None)
        report: SweepReport = {
            "version": __version__, "alg_name": config.alg_name, "model": adapter.name,
            "layers": adapter.layers,
            "hparams": json.loads(json.dumps(hparams.to_dict(), default=str)), "dataset": config.dataset,
            "seed": config.seed, "cases": len(loaded.cases),
            "settings": settings, "chosen": f"layers: {settings[0]['layers']}",
            "trace": traced, "trace_note": note,
            "prediction": [] if traced is None else prediction(settings, traced),
        }  # fmt: skip
        _write(report, folder)
    _print_sweep(report, folder)
    return report


def layer_choices(
    layers: int,
    hparams: MethodHyperParams,
    wanted: Sequence[int] | None = None,
    windows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Every window of contiguous layers of each width, narrow ones first.

    Raises:
        HyperParameterError: for a layer that does not exist, a width that the method cannot edit, or if no
            window fits.
    """
    which = list(range(layers)) if wanted is None else sorted(set(wanted))
    beyond = [layer for layer in which if layer >= layers]
    if beyond:
        raise HyperParameterError(
            f"layers {beyond} do not exist: {hparams.model_name} has layers 0 to {layers - 1}"
        )
    widths = sorted(set(windows)) if windows is not None else [1] if hparams.LAYERS == "one" else [1, WINDOW]
    if min(widths) < 1 or (hparams.LAYERS == "one" and max(widths) > 1):
        able = "one layer" if hparams.LAYERS == "one" else "at least one layer"
        raise HyperParameterError(
            f"windows of {widths} layers: {hparams.alg_name} edits {able}; give such --windows"
        )
    choices = [
        list(range(first, first + width))
        for width in widths
        for first in which
        if set(range(first, first + width)) <= set(which)
    ]
    if not choices:
        raise HyperParameterError(f"no window of {widths} contiguous layers fits into layers {which}")
    return choices


def _setting(
    config: BenchConfig,
    adapter: Adapter,
    hparams: MethodHyperParams,
    layers: list[int],
    loaded: Loaded,
    folder: Path,
) -> Setting:
    """All cases edited at some layers, from the run file where it is whole already."""
    name = "-".join(map(str, sorted({layers[0], layers[-1]})))
    method = ours(adapter, replace(hparams, layers=layers))
    labelled = replace(config, label=f"{adapter.name} {config.alg_name} layers {name}")
    judge = judge_of(labelled, method)
    path = folder / "runs" / f"layers-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    run_cases(path, header_of(labelled, method, loaded, judge), loaded.cases, method, judge, resume=True)
    figures = summary(read_run(path), config.seed, RESAMPLES)
    measures = {key: figures["measures"][key] for key in SCORED if key in figures["measures"]}
    return {
        "layers": layers,
        "score": score(measures),
        "measures": measures,
        "failed": figures["failed"],
        "errors": figures["errors"],
    }


def score(measures: Mapping[str, Estimate]) -> float:
    """Harmonic mean of those of success, paraphrase and locality that the cases measure; 0 where one of them
    is 0.
    """
    means = [max(0.0, e["mean"]) for e in measures.values() if e["mean"] is not None]
    return round(float(harmonic_mean(means or [0.0])), 6)


def ranked(settings: Sequence[Setting]) -> list[Ranked]:
    """Best score first; ties go to more success, then to fewer and lower layers."""
    order = sorted(
        settings,
        key=lambda s: (-s["score"], -_success(s), len(s["layers"]), s["layers"]),
    )
    return [{"rank": i + 1, **setting} for i, setting in enumerate(order)]


def _success(setting: Setting) -> float:
    """Mean success; 0 where no case came to a score."""
    return setting["measures"]["success"]["mean"] or 0.0


def _trace(adapter: Adapter, loaded: Loaded, job: SweepJob) -> tuple[SweptTrace | None, str | None]:
    """The facts that the cases replace, traced with the defaults; without any that is known, the reason."""
    facts = dict.fromkeys(
        TracedFact(c.prompt, c.subject, c.ground_truth) for c in loaded.cases if c.ground_truth.strip()
    )
    config = TraceConfig(revealed=(0,), seed=job.config.seed)
    try:
        checked = check_known([adapter], list(facts), job.trace_limit)
    except DataError as error:
        return None, str(error)
    traces, left_out = trace_facts(adapter, checked.facts, config)
    whole = model_report(adapter, [t.record() for t in traces], left_out, config, RESAMPLES)
    return cast(SweptTrace, {**whole, "checked": checked.record()}), None


def _without_facts(trace: ModelTrace) -> SweptTrace:
    """A trace that was read from a file, whose facts stay there."""
    return cast(SweptTrace, {key: value for key, value in trace.items() if key != "facts"})


def prediction(settings: Sequence[Ranked], traced: SweptTrace) -> list[Foretold]:
    """How well the trace at the last subject token foretells the sweep: for each width and kind Spearman's
    correlation over windows between the effect, averaged over a window's layers, and success or score; and
    the rank of the window with the largest effect.
    """
    rows: list[Foretold] = []
    for width in sorted({len(s["layers"]) for s in settings}):
        same = [s for s in settings if len(s["layers"]) == width]
        for kind in KINDS:
            profile = traced["averages"]["none"][kind]["probability"]["subject_last"]["mean"]
            effects = [sum(profile[layer] for layer in s["layers"]) / width for s in same]
            largest = effects.index(max(effects))
            rows.append({
                "width": width, "kind": kind, "windows": len(same), "traced_best": same[largest]["layers"],
                "its_rank": largest + 1,
                "with_success": rank_correlation(effects, [_success(s) for s in same]),
                "with_score": rank_correlation(effects, [s["score"] for s in same]),
            })  # fmt: skip
    return rows


def words(row: Foretold) -> str:
    """A row of `prediction` as a sentence."""
    close = (
        "cannot be told (flat, or fewer than three windows)"
        if row["with_score"] is None
        else f"{row['with_score']:+.2f}"
    )
    layers = f"{row['width']} layer{'s' if row['width'] > 1 else ''}"
    place = (
        f"largest effect at {row['traced_best']}, which ranks {row['its_rank']} of {row['windows']} in the"
        " sweep"
    )
    return f"{TITLES[row['kind']]} trace, {layers}: {place}; rank correlation with the score {close}"


def sweep_figure(report: SweepReport) -> Any:
    """Success, paraphrase and locality by the middle of the window, a panel a width; below them the trace at
    the last subject token.
    """
    widths = sorted({len(s["layers"]) for s in report["settings"]})
    panels = len(widths) + (report["trace"] is not None)
    figure = new_figure(figsize=(8.4, 0.8 + 2.6 * panels))
    grid = figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0]
    handles: dict[str, Any] = {}
    for axes, width in zip(grid, widths):
        handles |= _sweep_panel(axes, [s for s in report["settings"] if len(s["layers"]) == width], width)
    if report["trace"] is not None:
        handles |= _trace_panel(grid[-1], report["trace"])
    chosen = report["settings"][0]["layers"]
    for axes in grid:
        axes.axvspan(chosen[0] - 0.4, chosen[-1] + 0.4, color=SOFT, alpha=0.1, linewidth=0)
        axes.grid(axis="y", color=SOFT, alpha=0.2, linewidth=0.7)
    grid[-1].set_xticks(range(0, report["layers"], max(1, report["layers"] // 16)))
    grid[-1].set_xlabel("layer (shaded: the chosen ones)", color=INK, fontsize=9)
    legend(figure, list(handles.values()), list(handles), 8.4)
    return figure


def _sweep_panel(axes: Any, settings: Sequence[Ranked], width: int) -> dict[str, Any]:
    dressed(
        axes,
        (
            "editing, one layer at a time"
            if width == 1
            else f"editing, {width} layers, by the middle of the window"
        ),
    )
    handles = {}
    settings = sorted(settings, key=lambda s: s["layers"])
    for i, (key, title) in enumerate(SCORED.items()):
        rows = [
            (sum(s["layers"]) / width, s["measures"][key])
            for s in settings
            if key in s["measures"] and s["measures"][key]["mean"] is not None
        ]
        if rows:
            look = {"color": SERIES[i], "marker": MARKERS[i], "linestyle": DASHES[i]}
            at, estimates = [x + (i - 1) * 0.06 for x, _ in rows], [e for _, e in rows]
            handles[title] = axes.errorbar(
                at, [e["mean"] for e in estimates], spans(estimates), capsize=2, elinewidth=0.8, **look
            )
    axes.set_ylim(-0.03, 1.03)
    return handles


def _trace_panel(axes: Any, traced: SweptTrace) -> dict[str, Any]:
    handles = {}
    for i, kind in enumerate(KINDS):
        table = traced["averages"]["none"][kind]["probability"]["subject_last"]
        look = {"color": SERIES[i + 3], "marker": MARKERS[i + 3], "linestyle": DASHES[i]}
        if table["low"][0] is not None:
            axes.fill_between(
                range(len(table["mean"])),
                table["low"],
                table["high"],
                color=look["color"],
                alpha=0.14,
                linewidth=0,
            )
        dressed(axes, f"tracing, average indirect effect at the last subject token, {table['n']} facts")
        handles[f"trace: {TITLES[kind]}"] = axes.plot(range(len(table["mean"])), table["mean"], **look)[0]
    return handles


def _write(report: SweepReport, folder: Path) -> None:
    write_text(
        folder / "sweep.json", json.dumps(report, separators=(",", ":")) + "\n", errors="backslashreplace"
    )
    figure = sweep_figure(report)
    inline = svg(figure, "sweep")
    save(figure, folder / "sweep")
    page = rendered("sweep.html", report=report, figure=inline, scored=SCORED, show=show, words=words)
    write_text(folder / "sweep.html", page, errors="backslashreplace")


def _print_sweep(report: SweepReport, folder: Path) -> None:
    console = Console()
    table = Table(
        title=escape(f"{report['model']}, {report['alg_name']}, {report['cases']} cases, best first")
    )
    for column in ("layers", "score", *SCORED.values(), "failed"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for setting in report["settings"]:
        nothing: Interval = {"mean": None, "low": None, "high": None}
        cells = [middle(setting["measures"].get(key, nothing)) for key in SCORED]  # intervals: on the page
        table.add_row(
            escape(str(setting["layers"])), f"{setting['score']:.3f}", *cells, str(setting["failed"])
        )
    console.print(table)
    if report["trace_note"]:
        console.print(f"no trace beside it: {report['trace_note']}", markup=False, highlight=False)
    for row in report["prediction"]:
        console.print(words(row), markup=False, highlight=False)
    console.print(
        f"{folder / 'sweep.html'}, sweep.json and figure written; for the hyperparameter file:",
        markup=False,
        highlight=False,
    )
    console.print(report["chosen"], markup=False, highlight=False)
