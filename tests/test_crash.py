"""Killed at any point, a run goes on to the same result; files are whole or not there; full disks and closed folders say what to do."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from easyedit_mdm.common import files
from easyedit_mdm.common.files import new_folder, replacing, write_json, write_tensors, write_text
from easyedit_mdm.editing.hparams import find_hparams
from easyedit_mdm.errors import DataError, FileError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.summaries import summary
from easyedit_mdm.runs.run import BenchConfig, bench
from easyedit_mdm.statistics import moments_for
from easyedit_mdm.twins.folders import twin_folder

SHORT, LONG = 4, 50
needs_processes = pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a server of processes")
NO_PLACE = Path("/sys/kernel/easyedit_mdm") if Path("/sys/kernel").is_dir() else None


def _run(make: Callable[..., Callable[[], object]], arguments: tuple) -> None:
    """What a child does."""
    torch.set_num_threads(1)
    make(*arguments)()


def in_child(make: Callable[..., Callable[[], object]], *arguments: object, kill_after: float | None = None) -> bool:
    """Run `make(*arguments)()` in a process of its own, killing it (SIGKILL) after some seconds; whether it ended by itself.

    The processes are forked from a server that has imported the libraries and done nothing: a fork of this process would inherit the
    locks that its other threads (progress bars, OpenMP) happen to hold.
    """
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(["easyedit_mdm.runs.run", "easyedit_mdm.statistics", "transformers.models.auto"])
    child = children.Process(target=_run, args=(make, arguments))
    child.start()
    if kill_after is not None:
        time.sleep(kill_after)
        child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "the run itself failed"
    return child.exitcode == 0


def without_times(value):
    """A record without what varies between runs."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "time" not in k and "seconds" not in k}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def bench_run(folder: Path, hparams: str) -> Callable[[], object]:
    """A bench of two cases with everything in one folder; goes on where it was cut off."""

    def work() -> None:
        os.environ["EASYEDIT_MDM_CACHE"] = str(folder / "cache")
        bench(BenchConfig("ROME_MDM", hparams, "twins_validation", limit=2, light=True), folder / "run.jsonl", resume=True)

    return work


def bench_result(folder: Path) -> tuple:
    """What a finished bench holds: its lines, and the summary of the report."""
    lines = [without_times(json.loads(line)) for line in (folder / "run.jsonl").read_text().splitlines()]
    run = read_run(folder / "run.jsonl")
    told = summary(run, seed=0, resamples=50)
    return lines, without_times({k: v for k, v in told.items() if k not in ("file", "path")})


def stats_run(folder: Path, model: Path) -> Callable[[], object]:
    """A collection with a checkpoint after every batch."""

    def work() -> None:
        from easyedit_mdm import load_model

        adapter = load_model(model, dtype="float32")
        moments_for(adapter, [adapter.site(0)], "twins", 3000, folder / "stats", 0, 32, checkpoint_every=0.0)

    return work


def stats_result(folder: Path) -> dict[str, bytes]:
    """Every file of a finished collection."""
    return {path.name: path.read_bytes() for path in (folder / "stats").iterdir()}


def kills(points: int, make: Callable[..., Callable[[], object]], model: object, result: Callable[[Path], object], folder: Path) -> int:
    """Start, kill at a random moment, resume: the result of a run that was left alone, each time. Returns how many were killed at work."""
    for name in ("whole", "timed"):  # the first one also starts the server of processes
        (folder / name).mkdir()
        began = time.monotonic()
        assert in_child(make, folder / name, model)
    length, wanted, rng, struck = time.monotonic() - began, result(folder / "whole"), random.Random(0), 0
    for number in range(points):
        here = folder / str(number)
        here.mkdir()
        struck += not in_child(make, here, model, kill_after=rng.uniform(0.02, 0.95) * length)
        assert in_child(make, here, model), "and the second time to the end"
        assert result(here) == wanted, f"killed at point {number}"
        assert not [p for p in here.rglob("*") if p.name.endswith((".part", ".tmp"))], "nothing is left lying about"
    return struck


@pytest.fixture
def quick(tmp_path) -> str:
    """A file with few optimiser steps."""
    text = find_hparams("ROME_MDM/twin-llama").read_text().replace("v_num_grad_steps: 50", "v_num_grad_steps: 2")
    (tmp_path / "quick.yaml").write_text(text.replace("mom2_adjustment: true", "mom2_adjustment: false"))
    return str(tmp_path / "quick.yaml")


@needs_processes
def test_bench_killed(tmp_path, quick):
    """kill -9 at random points of a bench."""
    assert kills(SHORT, bench_run, quick, bench_result, tmp_path) >= 2


@needs_processes
def test_statistics_killed(tmp_path):
    """kill -9 at random points of a collection: the same bytes."""
    assert kills(SHORT, stats_run, twin_folder("twin-llama"), stats_result, tmp_path) >= 2


@pytest.mark.long
@needs_processes
def test_bench_killed_at_fifty_points(tmp_path, quick):
    """As above, fifty times."""
    assert kills(LONG, bench_run, quick, bench_result, tmp_path) >= LONG // 2


@pytest.mark.long
@needs_processes
def test_statistics_killed_at_fifty_points(tmp_path):
    """As above, fifty times."""
    assert kills(LONG, stats_run, twin_folder("twin-llama"), stats_result, tmp_path) >= LONG // 2


# ---- whole or not at all -------------------------------------------------------------------------------------------------------------


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
    assert json.loads(file.read_text())["b"] == [1, None] and [p.name for p in tmp_path.iterdir()] == ["a.json"]
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
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f".a.txt.{host}-{os.getppid()}.part", "a.txt"])


def test_disk_full(tmp_path, monkeypatch):
    """Says so, and what to do; the old file is still there."""
    write_text(tmp_path / "a.txt", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(FileError, match="a.txt cannot be written: the disk is full"):
            write_text(tmp_path / "a.txt", "new")
    with monkeypatch.context() as patch:
        message = f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"
        patch.setattr("safetensors.torch.save_file", lambda *a, **k: (_ for _ in ()).throw(SafetensorError(message)))
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
    for write in (lambda: write_text(place, "x"), lambda: bench(BenchConfig("ROME_MDM", quick, "twins_validation"), place / "out" / "run.jsonl")):
        with pytest.raises(FileError, match="cannot be written: (this folder|the disk is mounted|a folder on the way|.*not permitted)"):
            write()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="a file stands where a folder should be"):
        write_text(tmp_path / "file" / "x", "x")


@pytest.mark.parametrize(("line", "number"), [('{"case_id": 0, "post"', 2), ("[1]", 2), ("\udcff", 2), ('{"header"', 1)])
def test_a_broken_line_is_named(tmp_path, quick, line, number):
    """File, line and what to do, when a run is resumed."""
    path = tmp_path / "run.jsonl"
    work = BenchConfig("ROME_MDM", quick, "twins_validation", limit=1, light=True)
    bench(work, path)
    whole = path.read_text().splitlines()
    whole[number - 1 : number] = [line]
    path.write_bytes(("\n".join(whole) + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=f"line {number}"):
        bench(work, path, resume=True)
