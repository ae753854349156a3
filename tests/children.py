"""Processes of their own that start at once: forked from a server that has imported the libraries and done
nothing else.

A fork of the tests' own process would inherit the locks that its other threads (progress bars, OpenMP) happen
to hold; a new Python spends seconds on imports. The server is started once for each process that runs tests.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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


# what changes files, as `sys.addaudithook` names it
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND


@dataclass(frozen=True)
class Stroke:
    """Where a child kills itself (SIGKILL).

    Attributes:
        folder: whose changes are counted: a file opened to be written, brought to disk, renamed or removed.
        at: the number of the change, counted from 0, that it dies in front of; None: only count.
        later: seconds after it, in which the child may end by itself.
        seen: the number of changes so far, which the parent reads.
    """

    folder: Path
    at: int | None
    later: float
    seen: Any

    def arm(self) -> None:
        """Count from here on, in this process."""
        numbers, sync = itertools.count(), os.fsync

        def change() -> None:
            number = next(numbers)
            self.seen.value = number + 1
            if number == self.at and self.later:
                threading.Timer(self.later, os.kill, (os.getpid(), signal.SIGKILL)).start()
            elif number == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

        def heard(event: str, arguments: tuple) -> None:
            if event in CHANGES and self._ours(arguments[0]):
                if event != "open" or arguments[2] & WRITING:
                    change()

        def synced(handle: int) -> None:
            change()
            sync(handle)

        os.fsync = synced
        sys.addaudithook(heard)

    def _ours(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(str(self.folder))


def counted(folder: Path, at: int | None = None, later: float = 0.0) -> Stroke:
    """A stroke for a child that is started next."""
    seen = multiprocessing.get_context("forkserver").Value("q", 0, lock=False)
    return Stroke(folder, at, later, seen)


def _run(
    work: Callable[..., object],
    arguments: tuple,
    environment: Mapping[str, str],
    errors: Path | None,
    stroke: Stroke | None,
) -> None:
    """What a child does; its standard error goes into a file."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    if stroke is not None:
        stroke.arm()
    work(*arguments)


def start(
    work: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, str] = {},
    errors: Path | None = None,
    stroke: Stroke | None = None,
) -> BaseProcess:
    """Start `work(*arguments)`, a function of a module of tests, in a process of its own."""
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(PRELOADED)
    child = children.Process(target=_run, args=(work, arguments, dict(environment), errors, stroke))
    child.start()
    return child
