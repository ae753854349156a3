"""Steps that Ctrl-C must not cut in two."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class uninterrupted:
    """Ctrl-C (SIGINT) and SIGTERM that arrive inside the block are delivered right after it.

    Meant for the milliseconds in which weights are copied. Outside the main thread nothing is done: signals
    never interrupt another one.
    """

    def __enter__(self) -> uninterrupted:
        self._before: dict[int, Any] = {}
        self._arrived: list[int] = []
        if threading.current_thread() is threading.main_thread():
            try:
                for number in (signal.SIGINT, signal.SIGTERM):
                    handler = signal.getsignal(number)
                    if handler is not None:  # None: not set from Python, and so could not be put back
                        self._before[number] = handler
                        signal.signal(number, self._note)
            except BaseException:
                self._put_back()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()
        for number in self._arrived:
            signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append(number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
