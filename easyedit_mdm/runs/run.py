"""`easyedit-mdm bench`: many cases, one line each, that survive being killed at any point.

Line 1 of a run file is a header with everything that determines the result; then exactly one line a case, in
input order, written and flushed when the case ends. Whatever varies between two runs of the same thing stands
under keys that contain `time` or `seconds`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from easyedit_mdm.common.files import append_line, explained, replacing, write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.common.locks import only_writer
from easyedit_mdm.common.memory import peak_memory
from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.data.cases import BenchCase, Loaded, load_cases
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import METHODS
from easyedit_mdm.errors import DataError, EasyEditMDMError, EditError, HyperParameterError
from easyedit_mdm.evaluation.records import CaseRecord, Header, Judgement, run_lines, scores
from easyedit_mdm.runs.batches import WATCHED, Batches, run_batches
from easyedit_mdm.runs.judge import Judge, history, kept
from easyedit_mdm.runs.methods import BenchMethod, Others, bench_method
from easyedit_mdm.session import RUN_MODES
from easyedit_mdm.statistics import cache_folder, text_source
from easyedit_mdm.twins import TWINS
from easyedit_mdm.version import __version__

HELD_OUT_TEXTS, HELD_OUT_WORDS = 4, 40


@dataclass(frozen=True)
class BenchConfig:
    """What is run.

    Attributes:
        alg_name, hparams: the method and its file.
        dataset, data_dir, data_file, limit, seed: the cases; see `easyedit_mdm.data.cases.load_cases`.
        label: what to call the run in reports.
        held_out: a text for perplexity before and after (`easyedit_mdm.statistics.text_source`); `twins` for
            the twins by default, else none.
        light: leave out the ladder of honesty and fluency, which are most of the evaluation's time.
        decodings: with `light`, whether every way of decoding is tried all the same (masked models).
        fluency: whether 100 tokens are written before and after each edit, for their n-gram entropy.
        device: where the model goes.
    """

    alg_name: str
    hparams: str
    dataset: str
    data_dir: str | None = None
    data_file: str | None = None
    limit: int | None = None
    seed: int = 0
    label: str | None = None
    held_out: str | None = None
    light: bool = False
    device: str | None = None
    fluency: bool = True
    mode: str = "each"
    batch_size: int | None = None
    decodings: bool = False


def bench(config: BenchConfig, out: str | Path, resume: bool = False, others: Others | None = None) -> int:
    """Run, or go on with a run that was cut off.

    With `accelerate launch`, every process takes a share of the cases and writes it beside `out`; the first
    one puts them together at the end. The cases and their values are those of one process.

    Args:
        out: the run file. Without `resume` it must not exist yet.
        others: makes methods that are not ours, such as EasyEdit's own
            (`easyedit_mdm.host.methods.easyedits_method`).

    Returns:
        number of cases in the file.

    Raises:
        DataError: if `out` exists and `resume` is not asked for, or holds a run of something else.
        EasyEditMDMError: for a method, model or data set that cannot be loaded; see `docs/errors.md`. A case
            that fails is recorded with its error, and the run goes on.
    """
    path = Path(out)
    _check_mode(config)
    if path.exists() and not resume:
        raise DataError(f"{path} exists: give another --out, or --resume to go on with it")
    rank, world = _place()
    if world > 1 and config.mode != "each":
        raise HyperParameterError(
            f"--mode {config.mode} runs in one process, and there are {world}: start it without a launcher"
        )
    mine = path if world == 1 else path.with_name(f"{path.name}.part-{rank}-of-{world}")
    with only_writer(mine):
        method = bench_method(config.alg_name, config.hparams, config.device, others)
        loaded = _loaded(config, config.limit, method)
        judge = judge_of(config, method)
        header = header_of(config, method, loaded, judge)
        if config.mode == "batch" and method.session is not None and not method.session.method.batchable:
            raise HyperParameterError(
                f"{config.alg_name} writes one fact at a time: use --mode each or sequential, or a method"
                " such as MEMIT_MDM"
            )
        if config.mode != "each":
            _run_in_batches(path, header, loaded.cases, method, judge, config, resume)
        elif not (world > 1 and path.exists() and _is_whole(path, header, loaded.cases)):
            run_cases(mine, header, loaded.cases[rank::world], method, judge, resume)
    if world > 1:
        _wait()
        if rank == 0:
            _merge(path, header, loaded.cases, world)
        _wait()
    return len(loaded.cases)


def _check_mode(config: BenchConfig) -> None:
    if config.mode not in RUN_MODES:
        raise HyperParameterError(
            f"--mode {config.mode!r} is not one of {', '.join(RUN_MODES)}"
            f"{did_you_mean(config.mode, RUN_MODES)}"
        )
    if config.batch_size is not None and config.mode == "each":
        raise HyperParameterError(
            f"--batch-size {config.batch_size} means nothing with --mode each, which edits one fact at a"
            " time: add --mode batch or --mode sequential, or leave --batch-size out"
        )
    if config.batch_size is not None and config.batch_size < 1:
        raise HyperParameterError(f"--batch-size {config.batch_size}: give at least 1")


def _loaded(config: BenchConfig, limit: int | None, method: BenchMethod) -> Loaded:
    return load_cases(
        config.dataset, config.data_dir, config.data_file, limit, config.seed, method.adapter.tokenizer
    )


def _run_in_batches(
    path: Path,
    header: Header,
    cases: list[BenchCase],
    method: BenchMethod,
    judge: Judge,
    config: BenchConfig,
    resume: bool,
) -> None:
    """Write the run file of a run in batches, or go on with the one that is there."""
    size = config.batch_size or (len(cases) if config.mode == "batch" else 1)
    plan = Batches(size, config.mode == "sequential", _untouched(config, cases, method))
    header = {**header, "batches": {"size": size, "untouched": [case.case_id for case in plan.untouched]}}
    done = _prepare(path, header, resume)
    whole = done if done == len(cases) else done // size * size
    if whole < done:  # a batch is written in one piece, but a disk may have filled up in the middle of it
        _keep_lines(path, 1 + whole)
    if _case_ids(path) != [case.case_id for case in cases[:whole]]:
        raise DataError(
            f"{path} does not hold the first {whole} cases of this run in order: start another file"
        )
    before = Kept(header["model"]["fingerprint"], judge)
    run_batches(path, whole, cases, method, judge, lambda case: before.get(method.adapter, case), plan)


def _untouched(config: BenchConfig, cases: list[BenchCase], method: BenchMethod) -> list[BenchCase]:
    """Cases of the same data set that are not edited, about other subjects; none where all are edited."""
    known, subjects = {case.case_id for case in cases}, {case.subject for case in cases}
    others = [
        c for c in _loaded(config, None, method).cases if c.case_id not in known and c.subject not in subjects
    ]
    return random.Random(config.seed).sample(others, min(WATCHED, len(others)))


def _keep_lines(path: Path, lines: int) -> None:
    write_bytes = b"".join(path.read_bytes().splitlines(keepends=True)[:lines])
    with replacing(path) as part:
        part.write_bytes(write_bytes)


def run_cases(
    path: Path,
    header: Header,
    cases: list[BenchCase],
    method: BenchMethod,
    judge: Judge,
    resume: bool,
) -> None:
    """Write a run file, or go on with the one that is there.

    Raises:
        DataError: if the file holds a run of something else.
    """
    done = _prepare(path, header, resume)
    if _case_ids(path) != [case.case_id for case in cases[:done]]:
        raise DataError(
            f"{path} does not hold the first {done} cases of this run in order: start another file"
        )
    before = Kept(header["model"]["fingerprint"], judge)
    bar = tqdm(cases[done:], initial=done, total=len(cases), desc=f"{header['label']}", unit="case")
    with explained(path), path.open("a", encoding="utf-8") as stream:
        for case in bar:
            append_line(stream, path, json.dumps(run_case(case, method, judge, before), sort_keys=True))


def run_case(case: BenchCase, method: BenchMethod, judge: Judge, before: Kept) -> CaseRecord:
    """Judge, edit, judge again, take back.

    Raises:
        EditError: if taking the edit back did not give the same weights, which would spoil all cases to come.
    """
    record: CaseRecord = {
        "alg_name": str(method.settings["alg_name"]),
        "case_id": case.case_id,
        "subject": case.subject,
        "prompt": case.prompt,
        "target_new": case.target_new,
    }
    adapter, began = method.adapter, time.perf_counter()
    try:
        record["pre"] = before.get(adapter, case)
        record["n_tokens"] = scores(record["pre"]["multi_step"]["rewrite"])[0]["n_tokens"]
        record["history"] = {"pre": history(adapter, case, judge.decode)}
        judged = time.perf_counter()
        with peak_memory(adapter.device) as peak:
            (record["edit"],), undo = method.edit([case])
        edited = time.perf_counter()
        try:
            record["post"] = judge.judge(adapter, case)
            record["post"] |= kept(record["pre"], record["post"])
            record["history"]["post"] = history(adapter, case, judge.decode)
        finally:
            undo()
        end = time.perf_counter()
        record["time"] = {
            "edit_seconds": edited - judged,
            **({"edit_peak_bytes": peak[0]} if peak else {}),
            "evaluation_seconds": end - edited + judged - began,
        }
    except EditError:
        raise
    except (EasyEditMDMError, torch.cuda.OutOfMemoryError, ValueError, RuntimeError) as error:
        record["error"] = f"{type(error).__name__}: {error}"
    return record


class Kept:
    """Evaluations of the unedited model, kept in the user's cache folder: once for each model and judge,
    whatever the method.
    """

    def __init__(self, model: str, judge: Judge):
        self.judge = judge
        settings = json.dumps([model, judge.settings()], sort_keys=True)
        self.path = cache_folder() / f"before-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.jsonl"
        self.known = dict(_kept_lines(self.path))

    def get(self, adapter: Any, case: BenchCase) -> Judgement:
        """The evaluation of a case, measured now if it is not known."""
        key = hashlib.sha256(repr(replace(case, case_id=0)).encode()).hexdigest()
        if key not in self.known:
            self.known[key] = json.loads(json.dumps(self.judge.judge(adapter, case)))
            self._note(key)
        return json.loads(json.dumps(self.known[key]))

    def _note(self, key: str) -> None:
        """A line more, on a line of its own whatever a killed process left behind."""
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = (
                self.path.exists()
                and not self.path.read_bytes().endswith((b"\n",))
                and self.path.stat().st_size > 0
            )
            with self.path.open("a", encoding="utf-8") as stream:
                append_line(
                    stream,
                    self.path,
                    ("\n" if torn else "") + json.dumps({"key": key, "value": self.known[key]}),
                )


def _kept_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Whole lines of a file of kept evaluations; what several processes tore is measured again."""
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry["key"], str) and isinstance(entry["value"], dict):
                    yield entry["key"], entry["value"]


def judge_of(config: BenchConfig, method: BenchMethod) -> Judge:
    """What a run measures."""
    name = config.held_out or ("twins" if str(method.settings["model_name"]) in TWINS else None)
    texts: tuple[str, ...] = ()
    if name:
        lines = [
            line
            for document in text_source(name).documents()
            for line in document.splitlines()
            if len(line.split()) > 5
        ]
        texts = tuple(" ".join(line.split()[:HELD_OUT_WORDS]) for line in lines[-HELD_OUT_TEXTS:])
    return Judge(
        DecodeConfig(**method.decode),
        rungs=not config.light,
        fluency=config.fluency and not config.light,
        held_out=texts,
        decodings=config.decodings and config.light,
    )


def header_of(config: BenchConfig, method: BenchMethod, loaded: Loaded, judge: Judge) -> Header:
    """Everything that determines the result."""
    adapter = method.adapter
    schedule = method.settings.get("state_schedule", "") if adapter.denoises else ""
    name = str(method.settings["model_name"])
    return {
        "header": True,
        "version": __version__,
        "label": config.label or " ".join(filter(None, (name.rsplit("/", 1)[-1], config.alg_name, schedule))),
        "alg_name": config.alg_name,
        "mode": config.mode,
        "hparams": json.loads(json.dumps(method.settings, default=str)),
        "model": {"name": name, "fingerprint": model_fingerprint(adapter.native),
            "paradigm": adapter.spec.paradigm, "family": adapter.spec.name},
        "dataset": {
            "name": config.dataset, "files": loaded.files, "limit": config.limit, "seed": config.seed,
            "cases": len(loaded.cases),
            "skipped": [{"record": s.record, "reason": s.reason} for s in loaded.skipped],
        },
        "judge": judge.settings(),
        "decode": judge.decode.record(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip


def _as_now(header_then: Mapping[str, Any], header: Header) -> Mapping[str, Any]:
    """The header of an earlier version's run, with the hyperparameters that have come since at their
    defaults: what it was run with.
    """
    header_then = {"mode": "each", **header_then}  # the only one there was
    name, settings = str(header_then.get("alg_name")), header_then.get("hparams")
    if name not in METHODS or not isinstance(settings, dict):
        return header_then
    now = METHODS[name].hparams.as_now(settings)
    asked = {k: v for k, v in now.items() if k in settings or k in header["hparams"]}
    return {**header_then, "hparams": asked}


def _prepare(path: Path, header: Header, resume: bool) -> int:
    """Make the file, or cut a half-written last line off it; returns the number of finished cases.

    Raises:
        DataError: if the file holds a run of something else.
    """
    if not (resume and path.exists() and b"\n" in path.read_bytes().lstrip()):
        write_text(path, json.dumps(header, sort_keys=True) + "\n")
        return 0
    data = path.read_bytes()
    whole = data[: data.rindex(b"\n") + 1]  # with the header at least
    lines = _records(whole, path)
    written = _as_now(lines[0], header)
    if written != header:
        changed = [
            _which(key, written.get(key), now) for key, now in header.items() if written.get(key) != now
        ]
        raise DataError(
            f"{path} is a run of something else ({', '.join(changed)} differ): give another --out, or the"
            " settings it was begun with"
        )
    if len(whole) < len(data):
        with explained(path), path.open("r+b") as stream:
            stream.truncate(len(whole))
            os.fsync(stream.fileno())
    return len(lines) - 1


def _which(key: str, before: Any, now: Any) -> str:
    """What differs under a key of the header: the fields in it, where there are any."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return key
    fields = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return f"{key}: {', '.join(fields)}"


def _records(data: bytes, path: Path) -> list[dict[str, Any]]:
    return [record for _, record in run_lines(data, path)]


def _case_ids(path: Path) -> list[Any]:
    return [record.get("case_id") for record in _records(path.read_bytes(), path)[1:]]


# where launchers say how many processes there are: torchrun and `accelerate launch` on GPUs, then the MPIs
# that it uses on CPUs
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if all(int(os.environ.get(name) or 1) <= 1 for name in _SIZES):
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def _wait() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def _is_whole(path: Path, header: Header, cases: list[BenchCase]) -> bool:
    data = path.read_bytes()
    return (
        data.endswith(b"\n")
        and len(records := _records(data, path)) == len(cases) + 1
        and records[0] == header
    )


def _merge(path: Path, header: Header, cases: list[BenchCase], world: int) -> None:
    """The parts' lines in input order, written whole or not at all."""
    parts = [path.with_name(f"{path.name}.part-{rank}-of-{world}") for rank in range(world)]
    if not all(part.exists() for part in parts):
        return  # finished before, by a run that merged them
    lines = [part.read_text(encoding="utf-8").splitlines()[1:] for part in parts]
    merged = [lines[i % world][i // world] for i in range(len(cases))]
    write_text(path, "\n".join([json.dumps(header, sort_keys=True), *merged]) + "\n")
    for part in parts:
        part.unlink()
