"""One writer at a time: a lock beside what is written, which says who holds it and ends with its process."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from easyedit_mdm.common.files import explained
from easyedit_mdm.errors import FileError

PAUSE = 0.2  # seconds between two looks at a lock that another process holds


@contextmanager
def only_writer(path: str | Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `path` for the length of the block.

    The lock is the operating system's (flock) on a hidden file beside `path`: a process that is killed lets
    go of it, and no clock is asked.

    Args:
        wait: wait for a process that holds the lock, and log who that is, instead of raising an error.

    Raises:
        FileError: if another process holds it, naming that process; or if no file can be written there.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.lock")
    announced, made = False, not path.parent.exists()
    with explained(path):
        while (handle := _taken(beside)) is None:
            holder = _holder(beside)
            if not wait:
                raise FileError(f"{path} is being written by {holder}: wait for it, or give another place")
            if not announced:
                logging.getLogger(__name__).warning("waiting for %s, which writes %s", holder, path)
            announced = True
            time.sleep(PAUSE)
    try:
        with _signed(handle, beside):
            yield
    finally:
        if made:
            with suppress(OSError):  # nothing was written into it
                path.parent.rmdir()


@contextmanager
def writing_alone(path: str | Path) -> Iterator[bool]:
    """As `only_writer`, but gives whether the lock could be had: False if another process holds it.

    Raises:
        FileError: if no file can be written there.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.lock")
    with explained(path):
        handle = _taken(beside)
    if handle is None:
        yield False
        return
    with _signed(handle, beside):
        yield True


@contextmanager
def _signed(handle: int, beside: Path) -> Iterator[None]:
    """A lock that is held: it says by whom, and is let go of at the end."""
    try:
        with explained(beside):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):  # the next one makes it again
            beside.unlink()
        os.close(handle)


def _taken(beside: Path) -> int | None:
    """The open and locked file; None if another process holds it, or has just let go of it and removed it."""
    import fcntl

    beside.parent.mkdir(parents=True, exist_ok=True)  # who held it may have taken its empty folder away
    try:
        handle = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == beside.stat().st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _holder(beside: Path) -> str:
    with suppress(OSError):
        return beside.read_text(encoding="utf-8", errors="replace")[:200].strip() or "another process"
    return "another process"
