"""What `easyedit-mdm trace` does: trace facts that one or several models know, average, draw, and write a
report.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyedit_mdm.api import load_model
from easyedit_mdm.common.files import write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.common.locks import only_writer
from easyedit_mdm.errors import DataError, HyperParameterError
from easyedit_mdm.models import Adapter
from easyedit_mdm.report.compare import show
from easyedit_mdm.report.figures import rendered, save, svg
from easyedit_mdm.tracing import (
    CLASSES,
    TraceConfig,
    TracedFact,
    check_known,
    own_answer,
    read_facts,
    trace_facts,
)
from easyedit_mdm.tracing.averages import GROUPS, averages, peaks, ranges, side_by_side, totals
from easyedit_mdm.tracing.figures import TITLES, average_figure, compare_figure, group_title, heat_figure
from easyedit_mdm.tracing.records import FactRecord, ModelTrace, Pair, TraceReport
from easyedit_mdm.twins.benchmark import split_facts
from easyedit_mdm.twins.world import World
from easyedit_mdm.version import __version__

SHOWN = 4  # facts with heatmaps; all are in trace.json
RESAMPLES = 2000
NOTES = (
    (
        "Indirect effect: the measure in a run with a corrupted subject in which one layer's output (hidden"
        " state), or the outputs of a window of MLPs or attentions, are restored at one token, minus the"
        " measure in the corrupted run; mean over corrupted runs."
    ),
    (
        "Probability: joint over the slots that are read. Masked models read all masked slots in one pass,"
        " autoregressive ones each slot after the right tokens before it; the two numbers are not the same"
        " quantity, their shapes over layers can be compared."
    ),
    (
        "Final log-probability (masked models): restored at one denoising step only, then denoised on under"
        " the corruption; what the right object gets in the steps at which its slots are written."
    ),
    (
        "In brackets and as shades: 95 % bootstrap intervals that resample subjects; too narrow with fewer"
        " than about ten, absent with one."
    ),
    (
        "A band holds the layers with at least half of the largest effect. An effect shows where information"
        " passes, not that editing there works: sweep it."
    ),
)


@dataclass(frozen=True)
class TraceJob:
    """What is traced.

    Attributes:
        models: twins, folders or hub ids; several are traced on the facts that all of them know.
        prompt, subject, target: one fact. Without a target the model's own next `answer_tokens` tokens are
            the answer.
        known: a file of facts (`easyedit_mdm.tracing.read_facts`). Without it and without a prompt: the
            twins' test facts.
        limit: known facts to trace, drawn by the config's seed; None traces all.
        replace_with: other subjects for the corruption `replace`; None takes those of the other facts.
        device, dtype: of the models.
    """

    models: Sequence[str]
    prompt: str | None = None
    subject: str | None = None
    target: str | None = None
    answer_tokens: int = 1
    known: str | None = None
    limit: int | None = None
    replace_with: Sequence[str] | None = None
    device: str | None = None
    dtype: str | None = None


def trace(
    job: TraceJob, out: str | Path, config: TraceConfig = TraceConfig(), resamples: int = RESAMPLES
) -> TraceReport:
    """Trace, and write `trace.json`, `trace.html` and the figures (PNG and SVG) into `out`.

    Returns:
        what `trace.json` holds: `{"version", "config", "checked", "notes", "models": [{"name", "fingerprint",
            "paradigm", "family", "layers",
        "window", "facts": [...], "averages", "totals", "peaks", "forwards_a_fact", "left_out"}], "pairs"}`.

    Raises:
        DataError: for a file that cannot be read, or if no fact is known to all models.
        HyperParameterError: for settings that do not go together.
        RequestError: for a prompt without its subject, or facts that cannot be corrupted.
        CheckpointError: for a model that cannot be loaded.
        FileError: if another process traces into the same folder; it is named.
    """
    _check(job)
    device = job.device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = [load_model(name, device=device, dtype=job.dtype) for name in job.models]
    names = _names(job.models)
    for model, name in zip(models, names):
        model.name = name
    facts, skipped = _facts(job, models[0], config.seed)
    checked = check_known(models, facts, job.limit)
    others = (
        list(job.replace_with)
        if job.replace_with is not None
        else sorted({fact.subject for fact in facts} | set(_world_subjects(job)))
    )
    folder = Path(out)
    with only_writer(folder / "trace.json"):
        traced = [_traced(model, checked.facts, config, others, resamples) for model in models]
        report: TraceReport = {
            "version": __version__,
            "config": config.record(),
            "facts": {"source": job.known or ("prompt" if job.prompt else "twins"), "skipped": skipped},
            "checked": checked.record(),
            "resamples": resamples,
            "notes": list(NOTES),
            "models": traced,
            "pairs": side_by_side(names, traced),
        }
        write_report(report, folder)
    _print_trace(report, folder)
    return report


def _check(job: TraceJob) -> None:
    if job.prompt is not None and job.known is not None:
        raise HyperParameterError("--prompt and --known name two sources of facts: give one of them")
    if job.prompt is None and (job.subject is not None or job.target is not None):
        raise HyperParameterError(
            f"subject {job.subject!r} and target {job.target!r} need the prompt that they belong to: give"
            " --prompt"
        )
    if job.prompt is not None and job.subject is None:
        raise HyperParameterError(
            f"no subject for prompt {job.prompt!r}: give --subject, the words whose knowledge is traced"
        )
    if job.prompt is not None and job.target is None and len(job.models) > 1:
        raise HyperParameterError("several models need one answer to be compared on: give --target")
    for name, value in (("limit", job.limit), ("answer-tokens", job.answer_tokens)):
        if value is not None and value < 1:
            raise HyperParameterError(f"--{name} {value}: give at least 1")


def _names(models: Sequence[str]) -> list[str]:
    """Short names, numbered where two are alike."""
    names = [str(model).rstrip("/").rsplit("/", 1)[-1] for model in models]
    return [
        f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _facts(job: TraceJob, model: Adapter, seed: int) -> tuple[list[TracedFact], list[dict[str, Any]]]:
    """The facts that are asked for, in random order, and the records of the file that are none."""
    if job.prompt is not None:
        subject = str(job.subject)
        filled = job.prompt.replace("{}", subject, 1)
        return [TracedFact(filled, subject, job.target or own_answer(model, filled, job.answer_tokens))], []
    if job.known is not None:
        facts, skipped = read_facts(job.known)
    else:
        facts, skipped = (
            [TracedFact(f.prompt(), f.subject, f.object) for f in split_facts(World.build())["test"]],
            [],
        )
    random.Random(seed).shuffle(facts)
    return facts, skipped


def _world_subjects(job: TraceJob) -> list[str]:
    """For a prompt of one's own about a subject of the twins' world: the others that could stand in its
    place.
    """
    if job.prompt is None:
        return []
    subjects = World.build().subjects
    return subjects if job.subject in subjects else []


def _traced(
    model: Adapter, facts: Sequence[TracedFact], config: TraceConfig, others: Sequence[str], resamples: int
) -> ModelTrace:
    """One model's part of the report."""
    traces, left_out = trace_facts(model, facts, config, others)
    return model_report(model, [t.record() for t in traces], left_out, config, resamples)


def model_report(
    model: Adapter,
    records: list[FactRecord],
    left_out: list[dict[str, str]],
    config: TraceConfig,
    resamples: int,
) -> ModelTrace:
    """Records of a model's facts, with their averages."""
    average = averages(records, config.seed, resamples)
    forwards = [record["forwards"] for record in records]
    return {
        "name": model.name, "fingerprint": model_fingerprint(model.native), "paradigm": model.spec.paradigm,
        "family": model.spec.name,
        "layers": model.layers, "window": config.window_for(model.layers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "forwards_a_fact": sum(forwards) / len(forwards),
        "rows_a_fact": sum(r["rows"] for r in records) / len(records),
        "seconds": round(sum(r["seconds"] for r in records), 1), "left_out": left_out,
        "totals": totals(records, config.seed, resamples), "peaks": peaks(average), "averages": average,
        "facts": records,
    }  # fmt: skip


def write_report(report: TraceReport, folder: Path) -> None:
    """`trace.json`, `trace.html`, and each figure as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(
        folder / "trace.json",
        json.dumps(report, indent=None, separators=(",", ":")) + "\n",
        errors="backslashreplace",
    )
    shown = {}
    for name, (title, draw) in _figures(report).items():
        figure = draw()
        shown[name] = (title, svg(figure, name))
        save(figure, folder / name)
    page = rendered(
        "trace.html",
        report=report,
        figures=shown,
        classes=CLASSES,
        groups=GROUPS,
        kinds=TITLES,
        show=show,
        ranges=ranges,
        shown=SHOWN,
    )
    write_text(folder / "trace.html", page, errors="backslashreplace")


def _figures(report: TraceReport) -> dict[str, tuple[str, Any]]:
    """File name -> title, and a function that draws the figure."""
    models, figures = report["models"], {}
    if report["pairs"]:
        figures["side-by-side"] = ("Side by side", lambda: compare_figure(models))
    for group, measure in (
        ("none", "probability"),
        ("some", "probability"),
        ("none", "final_log_probability"),
        ("some", "final_log_probability"),
    ):
        if any(measure in kinds for model in models for kinds in model["averages"].get(group, {}).values()):
            part = "average" if measure == "probability" else "temporal"
            name = f"{part}{'' if group == 'none' else '-revealed'}"
            figures[name] = (group_title(group, measure), partial(average_figure, models, group, measure))
    for model in models:
        for i, fact in enumerate(model["facts"][:SHOWN]):
            title = f"{model['name']}: {fact['prompt']} → {fact['answer']}"
            figures[f"fact-{i + 1}-{_file_name(model['name'])}"] = (title, partial(heat_figure, fact))
    return figures


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _print_trace(report: TraceReport, folder: Path) -> None:
    console, checked = Console(), report["checked"]
    known = ", ".join(f"{name} knows {n}" for name, n in checked["known"].items())
    console.print(
        f"asked {checked['asked']} facts: {known}; traced: {checked['known_by_all']}",
        markup=False,
        highlight=False,
    )
    for model in report["models"]:
        console.print(_peak_table(model))
    for pair in report["pairs"]:
        console.print(words(pair), markup=False, highlight=False)
    for model in report["models"]:
        cost = f"{model['forwards_a_fact']:.0f} forward passes a fact ({model['rows_a_fact']:.0f} rows)"
        console.print(
            f"{model['name']}: {cost}, {model['seconds']} s for {len(model['facts'])}",
            markup=False,
            highlight=False,
        )
    console.print(f"{folder / 'trace.html'}, trace.json and figures written", markup=False, highlight=False)


def _peak_table(model: ModelTrace) -> Table:
    table = Table(
        title=escape(f"{model['name']}: where the answer's probability comes back most (no slot revealed)")
    )
    for column in ("restored", "at the", "peak", "effect, 95 % interval", "layers of half of it", "facts"):
        table.add_column(column, justify="right" if column in ("peak", "facts") else "left")
    for row in model["peaks"]:
        if row["group"] == "none" and row["class"] in ("subject_last", "last", "slots"):
            effect = show({"mean": row["effect"], "low": row["low"], "high": row["high"]})
            table.add_row(
                TITLES[row["kind"]],
                CLASSES[row["class"]],
                str(row["layer"]),
                escape(effect),
                ranges(row["band"]),
                str(row["n"]),
            )
    return table


def words(pair: Pair) -> str:
    """What two models have in common at the last subject token, in a sentence."""
    close = "flat" if pair["correlation"] is None else f"correlation {pair['correlation']:.2f}"
    return (
        f"{TITLES[pair['kind']]} at the last subject token, {pair['first']} and {pair['second']}: layers"
        f" {ranges(pair['bands'][0])} and {ranges(pair['bands'][1])}, overlap {pair['overlap']:.2f}, {close}"
    )


def read_trace(file: str | Path, model: Adapter) -> ModelTrace:
    """The part of a `trace.json` that is about a model.

    Raises:
        DataError: if the file cannot be read, or holds no trace of this model (its fingerprint says so).
    """
    try:
        models = json.loads(Path(file).read_text(encoding="utf-8"))["models"]
        mine = model_fingerprint(model.native)
        matching = [part for part in models if part["fingerprint"] == mine]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read as a trace ({type(error).__name__}: {error}): give a trace.json of"
            " `easyedit-mdm trace`"
        ) from error
    if not matching:
        names = ", ".join(part["name"] for part in models)
        raise DataError(
            f"{file} holds traces of {names}, but none of the weights of {model.name}: trace it again"
        )
    return matching[0]
