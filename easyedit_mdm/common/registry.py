"""A typed name -> thing table whose look-up failures say what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from easyedit_mdm.errors import NameTakenError, UnknownNameError

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
        self._watchers: list[Callable[[str, T], None]] = []

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a thing under `name`.

        Raises:
            NameTakenError: if another thing has that name.
        """

        def add(thing: T) -> T:
            """The decorator."""
            if self._things.setdefault(name, thing) is not thing:
                raise NameTakenError(
                    f"the {self.kind} {name!r} is registered already: choose another name, or unregister it"
                )
            for watcher in self._watchers:
                watcher(name, thing)
            return thing

        return add

    def unregister(self, name: str) -> T:
        """Take a thing out again.

        Raises:
            UnknownNameError: if there is none of that name.
        """
        thing = self[name]
        del self._things[name]
        return thing

    def watch(self, watcher: Callable[[str, T], None]) -> None:
        """Call `watcher(name, thing)` for everything that is registered, now and later."""
        for name, thing in self._things.items():
            watcher(name, thing)
        self._watchers.append(watcher)

    def __getitem__(self, name: str) -> T:
        if name in self._things:
            return self._things[name]
        raise UnknownNameError(
            f"unknown {self.kind} {name!r}{did_you_mean(name, self._things)} Known: {', '.join(self.names())}"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def names(self) -> list[str]:
        """All names, in order of registration."""
        return list(self._things)
