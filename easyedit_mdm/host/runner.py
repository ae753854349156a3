"""Running EasyEdit's scripts, untouched, with our methods.

Scripts choose a hyperparameter class by comparing `--editing_method` with names they know. The value they get
from argparse here is a string that compares and hashes like the method it stands for ("ROME") and prints as
its own name ("ROME_MDM"), so the right branch is taken and results files carry the right name. It also equals
"MEMIT" and "ROME", which every runner has a branch for: a runner that knows no EMMET takes one of those, and
which one does not matter, since every `from_hparams` reads the method from the file.
"""

from __future__ import annotations

import argparse
import functools
import random
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.hparams import find_hparams, read_yaml
from easyedit_mdm.errors import DataError, HyperParameterError, UnknownNameError
from easyedit_mdm.host.importing import host_module
from easyedit_mdm.host.joining import register
from easyedit_mdm.host.standins import standins

EASYEDIT_SEED = 42
_METHOD_FLAGS = ("--editing_method", "--edit_method", "--alg", "--alg_name", "--method")
_FOLDER_FLAGS = ("metrics_save_dir", "output_dir", "save_dir", "result_dir")


class MethodName(str):
    """A method's name that equals the name of the EasyEdit method it stands for, and prints as its own."""

    stands_for: str

    def __new__(cls, name: str, stands_for: str) -> MethodName:
        """`name` is printed, `stands_for` compared."""
        self = super().__new__(cls, name)
        self.stands_for = stands_for
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(other) in (self.stands_for, str(self), "MEMIT", "ROME")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.stands_for)


def run_script(
    script: str | Path, arguments: Sequence[str], home: str | Path | None = None, seed: int = EASYEDIT_SEED
) -> None:
    """Run an EasyEdit script as `__main__`, with `--alg` understood beside its own flag.

    The random generators stand, right before the script's first line, as EasyEdit's import leaves them
    (seeded with 42) or as `seed` says, whatever was imported before; so a runner samples the same records for
    every method.

    Raises:
        DataError: if the script does not exist, or a file that it opens.
        HostNotFoundError: if EasyEdit is not found.
    """
    path = Path(script).resolve()
    if not path.is_file():
        raise DataError(f"no script {str(script)!r}")
    if home is None and (path.parent.parent / "easyeditor" / "editors").is_dir():
        home = path.parent.parent  # a script of a clone runs with that clone
    joined = register(home)
    argv, paths = sys.argv, list(sys.path)
    sys.argv = [str(path), *_shipped(arguments)]
    sys.path.insert(0, str(path.parent))
    try:
        with (
            standins(path),
            understanding_our_methods(),
            numbers_alone_in_locality(path, joined.editor_class),
        ):
            seed_everything(seed)
            runpy.run_path(str(path), run_name="__main__")
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        raise DataError(
            f"{path.name} wants {error.filename}, which does not exist: check the folders and files among its"
            " arguments (--data_dir is the folder that holds the file itself)"
        ) from error
    finally:
        sys.argv, sys.path[:] = argv, paths


def _shipped(arguments: Sequence[str]) -> list[str]:
    """Arguments, with a hyperparameter file that only the package has replaced by its full path."""
    out = []
    for before, value in zip(["", *arguments], arguments):
        flag, _, inline = value.partition("=")
        name = inline if flag.startswith("--hparams") else value if before.startswith("--hparams") else ""
        if name and not Path(name).exists() and not Path(name + ".yaml").exists():
            value = value.replace(name, str(find_hparams(name)))
        out.append(value)
    return out


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch: EasyEdit's import does this, and its runners count on it."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def understanding_our_methods() -> Iterator[None]:
    """Inside, argparse accepts our methods wherever a script asks for an editing method, and `--alg` for
    it.
    """
    original = argparse.ArgumentParser.parse_known_args

    @functools.wraps(original)
    def parse_known_args(
        self: argparse.ArgumentParser, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """EasyEdit's arguments, with names of our methods understood."""
        flag = next((a for a in self._actions if set(a.option_strings) & set(_METHOD_FLAGS)), None)
        if flag is not None:
            _add_alias(self, flag)
            if flag.choices is not None:
                flag.choices = [*flag.choices, *(n for n in METHODS if n not in flag.choices)]
        parsed, rest = original(self, args, namespace)
        if flag is not None:
            setattr(parsed, flag.dest, _method(getattr(parsed, flag.dest)))
            _check_file(getattr(parsed, flag.dest), parsed)
        for name in _FOLDER_FLAGS:  # the runners write there at the very end, and do not make it
            folder = getattr(parsed, name, None)
            if isinstance(folder, str) and folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
        return parsed, rest

    # put back below
    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]  # what it was


@contextmanager
def numbers_alone_in_locality(script: Path, editor_class: Any) -> Iterator[None]:
    """For EasyEdit's KnowEdit runner, which averages all that a record has under `locality` once its results
    are written.

    The head keeps each prompt's tokens there too (`*_output`), and the runner ends in a TypeError. Inside,
    `edit` returns them under `locality_output`, beside `locality`. Other scripts get EasyEdit's records as
    they are.
    """
    if script.name != "run_knowedit_llama2.py":
        yield
        return
    original = editor_class.edit

    @functools.wraps(original)
    def edit(self: Any, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any, Any]:
        """EasyEdit's, with what its script cannot average under `locality_output`."""
        metrics, model, weights = original(self, *args, **kwargs)
        for record in metrics:
            locality = record["post"]["locality"]
            outputs = [key for key in locality if key.endswith("_output")]
            record["post"]["locality_output"] = {
                key.removesuffix("_output"): locality.pop(key) for key in outputs
            }
        return metrics, model, weights

    editor_class.edit = edit
    try:
        yield
    finally:
        editor_class.edit = original


def _add_alias(parser: argparse.ArgumentParser, flag: argparse.Action) -> None:
    if "--alg" not in parser._option_string_actions:
        parser._option_string_actions["--alg"] = flag
        flag.option_strings = [*flag.option_strings, "--alg"]


def _check_file(method: Any, parsed: argparse.Namespace) -> None:
    """Results are named after the method, and the file decides which one runs: they must agree.

    Raises:
        HyperParameterError: if they do not.
    """
    for name, value in vars(parsed).items():
        if isinstance(method, MethodName) and name.startswith("hparams") and isinstance(value, str):
            named = read_yaml(find_hparams(value)).get("alg_name")
            if named != str(method):
                raise HyperParameterError(
                    f"{value} is a file of {named}, but {method} was asked for: give the file of that method"
                )


def _method(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value in METHODS:
        return MethodName(value, METHODS[value].stands_for)
    if value not in host_module("util.alg_dict").ALG_DICT and value.upper().endswith("_MDM"):
        METHODS[value]  # raises "not yet" for planned names
        raise UnknownNameError(f"unknown editing method {value!r}{did_you_mean(value, METHODS)}")
    return value
