"""What edits do to a model's other abilities: tasks of lm-evaluation-harness before and after them, paired by
document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_mdm.common.files import new_folder, write_json, write_text
from easyedit_mdm.editing import Edit
from easyedit_mdm.errors import DataError, HyperParameterError
from easyedit_mdm.harness import load_edits
from easyedit_mdm.harness.scoring import Scoring
from easyedit_mdm.report.summaries import Estimate, bootstrap_mean

HEADS = ("task", "metric", "n", "before", "after", "after - before", "95 % interval")


@dataclass(frozen=True)
class DamageJob:
    """What to measure.

    Attributes:
        model: a twin, a folder or a hub id.
        edits: a folder of an edit, or of several.
        tasks: names of the harness's tasks.
        include_path: a folder of task files of your own.
        limit: documents of each task, the first ones; None for all.
    """

    model: str
    edits: str
    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    scoring: Scoring = Scoring()
    device: str | None = None


@dataclass(frozen=True)
class Row:
    """One metric of one task.

    Attributes:
        before, after: as the harness sums the metric up.
        difference: after minus before by document, with its 95 % interval; None for metrics that are no mean
            over documents, such as a perplexity.
    """

    task: str
    metric: str
    n: int
    before: float
    after: float
    difference: Estimate | None


def damage(job: DamageJob, out: str | Path | None = None) -> list[Row]:
    """Run the tasks on the model before and after all edits; the model is loaded once.

    Args:
        out: folder for damage.md and damage.json; must not exist.

    Raises:
        HyperParameterError: for a task that it does not know.
        EditError: if the edits do not fit the model.
    """
    from easyedit_mdm.harness.model import EditedLM

    edits = load_edits(job.edits)
    model = EditedLM(job.model, device=job.device, **vars(job.scoring))
    before = _evaluate(model, job)
    for edit in edits:
        edit.apply(model.adapter)
    model.edits = edits
    after = _evaluate(model, job)
    rows = list(compared(before, after))
    if out is not None:
        _write(Path(out), job, edits, rows, [before["config"], after["config"]])
    return rows


def _evaluate(model: Any, job: DamageJob) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=job.include_path)
    unknown = [task for task in job.tasks if task not in manager.all_tasks]
    if unknown:
        where = "" if job.include_path is None else f", with those of {job.include_path}"
        raise HyperParameterError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}{where}: easyedit-mdm lm-eval ls tasks"
        )
    model.forget()
    results = simple_evaluate(
        model,
        tasks=list(job.tasks),
        limit=job.limit,
        task_manager=manager,
        bootstrap_iters=0,
        confirm_run_unsafe_code=False,
    )
    if not results:
        raise DataError("lm-evaluation-harness gave no results")
    return {**results, "config": {**results["config"], **model.get_model_info()}}


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each metric of each task, from what `simple_evaluate` returns with its samples."""
    for task, figures in before["results"].items():
        samples = before["samples"].get(task, []), after["samples"].get(task, [])
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            n = len({s["doc_id"] for s in samples[0]})
            difference = _paired(*samples, metric, kind)
            yield Row(task, metric, n, float(value), float(after["results"][task][name]), difference)


def _paired(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], metric: str, kind: str
) -> Estimate | None:
    """Differences by document; None where a document has no number of its own."""
    was = {s["doc_id"]: s[metric] for s in before if s.get("filter", kind) == kind and metric in s}
    now = {s["doc_id"]: s[metric] for s in after if s.get("filter", kind) == kind and metric in s}
    if not was or not all(isinstance(v, (int, float)) for v in [*was.values(), *now.values()]):
        return None
    return bootstrap_mean([float(now[i]) - float(was[i]) for i in was], list(was))


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, as text."""
    difference = row.difference
    if difference is None or difference["mean"] is None:
        difference_cells = f"{row.after - row.before:+.3f}", "-"
    else:
        low, high = difference["low"], difference["high"]
        difference_cells = (
            f"{difference['mean']:+.3f}",
            "-" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]",
        )
    return row.task, row.metric, str(row.n), f"{row.before:.3f}", f"{row.after:.3f}", *difference_cells


def markdown(rows: Sequence[Row]) -> str:
    """The table, for a page."""
    lines = [HEADS, ["---"] * len(HEADS), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _write(
    out: Path, job: DamageJob, edits: Sequence[Edit], rows: Sequence[Row], configs: Sequence[Mapping]
) -> None:
    keep = ("scoring", "likelihoods")
    facts = sum(len(edit.card.get("facts", [])) for edit in edits)
    report = {
        "model": job.model,
        "edits": [edit.card.get("id") for edit in edits],
        "facts": facts,
        "limit": job.limit,
        "rows": [vars(row) for row in rows],
        "before": {key: configs[0][key] for key in keep},
        "after": {key: configs[1][key] for key in keep},
    }
    with new_folder(out) as folder:
        write_text(folder / "damage.md", f"# {job.model}: {facts} edited facts\n\n{markdown(rows)}")
        write_json(folder / "damage.json", report)
