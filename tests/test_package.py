"""What importing the package costs and changes."""

from __future__ import annotations

import ast
import doctest
import io
import re
import subprocess
import sys
from collections.abc import Iterator

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

import easyedit_mdm

ROOT = Path(__file__).parent.parent

PROBE = """
import os, random, sys, warnings, logging
before = (dict(os.environ), random.getstate(), list(warnings.filters), list(logging.root.handlers),
    list(sys.meta_path))
there = set(sys.modules)
import easyedit_mdm
after = (dict(os.environ), random.getstate(), list(warnings.filters), list(logging.root.handlers),
    list(sys.meta_path))
assert before == after, "global state changed"
print(*sorted(set(sys.modules) - there))
"""


def test_import_is_light_and_clean():
    """Importing the package loads itself, its version and next to nothing else; nothing is printed, nothing
    changed.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    loaded = line.split()
    assert {name for name in loaded if name.startswith("easyedit_mdm")} == {
        "easyedit_mdm",
        "easyedit_mdm.version",
    }
    strangers = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"easyedit_mdm"}
    assert strangers == set() and len(loaded) < 20, loaded


def test_public_names_resolve():
    """Ten names at most and the version; each exists; a wrong one is told which is right."""
    assert len(easyedit_mdm.__all__) <= 11 and dir(easyedit_mdm) == sorted(easyedit_mdm.__all__)
    for name in [*easyedit_mdm.__all__, "ROMEMDMHyperParams", "EditRequest"]:
        if name not in ("BaseEditor",):  # imports EasyEdit; see below
            assert getattr(easyedit_mdm, name) is not None
    for wrong, told in (
        ("nonsense", "no attribute 'nonsense'"),
        ("load_modle", "did you mean 'load_model'"),
        ("MEMITMDMHyperParams", "load_hparams reads any method's file"),
    ):
        with pytest.raises(AttributeError, match=told):
            getattr(easyedit_mdm, wrong)


class WithoutEasyEditsWord(doctest.OutputChecker):
    """Compares what is printed, but for the line that EasyEdit prints where its folder for logs is new."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        """As doctest's."""
        return super().check_output(want, got.replace("We are creating the logger files\n", ""), optionflags)


@pytest.mark.end_to_end
def test_every_public_name_has_an_example_that_runs(tmp_path, monkeypatch):
    """docs/python.md: a row and an example for each of them, run as they stand, in one session."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks, names = re.findall(r"```python\n(.*?)```", text, re.S), {}
    used = " ".join(re.findall(r">>> from easyedit_mdm import (.*)", text))
    assert set(re.findall(r"\w+", used)) == set(easyedit_mdm.__all__) - {"__version__"}
    assert all(f"`{name}`" in text for name in easyedit_mdm.__all__)
    for number, block in enumerate(blocks):
        test = doctest.DocTestParser().get_doctest(block, names, f"block {number}", "docs/python.md", 0)
        told = io.StringIO()
        runner = doctest.DocTestRunner(WithoutEasyEditsWord())
        assert runner.run(test, out=told.write, clear_globs=False).failed == 0, told.getvalue()
        names = test.globs


EVERY_MODULE = """
import importlib, importlib.util, os, pkgutil, sys
import easyedit_mdm
# these need an extra
extras = {"easyedit_mdm.app.blocks": "gradio", "easyedit_mdm.harness.model": "lm_eval"}
absent = {module for module, package in extras.items() if importlib.util.find_spec(package) is None}
names = [m.name for m in pkgutil.walk_packages(easyedit_mdm.__path__, "easyedit_mdm.")]
# the hook is run, not imported
names = [n for n in names if "autoload" not in n and not n.startswith("easyedit_mdm.hparams")]
for name in names:
    if name not in absent:
        importlib.import_module(name)
found = sorted(n for n in sys.modules if n.split(".")[0] == "easyeditor" and sys.modules[n] is not None)
print(len(names), *found)
"""


def test_no_module_imports_easyedit():
    """DESIGN: `host/` is the only door, and opens only when it is asked to: all modules imported, none of
    EasyEdit's is there.
    """
    done = subprocess.run([sys.executable, "-c", EVERY_MODULE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, *found = done.stdout.split()
    assert int(count) > 80 and found == []


def test_only_the_host_names_easyedit():
    """No other room imports it anywhere, in functions either, or has its name in a string, from which it
    could be imported.
    """
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
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_package_is_in_the_wheel():
    """The list of packages in pyproject.toml is complete (it is explicit because hparams/ stands outside the
    package).
    """
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "easyedit_mdm").rglob("*.py")}
    assert found | {"easyedit_mdm.hparams"} == listed


def test_every_data_file_is_in_the_wheel():
    """Hyperparameters, weights, adapters, templates, style sheets, texts: each matches a line of
    package-data.
    """
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    kept = set()
    for package, patterns in told["package-data"].items():
        folder = ROOT / told["package-dir"].get(package, package.replace(".", "/"))
        kept |= {path for pattern in patterns for path in folder.glob(pattern)}
    there = [*(ROOT / "easyedit_mdm").rglob("*"), *(ROOT / "hparams").rglob("*")]
    wanted = {p for p in there if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert {str(p.relative_to(ROOT)) for p in wanted - kept} == set()
    assert len(wanted) > 70


def test_every_error_has_its_cause_and_cure_in_the_docs():
    """docs/errors.md: one row a class of `easyedit_mdm.errors`, no row of a class that is gone, nothing left
    empty.
    """
    from easyedit_mdm import errors

    classes = {
        n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.EasyEditMDMError)
    } - {"EasyEditMDMError"}
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    assert sorted(row[0].strip("`") for row in rows) == sorted(classes)
    assert all(len(row) == 3 and min(map(len, row)) > 10 for row in rows), "a class, its cause, its cure"
    assert "EasyEditMDMError" in text


def test_beside_a_folder_of_the_same_name(tmp_path):
    """A script in the folder that holds a clone finds the package, not the clone's folder."""
    (tmp_path / "easyedit_mdm").mkdir()
    code = "from easyedit_mdm import Session; print(Session.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "Session", done.stderr
