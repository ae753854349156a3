"""What importing the package costs and changes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROBE = """
import os, random, sys, warnings, logging
before = (dict(os.environ), random.getstate(), list(warnings.filters), list(logging.root.handlers), list(sys.meta_path))
there = set(sys.modules)
import easyedit_mdm
after = (dict(os.environ), random.getstate(), list(warnings.filters), list(logging.root.handlers), list(sys.meta_path))
assert before == after, "global state changed"
print(*sorted(set(sys.modules) - there))
"""


def test_import_is_light_and_clean():
    """Importing the package loads itself, its version and next to nothing else; nothing is printed, nothing changed."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    loaded = line.split()
    assert {name for name in loaded if name.startswith("easyedit_mdm")} == {"easyedit_mdm", "easyedit_mdm.version"}
    strangers = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"easyedit_mdm"}
    assert strangers == set() and len(loaded) < 20, loaded


def test_public_names_resolve():
    """Every lazily loaded name exists."""
    import easyedit_mdm

    for name in easyedit_mdm.__all__:
        if name not in ("BaseEditor",):  # imports EasyEdit; see test_host
            assert getattr(easyedit_mdm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        easyedit_mdm.nonsense  # noqa: B018


EVERY_MODULE = """
import importlib, os, pkgutil, sys
import easyedit_mdm
names = [m.name for m in pkgutil.walk_packages(easyedit_mdm.__path__, "easyedit_mdm.")]
names = [n for n in names if "autoload" not in n and not n.startswith("easyedit_mdm.hparams")]  # the hook is run, not imported
for name in names:
    importlib.import_module(name)
found = sorted(n for n in sys.modules if n.split(".")[0] == "easyeditor" and sys.modules[n] is not None)
print(len(names), *found)
"""


def test_no_module_imports_easyedit():
    """DESIGN: `host/` is the only door, and opens only when it is asked to: all modules imported, none of EasyEdit's is there."""
    done = subprocess.run([sys.executable, "-c", EVERY_MODULE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, *found = done.stdout.split()
    assert int(count) > 80 and found == []


def test_only_the_host_names_easyedit():
    """No other room imports it anywhere, in functions either, or has its name in a string, from which it could be imported."""
    rooms = set()
    for path in (ROOT / "easyedit_mdm").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(word.split(".")[0] == "easyeditor" for word in names_and_strings(tree)):
            rooms.add(path.relative_to(ROOT / "easyedit_mdm").parts[0])
    assert rooms == {"host"}


def names_and_strings(tree: ast.AST) -> Iterator[str]:
    """What a file imports, and the strings in it, docstrings aside."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value.value = ""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


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
