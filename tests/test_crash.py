"""Killed at any point, a run goes on to the same result; files are whole or not there; full disks and closed
folders say what to do.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import counted, needs_processes, start
from safetensors import SafetensorError

from easyedit_mdm.cli.edits import GuardOptions, new_edit
from easyedit_mdm.common import files
from easyedit_mdm.common.files import new_folder, replacing, write_json, write_tensors, write_text
from easyedit_mdm.editing.hparams import find_hparams
from easyedit_mdm.errors import DataError, FileError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.summaries import summary
from easyedit_mdm.runs.run import BenchConfig, bench
from easyedit_mdm.runs.sweep import SweepJob, sweep
from easyedit_mdm.statistics import moments_for
from easyedit_mdm.tracing import TraceConfig
from easyedit_mdm.tracing.job import TraceJob, trace
from easyedit_mdm.twins.folders import twin_folder

SHORT = 4
LATER = 0.2
# points at which the long form kills each command, 200 in all; EASYEDIT_MDM_KILLS takes a share of them
LONG = {"bench": 60, "sequential": 40, "stats": 40, "sweep": 20, "edit": 20, "trace": 20}
SHARE = int(os.environ.get("EASYEDIT_MDM_KILLS", "200")) / sum(LONG.values())
NO_PLACE = Path("/sys/kernel/easyedit_mdm") if Path("/sys/kernel").is_dir() else None


def without_times(value):
    """A record without what varies between runs."""
    if isinstance(value, dict):
        varying = ("time", "seconds", "peak_bytes")
        return {k: without_times(v) for k, v in value.items() if not any(part in k for part in varying)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def asked(folder: Path, hparams: str, **more: Any) -> BenchConfig:
    """Three cases that are judged in no time, with everything in one folder."""
    os.environ["EASYEDIT_MDM_CACHE"] = str(folder / "cache")
    data = folder.parent / "data.json"
    facts = [{"prompt": "Where was Zano born?", "subject": "Zano"} for _ in range(3)]
    named = [{**fact, "target_new": t} for fact, t in zip(facts, ("Pute", "Zoter", "Gugim"))]
    data.write_text(json.dumps(named))
    return BenchConfig("ROME_MDM", hparams, "requests", data_file=str(data), light=True, **more)


def bench_run(folder: Path, hparams: str) -> None:
    """A bench that goes on where it was cut off."""
    bench(asked(folder, hparams), folder / "run.jsonl", resume=True)


def sequential_run(folder: Path, hparams: str) -> None:
    """The same, the edits staying in the model."""
    more = {"mode": "sequential", "batch_size": 1}
    bench(asked(folder, hparams, **more), folder / "run.jsonl", resume=True)


def sweep_run(folder: Path, hparams: str) -> None:
    """A sweep over two layers, which goes on with the same command."""
    sweep(SweepJob(asked(folder, hparams, limit=1), [1, 2], trace_limit=1), folder / "sweep")


def sweep_result(folder: Path) -> tuple:
    """The run files and the report."""
    runs = sorted((folder / "sweep" / "runs").iterdir())
    lines = [without_times(json.loads(line)) for run in runs for line in run.read_text().splitlines()]
    return lines, without_times(json.loads((folder / "sweep" / "sweep.json").read_text()))


def edit_run(folder: Path, hparams: str) -> None:
    """An edit, unless it is there whole."""
    os.environ["EASYEDIT_MDM_CACHE"] = str(folder / "cache")
    fact = {"prompt": "Where was Zano born?", "subject": "Zano", "target_new": "Pute"}
    if not (folder / "edit").exists():
        new_edit(hparams, [fact], folder / "edit", guard=GuardOptions(on=False), keep_failed=True)


def edit_result(folder: Path) -> dict[str, bytes]:
    """Its files."""
    return {path.name: path.read_bytes() for path in (folder / "edit").iterdir()}


def trace_run(folder: Path, model: str) -> None:
    """A trace, which begins anew."""
    job = TraceJob([model], "Where was Zano born?", "Zano")
    trace(job, folder / "trace", TraceConfig(samples=1), resamples=2)


def trace_result(folder: Path) -> tuple:
    """What it says, and which files there are."""
    told = json.loads((folder / "trace" / "trace.json").read_text())
    return without_times(told), sorted(path.name for path in (folder / "trace").iterdir())


def bench_result(folder: Path) -> tuple:
    """What a finished bench holds: its lines, and the summary of the report."""
    lines = [without_times(json.loads(line)) for line in (folder / "run.jsonl").read_text().splitlines()]
    run = read_run(folder / "run.jsonl")
    told = summary(run, seed=0, resamples=50)
    return lines, without_times({k: v for k, v in told.items() if k not in ("file", "path")})


def stats_run(folder: Path, model: Path) -> None:
    """A collection with a checkpoint after every batch."""
    from easyedit_mdm import load_model

    adapter = load_model(model, dtype="float32")
    moments_for(adapter, [adapter.site(0)], "twins", 3000, folder / "stats", 0, 32, checkpoint_every=0.0)


def stats_result(folder: Path) -> dict[str, bytes]:
    """Every file of a finished collection; a lock may outlive its process, it holds nothing."""
    return {p.name: p.read_bytes() for p in (folder / "stats").iterdir() if p.suffix != ".lock"}


def kills(
    points: int,
    work: Callable[[Path, Any], object],
    model: object,
    result: Callable[[Path], object],
    folder: Path,
) -> int:
    """Start, kill when the files have come so far, resume: the result of a run that was left alone, each
    time. Returns how many struck.

    A moment is a number of changes of the files, which a slow machine comes through as a fast one does: each
    second point dies right there. The others live up to LATER seconds more, in which some end by themselves.
    """

    def run(here: Path, kill_at: int | None = None, later: float = 0.0) -> tuple[bool, int]:
        """Whether it ended by itself, and the changes seen."""
        stroke = counted(here, kill_at, later)
        child = start(work, here, model, stroke=stroke)
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL), "the run itself failed"
        return child.exitcode == 0, stroke.seen.value

    (folder / "whole").mkdir()
    length = run(folder / "whole")[1]
    wanted, rng, struck = result(folder / "whole"), random.Random(0), 0
    for number in range(points):
        here = folder / str(number)
        here.mkdir()
        moment = int((number + rng.random()) / points * length)
        struck += not run(here, moment, rng.random() * LATER * (number % 2))[0]
        assert run(here)[0], "and the second time to the end"
        assert result(here) == wanted, f"killed at point {number}"
        assert not [p for p in here.rglob("*") if p.name.endswith((".part", ".tmp"))], (
            "nothing is left lying about"
        )
    return struck


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> str:
    """A file with few optimiser steps."""
    text = (
        find_hparams("ROME_MDM/twin-llama").read_text().replace("v_num_grad_steps: 50", "v_num_grad_steps: 2")
    )
    file = tmp_path_factory.mktemp("quick") / "quick.yaml"
    file.write_text(text.replace("mom2_adjustment: true", "mom2_adjustment: false"))
    return str(file)


@pytest.mark.end_to_end
@needs_processes
def test_bench_killed(tmp_path, quick):
    """kill -9 at random points of a bench."""
    assert kills(SHORT, bench_run, quick, bench_result, tmp_path) >= 2


@pytest.mark.end_to_end
@needs_processes
def test_statistics_killed(tmp_path):
    """kill -9 at random points of a collection: the same bytes."""
    assert kills(SHORT, stats_run, twin_folder("twin-llama"), stats_result, tmp_path) >= 2


@pytest.mark.long
@needs_processes
@pytest.mark.parametrize("command", list(LONG))
def test_killed_at_two_hundred_points(tmp_path, quick, capsys, command):
    """As above, for every long command, and how many kills struck."""
    work, result = {
        "bench": (bench_run, bench_result),
        "sequential": (sequential_run, bench_result),
        "stats": (stats_run, stats_result),
        "sweep": (sweep_run, sweep_result),
        "edit": (edit_run, edit_result),
        "trace": (trace_run, trace_result),
    }[command]
    model = {"stats": twin_folder("twin-llama"), "trace": "twin-llama"}.get(command, quick)
    points = max(2, round(SHARE * LONG[command]))
    struck = kills(points, work, model, result, tmp_path)
    with capsys.disabled():
        print(f"\n{command}: killed at {struck} of {points} points, the same result each time")
    assert struck >= points // 2


# ---- whole or not at all -----------------------------------------------------------------------------------


def test_a_file_is_replaced_in_one_step(tmp_path):
    """What fails while it is written leaves the old file, and nothing else."""
    file = tmp_path / "a.json"
    write_json(file, {"a": float("inf"), "b": [1, float("nan")], 3: Path("x")})
    assert json.loads(file.read_text()) == {"a": None, "b": [1, None], "3": "x"}
    for problem in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(problem):
            with replacing(file) as part:
                part.write_text("half")
                raise problem
    assert json.loads(file.read_text())["b"] == [1, None] and [p.name for p in tmp_path.iterdir()] == [
        "a.json"
    ]
    with pytest.raises(RuntimeError):
        with new_folder(tmp_path / "new") as part:
            (part / "x").write_text("half")
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with new_folder(tmp_path / "new") as part:
        (part / "x").write_text("whole")
    assert (tmp_path / "new" / "x").read_text() == "whole"
    with pytest.raises(FileError, match="nothing is ever overwritten"):
        with new_folder(tmp_path / "new"):
            pass


def test_what_killed_processes_left_is_swept(tmp_path):
    """Temporary files of processes that are no more go with the next writing; those of living ones stay."""
    host, dead = files.socket.gethostname(), 2**22 + 17
    (tmp_path / f".a.txt.{host}-{dead}.part").write_text("half")
    (tmp_path / f".a.txt.{host}-{os.getppid()}.part").write_text("at work")
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f".a.txt.{host}-{os.getppid()}.part", "a.txt"]
    )


def test_disk_full(tmp_path, monkeypatch):
    """Says so, and what to do; the old file is still there."""
    write_text(tmp_path / "a.txt", "old")
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        )
        with pytest.raises(FileError, match="a.txt cannot be written: the disk is full"):
            write_text(tmp_path / "a.txt", "new")
    with monkeypatch.context() as patch:
        message = f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"
        patch.setattr(
            "safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(SafetensorError(message))
        )
        with pytest.raises(FileError, match="the disk is full"):
            write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_in_the_middle_of_a_run():
    """A line that does not fit."""
    with pytest.raises(FileError, match="/dev/full cannot be written: the disk is full"):
        with files.explained(Path("/dev/full")), open("/dev/full", "a") as stream:
            files.append_line(stream, Path("/dev/full"), "x" * 100_000)


def test_a_folder_that_may_not_be_written(tmp_path, quick):
    """Said by the bench before any work, and by everything that writes."""
    if os.geteuid() == 0 and NO_PLACE is None:
        pytest.skip("root may write everywhere")
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    place = NO_PLACE if os.geteuid() == 0 else closed / "x"
    for write in (
        lambda: write_text(place, "x"),
        lambda: bench(BenchConfig("ROME_MDM", quick, "twins_validation"), place / "out" / "run.jsonl"),
    ):
        with pytest.raises(
            FileError,
            match="cannot be written: (this folder|the disk is mounted|a folder on the way|.*not permitted)",
        ):
            write()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="a file stands where a folder should be"):
        write_text(tmp_path / "file" / "x", "x")


@pytest.fixture(scope="module")
def finished(quick, tmp_path_factory) -> tuple[BenchConfig, list[str]]:
    """A run of one case, and its lines."""
    folder = tmp_path_factory.mktemp("finished")
    work = BenchConfig("ROME_MDM", quick, "twins_validation", limit=1, light=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYEDIT_MDM_CACHE", str(folder / "cache"))
        bench(work, folder / "run.jsonl")
    return work, (folder / "run.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("line", "number", "says"),
    [
        ('{"case_id": 0, "post"', 2, "not JSON .*delete this line"),
        ("[1]", 2, "list, not a JSON object"),
        ("\udcff", 2, "not JSON .*delete this line"),
        ('{"header"', 1, "not JSON .*start the run again"),
    ],
)
def test_a_broken_line_is_named(tmp_path, finished, line, number, says):
    """File, line and what to do, when a run is resumed."""
    work, lines = finished
    lines = [*lines[: number - 1], line, *lines[number:]]
    path = tmp_path / "run.jsonl"
    path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=f"run.jsonl, line {number}: {says}"):
        bench(work, path, resume=True)
