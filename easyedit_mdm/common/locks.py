"""One writer at a time: a lock beside what is written, which says who holds it and ends with its process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from easyedit_mdm.common.files import explained
from easyedit_mdm.errors import FileError


@contextmanager
def only_writer(path: str | Path) -> Iterator[None]:
    """Hold the lock of `path` for the length of the block.

    The lock is the operating system's (flock) on a hidden file beside `path`: a process that is killed lets
    go of it.

    Raises:
        FileError: if another process holds it, naming that process; or if no file can be written there.
    """
    import fcntl

    path = Path(path)
    beside = path.with_name(f".{path.name}.lock")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise FileError(
                f"{path} is being written by {holder}: wait for it, or give another place"
            ) from None
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # the next one makes it again
                beside.unlink()
    finally:
        os.close(handle)
