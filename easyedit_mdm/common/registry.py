"""A typed name -> thing table whose look-up failures say what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from easyedit_mdm.errors import UnknownNameError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or a full stop."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(name).lower(), list(by_lower), n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else "."


class Registry(Generic[T]):
    """Names of one kind of thing, such as state schedules.

    Args:
        kind: what the names name, for messages ("state schedule").
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a thing under `name`."""

        def add(thing: T) -> T:
            """The decorator."""
            self._things[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> T:
        if name in self._things:
            return self._things[name]
        raise UnknownNameError(f"unknown {self.kind} {name!r}{did_you_mean(name, self._things)} Known: {', '.join(self.names())}")

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def names(self) -> list[str]:
        """All names, in order of registration."""
        return list(self._things)
