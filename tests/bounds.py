"""Limits of time and memory for code that reads hostile input."""

from __future__ import annotations

import gc
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS, BYTES = 1.0, 1 << 30
_GIVE_UP = 20  # times the limit, after which what hangs is interrupted


@contextmanager
def bounded(seconds: float = SECONDS, most: int = BYTES) -> Iterator[None]:
    """Fails if the block takes more processor time, or raises the peak of this process's memory by more.

    Processor time, because a busy machine is no hang. What goes on and on is interrupted in the end. No
    garbage is collected in between: that takes as long as the rest of the process is large.
    """

    def hangs(*_: object) -> None:
        raise AssertionError(f"hangs: more than {_GIVE_UP * seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, _GIVE_UP * seconds)
    collects = gc.isenabled()
    gc.disable()
    began, peak = time.process_time(), peak_memory()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    took, more = time.process_time() - began, peak_memory() - peak
    assert took < seconds, f"took {took:.2f} s"
    assert more < most, f"took {more:,} bytes"


def peak_memory() -> int:
    """The most that this process has had in memory so far, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
