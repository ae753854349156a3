"""Two processes that write the same thing: one of them does, and the other is told who."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
from test_edits import quick_file

from easyedit_mdm.cli import main
from easyedit_mdm.cli.statistics import collect_statistics
from easyedit_mdm.common import locks
from easyedit_mdm.common.locks import only_writer
from easyedit_mdm.errors import FileError
from easyedit_mdm.host.statistics import _wrapped
from easyedit_mdm.statistics import moments_for, store

FACT = ["--prompt", "Tamos Latre was born in", "--subject", "Tamos Latre"]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of standard error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("easyedit-mdm:")]
    return line


@pytest.mark.parametrize("command", ["edit", "sweep", "trace"])
def test_a_second_one_is_refused(tmp_path, capsys, command):
    """Before any work, with the holder's name; nothing is written."""
    out, hparams = tmp_path / "out", quick_file(tmp_path)
    asked = {
        "edit": ["--hparams", hparams, *FACT, "--target", "Zopago Zemo", "--save", str(out)],
        "sweep": ["--alg", "ROME_MDM", "--hparams", hparams, "--dataset", "twins_validation", "--limit", "1"]
        + ["--layers", "1", "--out", str(out)],
        "trace": ["--model", "twin-llama", *FACT, "--out", str(out)],
    }[command]
    held = {"edit": out, "sweep": out / "sweep.json", "trace": out / "trace.json"}[command]
    with only_writer(held):
        assert main([command, *asked]) != 0
        assert f"is being written by process {os.getpid()} on " in told(capsys)
        assert {path.suffix for path in out.rglob("*")} <= {".lock"}
    assert not [path for path in tmp_path.rglob(".*.lock") if path.is_file()], "a lock goes with its holder"


def test_stats_asked_for_twice(tmp_path, monkeypatch):
    """A second `stats` of the same while the first collects."""
    asked = ("twin-llama", "twins", [1], 1500)
    real, seen = store.collect, []

    def meanwhile(*arguments, **more):
        monkeypatch.setattr(store, "collect", real)
        with pytest.raises(FileError, match=rf"unfinished-.* is being written by process {os.getpid()} on "):
            collect_statistics(*asked, folder=tmp_path)
        seen.append(True)
        return real(*arguments, **more)

    monkeypatch.setattr(store, "collect", meanwhile)
    collect_statistics(*asked, folder=tmp_path)
    assert seen and len(list(tmp_path.iterdir())) == 1


def beside(work, caplog) -> threading.Thread:
    """A thread that does some work, once it has said that it waits for somebody."""
    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() and "waiting for process" not in caplog.text:
        thread.join(0.01)
    return thread


def test_statistics_of_an_edit_wait(tiny, tmp_path, monkeypatch, caplog):
    """What another process collects is waited for and read, not collected again."""
    monkeypatch.setattr(locks, "PAUSE", 0.01)
    caplog.set_level(logging.WARNING)
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 100)
    real, calls, threads, found = store.collect, [], [], []

    def work() -> None:
        model = tiny("llada")
        found.extend(moments_for(model, [model.site(1)], tmp_path / "text.txt", 200, tmp_path / "s"))

    def meanwhile(*arguments, **more):
        calls.append(1)
        if len(calls) == 1:
            threads.append(beside(work, caplog))
        return real(*arguments, **more)

    monkeypatch.setattr(store, "collect", meanwhile)
    work()
    threads[0].join()
    assert len(calls) == 1 and len(found) == 2 and found[0].moment.equal(found[1].moment)
    assert f"waiting for process {os.getpid()} on " in caplog.text


def test_easyedits_own_statistics_wait(tmp_path, monkeypatch, caplog):
    """EasyEdit writes its file in place: one process at a time."""
    monkeypatch.setattr(locks, "PAUSE", 0.01)
    caplog.set_level(logging.WARNING)
    at_work, most, threads = [], [], []

    def theirs(*_, **__):
        at_work.append(1)
        most.append(len(at_work))
        if not threads:
            threads.append(beside(work, caplog))
        at_work.pop()

    def work() -> None:
        _wrapped(theirs)(None, None, "layers.1.mlp", tmp_path / "stats", "wikipedia", ["mom2"])

    work()
    threads[0].join()
    assert most == [1, 1] and not list(tmp_path.glob("stats/*"))


def test_a_folder_that_can_only_be_read(tmp_path, monkeypatch):
    """Statistics of EasyEdit that lie ready in it are read without a lock."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    ready = _wrapped(lambda *_, **__: "ready")
    assert ready(None, None, "layers.1.mlp", tmp_path, "wikipedia", ["mom2"]) == "ready"
    assert not list(tmp_path.iterdir())


def test_a_lock_that_has_just_been_let_go(tmp_path, monkeypatch):
    """Who opened the file before its holder removed it does not hold the lock: the next one would, too."""
    path = tmp_path / "a"
    real, opened = os.open, []

    def removed(name, *more):
        handle = real(name, *more)
        if not opened:
            Path(name).unlink()
            opened.append(name)
        return handle

    monkeypatch.setattr(os, "open", removed)
    with only_writer(path, wait=True):
        monkeypatch.setattr(os, "open", real)
        with pytest.raises(FileError, match="is being written by process"), only_writer(path):
            pass
