"""A plugin of pytest: deprecations that other packages announce, where their versions are not the locked
ones.

Under the lock every warning is an error. With EASYEDIT_MDM_OTHER_VERSIONS=1 a deprecation that code of other
packages gives is counted and told at the end of the run; one that this package gives is an error as before.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import FrameType

import pytest

KINDS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


def other_versions() -> bool:
    """Whether this run is on versions other than the locked ones."""
    return os.environ.get("EASYEDIT_MDM_OTHER_VERSIONS") == "1"


class GivenByUs:
    """Stands in a warning filter where the pattern for the module does: whether this package's code gives the
    warning.

    The module that a warning points at will not do: by `stacklevel` another package's warning may point at a
    line of ours.
    """

    def match(self, _: str) -> bool:
        """Called by `warnings` while the code that gives the warning is on the stack."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
            frame = frame.f_back
        return frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "easyedit_mdm"


def record_deprecations() -> None:
    """Set the filters: deprecations are recorded, ours raised."""
    for kind in KINDS:
        warnings.simplefilter("always", kind)
    for kind in KINDS:
        warnings.filters.insert(0, ("error", None, kind, GivenByUs(), 0))
    warnings.simplefilter(
        "default", type("Unused", (Warning,), {})
    )  # so that `warnings` looks at its list anew


class ThirdParty:
    """Counts deprecations and tells them at the end."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        """While tests are imported. pytest has set its own filters by now, and takes these away with them."""
        record_deprecations()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        """While a test runs."""
        record_deprecations()
        return (yield)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        """One more of its kind, and where it was met first (with xdist, in the process that tells them)."""
        if issubclass(warning_message.category, KINDS):
            said = str(warning_message.message).strip().splitlines()[0]
            self.count[said] += 1
            self.first.setdefault(
                said, f"{warning_message.filename}:{warning_message.lineno}, in {nodeid or 'the collection'}"
            )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The number of all, then a line for each."""
        terminalreporter.write_line(f"third-party deprecations: {self.count.total()}")
        for said, times in self.count.most_common():
            terminalreporter.write_line(f"  {times} x {said} (first: {self.first[said]})")


def pytest_configure(config: pytest.Config) -> None:
    """Join in, on other versions."""
    if other_versions():
        config.pluginmanager.register(ThirdParty(), "easyedit_mdm-third-party")
