"""Where EasyEdit is, and which of its two forms."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from easyedit_mdm.errors import HostNotFoundError

HOW_TO_GET = (
    "Two ways to get it: clone github.com/zjunlp/EasyEdit and set EASYEDIT_HOME (or --easyedit-home) to the clone; "
    "or `pip install --no-deps easyeditor==0.0.1.dev0`."
)


@dataclass(frozen=True)
class Host:
    """An EasyEdit.

    Attributes:
        root: the folder that holds the package `easyeditor`.
        form: `head` (the repository: evaluation records carry `metric_meta`) or `wheel` (PyPI's of October 2023).
        source: how it was found: `imported`, `home` or `installed`.
    """

    root: Path
    form: str
    source: str


def find_easyedit(home: str | Path | None = None) -> Host:
    """Find EasyEdit: already imported, then `home` or the environment's EASYEDIT_HOME, then installed.

    Raises:
        HostNotFoundError: if it is nowhere, or the folder given does not hold it; the message says how to get it.
    """
    loaded = sys.modules.get("easyeditor")
    if loaded is not None and getattr(loaded, "__path__", None):
        return _host(Path(next(iter(loaded.__path__))).parent, "imported")
    home = home or os.environ.get("EASYEDIT_HOME")
    if home:
        root = Path(home).expanduser().resolve()
        if not (root / "easyeditor" / "editors" / "editor.py").is_file():
            raise HostNotFoundError(f"{root} (EASYEDIT_HOME or --easyedit-home) holds no easyeditor/editors/editor.py. {HOW_TO_GET}")
        return _host(root, "home")
    spec = importlib.util.find_spec("easyeditor")
    if spec is None or not spec.submodule_search_locations:
        raise HostNotFoundError(f"EasyEdit is neither imported nor installed, and EASYEDIT_HOME is not set. {HOW_TO_GET}")
    return _host(Path(next(iter(spec.submodule_search_locations))).parent, "installed")


def _host(root: Path, source: str) -> Host:
    is_head = (root / "easyeditor" / "evaluate" / "metric_meta.py").is_file()
    return Host(root, "head" if is_head else "wheel", source)
