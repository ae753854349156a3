"""What importing the package costs and changes."""

from __future__ import annotations

import subprocess
import sys

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROBE = """
import os, random, sys, time, warnings, logging
before = (dict(os.environ), random.getstate(), list(warnings.filters), list(logging.root.handlers), list(sys.meta_path))
start = time.perf_counter()
import easyedit_mdm
seconds = time.perf_counter() - start
after = (dict(os.environ), random.getstate(), list(warnings.filters), list(logging.root.handlers), list(sys.meta_path))
assert before == after, "global state changed"
for name in ("torch", "transformers", "easyeditor", "numpy"):
    assert name not in sys.modules, name
print(f"SECONDS {seconds}")
"""


def test_import_is_fast_and_clean():
    """Under 150 ms, no torch, no EasyEdit, nothing printed, nothing changed."""
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        (line,) = done.stdout.splitlines()
        seconds.append(float(line.removeprefix("SECONDS ")))
    assert min(seconds) < 0.150


def test_public_names_resolve():
    """Every lazily loaded name exists."""
    import easyedit_mdm

    for name in easyedit_mdm.__all__:
        if name not in ("BaseEditor",):  # imports EasyEdit; see test_host
            assert getattr(easyedit_mdm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        easyedit_mdm.nonsense  # noqa: B018


def test_only_the_host_imports_easyedit():
    """DESIGN: `host/` is the only door."""
    for path in (ROOT / "easyedit_mdm").rglob("*.py"):
        if "host" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert "import easyeditor" not in text and "from easyeditor" not in text, path


def test_every_package_is_in_the_wheel():
    """The list of packages in pyproject.toml is complete (it is explicit because hparams/ stands outside the package)."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "easyedit_mdm").rglob("*.py")}
    assert found | {"easyedit_mdm.hparams"} == listed


def test_every_error_has_its_cause_and_cure_in_the_docs():
    """docs/errors.md: one row a class of `easyedit_mdm.errors`, no row of a class that is gone, nothing left empty."""
    from easyedit_mdm import errors

    classes = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.EasyEditMDMError)} - {"EasyEditMDMError"}
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip("`") for row in rows) == sorted(classes)
    assert all(len(row) == 3 and min(map(len, row)) > 10 for row in rows), "a class, its cause, its cure"
    assert "EasyEditMDMError" in text
