"""Runs that edit several facts together, or one batch after another in the same model.

The run file is that of any run: one line a case, judged after its batch. Beside it stand
`NAME.batches.jsonl`, with the scores of the first batch's facts, the last one's and untouched ones after
every batch, and, for a sequence, `NAME.edits/`, from which a run that was cut off puts the edits back instead
of making them again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from easyedit_mdm.common.files import append_line, explained, new_folder, write_tensors
from easyedit_mdm.common.memory import peak_memory
from easyedit_mdm.data.cases import BenchCase
from easyedit_mdm.editing import Edit, ROMEMDMHyperParams, StateHyperParams
from easyedit_mdm.editing.context import prefixes_of
from easyedit_mdm.errors import DataError, EasyEditMDMError, EditError
from easyedit_mdm.evaluation import perplexity, score_prompts
from easyedit_mdm.evaluation.records import CaseRecord, EditFigures, Judgement, scores
from easyedit_mdm.models import Adapter
from easyedit_mdm.runs.judge import Judge, history, kept
from easyedit_mdm.runs.methods import BenchMethod, Undo
from easyedit_mdm.statistics import note_base

# facts of the first batch, of the last one and of the untouched ones that are scored after every batch
WATCHED = 50


@dataclass(frozen=True)
class Batches:
    """How the cases of a run are edited.

    Attributes:
        size: facts a batch.
        keep: whether a batch stays in the model for those after it (`sequential`), or is taken back
            (`batch`).
        untouched: cases of facts that are never edited.
    """

    size: int
    keep: bool
    untouched: Sequence[BenchCase]

    def groups(self, cases: Sequence[BenchCase]) -> list[Sequence[BenchCase]]:
        """The batches."""
        return [cases[start : start + self.size] for start in range(0, len(cases), self.size)]


def batches_file(path: Path) -> Path:
    """Where the scores after every batch stand."""
    return path.with_name(f"{path.stem}.batches.jsonl")


def edits_folder(path: Path) -> Path:
    """Where the edits of a sequence are kept."""
    return path.with_name(f"{path.stem}.edits")


def run_batches(
    path: Path,
    done: int,
    cases: Sequence[BenchCase],
    method: BenchMethod,
    judge: Judge,
    before: Callable[[BenchCase], Judgement],
    plan: Batches,
) -> None:
    """Edit batch by batch and write each one's lines when it ends.

    Args:
        done: cases whose lines the run file holds, in whole batches.
        before: the evaluation of a case by the unedited model.

    Raises:
        EditError: if taking a batch back did not give the same weights.
        DataError: if `NAME.batches.jsonl` does not belong to the run file.
    """
    groups, finished = plan.groups(cases), -(-done // plan.size)
    _cut(batches_file(path), finished)
    if finished == len(groups):
        return  # nothing is left to edit: the finished batches need not be put back into the model
    pre = {case.case_id: before(case) for case in tqdm(cases, desc="before the edits", unit="case")}
    then = _written(method.adapter, plan.untouched, judge)
    undos: list[Undo] = []
    try:
        if finished and plan.keep:
            note_unedited(method)
        for number in range(finished if plan.keep else 0):
            undos.append(put_back(method, groups[number], edits_folder(path) / f"{number:05d}"))
        bar = tqdm(groups[finished:], initial=finished, total=len(groups), desc="batches", unit="batch")
        with explained(path), path.open("a", encoding="utf-8") as lines:
            for number, group in enumerate(bar, start=finished):
                folder = edits_folder(path) / f"{number:05d}" if plan.keep else None
                records, undo = _run_batch(number, group, method, judge, pre, folder)
                watched = {
                    "batch": number,
                    **_watched(groups[: number + 1], plan, method.adapter, judge, then),
                }
                undos.append(undo)
                if not plan.keep:
                    undos.pop()()
                with batches_file(path).open("a", encoding="utf-8") as stream:
                    append_line(stream, batches_file(path), json.dumps(watched, sort_keys=True))
                append_line(lines, path, "\n".join(json.dumps(record, sort_keys=True) for record in records))
    finally:
        for undo in reversed(undos):
            undo()


def _run_batch(
    number: int,
    group: Sequence[BenchCase],
    method: BenchMethod,
    judge: Judge,
    pre: dict[Any, Judgement],
    folder: Path | None,
) -> tuple[list[CaseRecord], Undo]:
    """Edit the cases of one batch together and judge each; what fails is in the records of all of them."""
    records: list[CaseRecord] = [
        {
            "alg_name": str(method.settings["alg_name"]),
            "case_id": c.case_id,
            "subject": c.subject,
            "prompt": c.prompt,
            "target_new": c.target_new,
            "batch": number,
        }
        for c in group
    ]
    began = time.perf_counter()
    try:
        with peak_memory(method.adapter.device) as peak:
            figures, undo = edit_and_keep(method, group, folder)
    except EditError:
        raise
    except (EasyEditMDMError, torch.cuda.OutOfMemoryError, ValueError, RuntimeError) as error:
        for case, record in zip(group, records):
            record |= {"pre": pre[case.case_id], "error": f"{type(error).__name__}: {error}"}
        return records, _nothing
    seconds = time.perf_counter() - began
    for case, record, figure in zip(group, records, figures):
        start = time.perf_counter()
        record |= {"pre": pre[case.case_id], "edit": figure, "post": judge.judge(method.adapter, case)}
        record["post"] |= kept(record["pre"], record["post"])
        record["n_tokens"] = scores(record["pre"]["multi_step"]["rewrite"])[0]["n_tokens"]
        record["history"] = {"post": history(method.adapter, case, judge.decode)}
        spent = time.perf_counter() - start
        record["time"] = {
            "edit_seconds": seconds / len(group),
            **({"edit_peak_bytes": peak[0]} if peak else {}),
            "evaluation_seconds": spent,
        }
    return records, undo


def _nothing() -> None:
    """Takes nothing back."""


def edit_and_keep(
    method: BenchMethod, group: Sequence[BenchCase], folder: Path | None
) -> tuple[list[EditFigures], Undo]:
    """Make and apply; the edits of our own methods are kept in `folder`, for `put_back`."""
    session = method.session
    before = 0 if session is None else len(session.edits)
    if folder is not None:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # of a run that was cut off before the batch's lines were written
    figures, undo = method.edit(group)
    if session is not None and folder is not None:
        try:
            with new_folder(folder) as part:
                for i, edit in enumerate(session.edits[before:]):
                    edit.save(part / f"edit-{i}", session.model)
                write_tensors(part / "keys.safetensors", session.history.latest())
        except BaseException:
            undo()
            raise
    return figures, undo


def note_unedited(method: BenchMethod) -> None:
    """What edits take from the unedited model, taken before finished edits are put back into it: the context
    prefixes that it writes, and whose second moments count.
    """
    if method.session is not None:
        if isinstance(method.session.hparams, StateHyperParams):
            prefixes_of(method.session.model, method.session.hparams)
        note_base(method.session.model)


def put_back(method: BenchMethod, group: Sequence[BenchCase], folder: Path) -> Undo:
    """Put the edits of a finished batch back into the model; made anew where they were not kept."""
    session = method.session
    if session is None or not folder.is_dir():
        try:
            return method.edit(group)[1]
        except (EasyEditMDMError, ValueError, RuntimeError):
            return _nothing  # it failed the first time as well, and its records say so
    before, hparams = len(session.edits), session.hparams
    template = hparams.rewrite_module_tmp if isinstance(hparams, ROMEMDMHyperParams) else None
    sites = [session.model.site(layer, template) for layer in hparams.layers]
    names = [name for site in sites for name in site.weights]
    session.history.carried(session.model, names)  # notes what the weights were before the first
    for edit in [Edit.load(part) for part in sorted(folder.glob("edit-*"), key=_number)]:
        edit.apply(session.model)
        session.adopt(edit)
    keys = load_file(folder / "keys.safetensors")
    if keys:
        session.history.add(session.model, names, keys)

    def undo() -> None:
        """These edits, the last first."""
        while len(session.edits) > before:
            session.undo()

    return undo


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("edit-"))


def _watched(
    groups: Sequence[Sequence[BenchCase]],
    plan: Batches,
    adapter: Adapter,
    judge: Judge,
    then: list[list[int]],
) -> dict[str, Any]:
    """Scores of the first batch's facts, the last one's, and untouched ones, each a list with a value a
    fact.
    """
    first, last = groups[0][:WATCHED], groups[-1][:WATCHED]
    scores: dict[str, Any] = {"edited": sum(map(len, groups))}
    for name, some in (("first", first), ("last", last)):
        if name == "first" and not plan.keep:
            continue  # it is not in the model any more
        judged = score_prompts(adapter, [c.prompt for c in some], [c.target_new for c in some], judge.decode)
        scores[name] = {
            "exact": [float(s["exact"]) for s in judged],
            "token_acc": [float(s["token_acc"]) for s in judged],
        }
    if plan.untouched:
        now = _written(adapter, plan.untouched, judge)
        scores["untouched"] = {
            "kept": [sum(a == b for a, b in zip(x, y)) / len(x) for x, y in zip(then, now)]
        }
    if judge.held_out:
        scores["perplexity"] = perplexity(adapter, judge.held_out)
    return scores


def _written(adapter: Adapter, cases: Sequence[BenchCase], judge: Judge) -> list[list[int]]:
    """The tokens that the model writes after the cases' prompts, over as many slots as their targets have."""
    if not cases:
        return []
    judged = score_prompts(adapter, [c.prompt for c in cases], [c.target_new for c in cases], judge.decode)
    return [score["tokens"] for score in judged]


def _cut(path: Path, lines: int) -> None:
    """Leave the first `lines` lines of a file.

    Raises:
        DataError: if it has fewer.
    """
    text = path.read_bytes() if path.exists() else b""
    whole = text.splitlines(keepends=True)[:lines]
    if len(whole) < lines or not all(line.endswith(b"\n") for line in whole):
        raise DataError(
            f"{path} has {len(whole)} lines, and the run file {lines} finished batches: start another run"
        )
    if path.exists():
        with explained(path):
            path.write_bytes(b"".join(whole))


def read_batches(path: Path) -> Iterator[dict[str, Any]]:
    """What `NAME.batches.jsonl` of a run file holds, batch by batch.

    Raises:
        DataError: if it is missing or not what it should be.
    """
    file = batches_file(path)
    if not file.exists():
        raise DataError(f"{file} is missing: was {path} run with --mode batch or sequential?")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not JSON ({error})") from error
