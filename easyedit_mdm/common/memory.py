"""The most memory that a piece of work held."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_PROC = Path("/proc/self")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """The list holds one number after the block: bytes at the highest point inside it. On a CUDA device those
    that torch allocated there; elsewhere the process's resident memory, which Linux counts anew from any
    moment on. Empty where nobody counts.
    """
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    counting = _count_anew()
    yield peak
    highest = re.search(r"VmHWM:\s+(\d+) kB", _read("status")) if counting else None
    if highest:
        peak.append(1024 * int(highest[1]))


def _count_anew() -> bool:
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read(name: str) -> str:
    try:
        return (_PROC / name).read_text(encoding="utf-8")
    except OSError:
        return ""
