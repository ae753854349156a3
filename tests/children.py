"""Processes of their own that start at once: forked from a server that has imported the libraries and done
nothing else.

A fork of the tests' own process would inherit the locks that its other threads (progress bars, OpenMP) happen
to hold; a new Python spends seconds on imports. The server is started once for each process that runs tests.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

PRELOADED = [
    "easyedit_mdm.runs.sweep", "easyedit_mdm.cli.edits", "easyedit_mdm.statistics", "accelerate",
    "transformers.models.auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
]  # fmt: skip
needs_processes = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a server of processes"
)


def _run(
    work: Callable[..., object], arguments: tuple, environment: Mapping[str, str], errors: Path | None
) -> None:
    """What a child does; its standard error goes into a file."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    work(*arguments)


def start(
    work: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, str] = {},
    errors: Path | None = None,
) -> BaseProcess:
    """Start `work(*arguments)`, a function of a module of tests, in a process of its own."""
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(PRELOADED)
    child = children.Process(target=_run, args=(work, arguments, dict(environment), errors))
    child.start()
    return child


def changes_seen(
    child: BaseProcess,
    folder: Path,
    kill_at: int | None = None,
    pause: float = 0.002,
    later: float = 0.0,
) -> int:
    """Watch a folder until the child ends; kill the child (SIGKILL) at a change of the folder (a file more,
    gone, or written to), or so many seconds later. At 0 changes: so many seconds after the start.

    Returns:
        how many changes there were.
    """
    before, seen, struck = snapshot(folder), 0, False
    while child.is_alive():
        now = snapshot(folder)
        if now != before:
            before, seen = now, seen + 1
        if kill_at is not None and seen >= kill_at and not struck:
            time.sleep(later)
            child.kill()
            struck = True
        time.sleep(pause)
    child.join()
    return seen


def snapshot(folder: Path) -> set[tuple[str, int, int]]:
    """Every file with its size and time."""
    found = set()
    for place, folders, names in os.walk(folder):  # passes over folders that are gone since they were listed
        for path in (Path(place, name) for name in [*folders, *names]):
            try:
                told = path.stat()
            except FileNotFoundError:
                continue
            found.add((str(path), told.st_size, told.st_mtime_ns))
    return found
