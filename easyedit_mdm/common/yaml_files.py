"""YAML files of settings: found by name, read without trusting them, and the line of each key. Needs no
torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.errors import HyperParameterError

DEEPEST = 32  # lists in lists; PyYAML's time grows with the square of their depth


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with EasyEdit's numbers (`5e-1` is one), and without aliases and deep nesting,
    which make a few lines endless.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's.

        Raises:
            ComposerError: for an alias, or lists in lists more than `DEEPEST` deep.
        """
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor} is not read: write the value out", event.start_mark
            )
        if self.depth >= DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class YamlFile:
    """What a YAML file holds.

    Attributes:
        path: the file.
        values: its mapping.
        lines: the line, from 1, of each key of the mapping.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def where(self, message: str) -> str:
        """`file, line N` of the first key that a message names; the file alone if it names none."""
        named = next((word for word in re.findall(r"[\w-]+", message) if word in self.lines), None)
        return str(self.path) if named is None else f"{self.path}, line {self.lines[named]}"


def read_yaml_file(path: str | Path) -> YamlFile:
    """Read a YAML mapping.

    Raises:
        HyperParameterError: if the file is not YAML, not a mapping, has a key that is no string, or holds an
            alias.
    """
    path = Path(path)
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            values = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except OSError as error:
        raise HyperParameterError(
            f"{path} cannot be read ({error.strerror}): give a YAML file of hyperparameters"
        ) from error
    except (
        yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, AttributeError, LookupError
    ) as error:  # fmt: skip
        # PyYAML lets out what its constructors raise: a 13th month, thousands of digits, thousands of
        # brackets
        reason = " ".join(str(error).split())
        raise HyperParameterError(f"{path} is not readable YAML: {reason}") from error
    if not isinstance(values, dict):
        raise HyperParameterError(
            f"{path} must hold a mapping of hyperparameters, not {type(values).__name__}"
        )
    odd = next((key for key in values if not isinstance(key, str)), None)
    if odd is not None or None in values:
        raise HyperParameterError(
            f"{path}: the key {odd!r} is {type(odd).__name__}, not a word: name a hyperparameter, in quotes"
            " if YAML reads it as something else"
        )
    return YamlFile(path, values, {str(key.value): key.start_mark.line + 1 for key, _ in node.value})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file; raises as `read_yaml_file`."""
    return read_yaml_file(path).values


def find_hparams(path: str | Path) -> Path:
    """The file meant by `path`: as given, with `.yaml`, or among the files that ship with the package.

    Raises:
        HyperParameterError: if there is none, with the nearest name that ships.
    """
    shipped = packaged_hparams()
    text = str(path)
    names = [part + end for part in (text, text.removeprefix("hparams/")) for end in ("", ".yaml")]
    for candidate in (Path(text), Path(text + ".yaml"), *(shipped / name for name in names)):
        if candidate.is_file():
            return candidate
    known = [f"{p.parent.name}/{p.stem}" for p in sorted(shipped.glob("*/*.yaml"))]
    asked = "/".join(Path(text.removesuffix(".yaml")).parts[-2:])
    meant = did_you_mean(asked, known)
    if meant == ".":
        beside = sorted({name.split("/")[0] for name in known})
        meant = f". Give a YAML file, or one that ships: METHOD/MODEL, with METHOD one of {', '.join(beside)}"
    raise HyperParameterError(f"no hyperparameter file {text!r}{meant}")


def packaged_hparams() -> Path:
    """The folder of YAML files that ships with the package: inside the wheel, or beside it in a checkout."""
    inside = Path(__file__).resolve().parent.parent / "hparams"
    return inside if inside.is_dir() else inside.parent.parent / "hparams"
