"""Where EasyEdit is, and which of its two forms."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from easyedit_mdm.errors import HostNotFoundError

WHEEL = "easyeditor==0.0.1.dev0"


def wheel_folder() -> Path:
    """A place of its own for PyPI's wheel: beside other packages, whose versions it forbids, pip complains of
    it at every install.
    """
    return Path(sys.prefix) / "share" / "easyedit_mdm"


def how_to_get() -> str:
    """The two ways to get EasyEdit."""
    return (
        "Two ways to get it: clone github.com/zjunlp/EasyEdit and set EASYEDIT_HOME (or --easyedit-home) to"
        f" the clone; or `pip install --no-deps --target {wheel_folder()} {WHEEL}`."
    )


@dataclass(frozen=True)
class Host:
    """An EasyEdit.

    Attributes:
        root: the folder that holds the package `easyeditor`.
        form: `head` (the repository: evaluation records carry `metric_meta`) or `wheel` (PyPI's of October
            2023).
        source: how it was found: `imported`, `home`, `installed` or `own folder` (`wheel_folder`).
    """

    root: Path
    form: str
    source: str


def find_easyedit(home: str | Path | None = None) -> Host:
    """Find EasyEdit: already imported, then `home` or the environment's EASYEDIT_HOME, then installed, then
    in `wheel_folder`.

    Raises:
        HostNotFoundError: if it is nowhere, or the folder given does not hold it; the message says how to get
            it.
    """
    loaded = sys.modules.get("easyeditor")
    if loaded is not None and getattr(loaded, "__path__", None):
        return _host(Path(next(iter(loaded.__path__))).parent, "imported")
    home = home or os.environ.get("EASYEDIT_HOME")
    if home:
        root = Path(home).expanduser().resolve()
        if not _holds_easyedit(root):
            raise HostNotFoundError(
                f"{root} (EASYEDIT_HOME or --easyedit-home) holds no easyeditor/editors/editor.py."
                f" {how_to_get()}"
            )
        return _host(root, "home")
    spec = importlib.util.find_spec("easyeditor")
    if spec is not None and spec.submodule_search_locations:
        return _host(Path(next(iter(spec.submodule_search_locations))).parent, "installed")
    if _holds_easyedit(wheel_folder()):
        return _host(wheel_folder(), "own folder")
    raise HostNotFoundError(
        f"EasyEdit is neither imported nor installed, and EASYEDIT_HOME is not set. {how_to_get()}"
    )


def _holds_easyedit(root: Path) -> bool:
    return (root / "easyeditor" / "editors" / "editor.py").is_file()


def _host(root: Path, source: str) -> Host:
    is_head = (root / "easyeditor" / "evaluate" / "metric_meta.py").is_file()
    return Host(root, "head" if is_head else "wheel", source)
