"""The suite's own rule for warnings: under the lock all are errors; on other versions third parties'
deprecations are counted and told.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

THEIRS = (
    "import warnings\ndef call(stacklevel=1):\n    warnings.warn('old_name is deprecated', {kind},"
    " stacklevel=stacklevel)\n"
)
OURS = (
    "import warnings, theirs\ndef calls(): theirs.call(stacklevel=2)\ndef gives(): warnings.warn('ours is"
    " deprecated', {kind})\n"
)
TESTS = """
import easyedit_mdm, theirs
def test_theirs(): theirs.call()
def test_theirs_again(): theirs.call()
def test_points_at_us(): easyedit_mdm.calls()
def test_ours(): easyedit_mdm.gives()
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """A small suite with warnings as errors and the plugin, beside a third party and a package named like
    ours.
    """

    def make(kind: str, other_versions: bool, *options: str) -> pytest.RunResult:
        """Run it in a process of its own."""
        monkeypatch.setenv("EASYEDIT_MDM_OTHER_VERSIONS", str(int(other_versions)))
        monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{pytester.path}")
        pytester.makepyfile(
            theirs=THEIRS.format(kind=kind), easyedit_mdm=OURS.format(kind=kind), test_small=TESTS
        )
        pytester.makeini("[pytest]\nfilterwarnings = error\n")
        return pytester.runpytest_subprocess("-p", "third_party", "-p", "no:jaxtyping", *options)

    return make


@pytest.mark.parametrize("kind", ["FutureWarning", "DeprecationWarning"])
def test_counted_on_other_versions(suite, kind):
    """Theirs are counted, with the first place, wherever they point; ours are errors."""
    done = suite(kind, True)
    done.assert_outcomes(passed=3, failed=1)
    done.stdout.fnmatch_lines(["FAILED test_small.py::test_ours*ours is deprecated*"])
    lines = done.stdout.lines
    (at,) = [i for i, line in enumerate(lines) if line == "third-party deprecations: 3"]
    assert (
        "3 x old_name is deprecated (first: " in lines[at + 1]
        and "theirs.py:3, in test_small.py::test_theirs)" in lines[at + 1]
    )


def test_counted_by_several_processes(suite):
    """With xdist the counts of all processes come together."""
    pytest.importorskip("xdist")
    done = suite("FutureWarning", True, "-n", "2")
    done.assert_outcomes(passed=3, failed=1)
    done.stdout.fnmatch_lines(["third-party deprecations: 3"])


def test_errors_under_the_lock(suite):
    """All four fail, and nothing is told of third parties."""
    done = suite("FutureWarning", False)
    done.assert_outcomes(failed=4)
    assert "third-party" not in done.stdout.str()


def test_other_warnings_stay_errors(suite):
    """What is no deprecation is an error on other versions, too."""
    suite("UserWarning", True).assert_outcomes(failed=4)
