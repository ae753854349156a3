"""Importing EasyEdit without its side effects, in both of its forms."""

from __future__ import annotations

import importlib
import logging
import os
import random
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from easyedit_mdm.errors import HostImportError
from easyedit_mdm.host.finding import Host, find_easyedit
from easyedit_mdm.host.standins import older, pip_name, standins, version_of

# BaseEditor and what joining it needs; attributes of the package itself are shadowed by names of its
# submodules
_WANTED = (
    "easyeditor",
    "easyeditor.editors.editor",
    "easyeditor.util.alg_dict",
    "easyeditor.editors.batch_editor",
)


def import_easyedit(home: str | Path | None = None) -> Host:
    """Import EasyEdit, wherever it is found; seeds, environment, logging and warnings are as before
    afterwards.

    Raises:
        HostNotFoundError: if it is not there.
        HostImportError: if its import fails; nothing of it stays imported then.
    """
    host = find_easyedit(home)
    paths = list(sys.path)
    with standins(), _as_before(), in_one_sentence(host):
        if host.source in ("home", "own folder") and str(host.root) not in sys.path:
            sys.path.insert(0, str(host.root))
        try:
            for name in _WANTED:
                importlib.import_module(name)
        except BaseException:
            sys.path[:] = paths
            for name in [n for n in sys.modules if n == "easyeditor" or n.startswith("easyeditor.")]:
                del sys.modules[name]
            raise
    return host


@contextmanager
def in_one_sentence(host: Host) -> Iterator[None]:
    """Whatever EasyEdit's import raises inside becomes one sentence about module, place, versions and cure.

    Raises:
        HostImportError: then.
    """
    try:
        yield
    except Exception as error:  # its modules, and third parties' under them, may raise anything
        raise _host_import_error(host, error) from error


def _host_import_error(host: Host, error: Exception) -> HostImportError:
    form = "the repository" if host.form == "head" else "PyPI's wheel"
    reason = " ".join(str(error).split()) or "no message"
    packages = _involved(error)
    versions = ", ".join(f"{package} {version_of(package) or 'is not installed'}" for package in packages)
    return HostImportError(
        f"EasyEdit at {host.root} ({form}) was found and cannot be imported: {_place(host, error)}:"
        f" {type(error).__name__}: {reason}. {versions}. {_cure(host, error, packages)}"
    )


def _place(host: Host, error: Exception) -> str:
    """The line of EasyEdit that failed: the last one in the traceback, or the one that Python cannot read."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))  # that file has no frame
    own = [(Path(file), line) for file, line in frames if Path(file).is_relative_to(host.root / "easyeditor")]
    return f"{own[-1][0].relative_to(host.root)}, line {own[-1][1]}" if own else "easyeditor"


def _involved(error: Exception) -> list[str]:
    """Third-party packages that the error speaks of or comes from; transformers where it tells none."""
    named = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
    modules = [frame.f_globals.get("__name__") or "" for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = dict.fromkeys(name.split(".")[0] for name in [named, *modules])
    ours = {"", "easyeditor", "easyedit_mdm", "importlib", "__main__", *sys.stdlib_module_names}
    return [package for package in packages if package not in ours] or ["transformers"]


def _cure(host: Host, error: Exception, packages: list[str]) -> str:
    """What to do: install what is missing, an older version of what has changed, or EasyEdit again where its
    own files fail.
    """
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "easyeditor":
        again = (
            f"git -C {host.root} status shows what is missing; clone it again"
            if host.form == "head"
            else "install it again"
        )
        return f"A file of its own is missing: {again}"
    absent = [pip_name(package) for package in packages if version_of(package) is None]
    if absent:
        return f"Install what is missing: pip install {' '.join(absent)}"
    update = (
        f"update EasyEdit (git -C {host.root} pull), or install "
        if host.form == "head"
        else "install EasyEdit's repository, or "
    )
    return f"What to do: {update}an older version of what has changed: {older(packages[0])}"


@contextmanager
def _as_before() -> Iterator[None]:
    """Put back what EasyEdit's import changes: it seeds with 42, sets environment variables, adds log
    handlers.
    """
    import numpy
    import torch

    seeds = (random.getstate(), numpy.random.get_state(), torch.get_rng_state())
    cuda = (
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    )
    environment = dict(os.environ)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third parties' own, at import
            yield
    finally:
        random.setstate(seeds[0])
        numpy.random.set_state(seeds[1])
        torch.set_rng_state(seeds[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)


def host_module(name: str) -> types.ModuleType:
    """A module of EasyEdit by its full name (the package's attributes are shadowed, so it must be imported by
    name).
    """
    return importlib.import_module(f"easyeditor.{name}")
