"""Stand-ins for optional third-party packages that EasyEdit imports and editing does not need.

`import easyeditor` pulls in some twenty packages. A finder, last in line and heeded only when the import stands in EasyEdit's
own code or in the script that is run, answers for those that are not installed; whatever is taken from a stand-in raises
`MissingPackageError`, with the package's name, as soon as it is used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from easyedit_mdm.errors import MissingPackageError


def _missing(name: str) -> MissingPackageError:
    package = name.split(".")[0]
    return MissingPackageError(f"{name} was used, but the package {package!r} is not installed: pip install {_PIP_NAMES.get(package, package)}")


_PIP_NAMES = {"cv2": "opencv-python-headless", "sentence_transformers": "sentence-transformers", "zhipuai": "zhipuai", "hydra": "hydra-core",
              "sklearn": "scikit-learn", "qwen_vl_utils": "qwen-vl-utils", "PIL": "pillow", "rouge": "rouge"}  # fmt: skip


class _StandInType(type):
    """A class that may be named, subclassed and passed around, and raises when it is called or read from."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return make_standin(f"{cls.__standin__}.{name}")

    def __getitem__(cls, item: Any) -> Any:
        return cls  # used in an annotation, as in `typing.Optional[X]` taken from a missing package

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _missing(cls.__standin__)

    def __iter__(cls) -> Iterator[Any]:
        raise _missing(cls.__standin__)


def make_standin(name: str) -> type:
    """A stand-in for the dotted `name`."""
    return _StandInType(name.rsplit(".", 1)[-1], (), {"__standin__": name, "__module__": name})


class _StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return make_standin(f"{self.__name__}.{name}")


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for missing top-level packages, and what is below them, when `asks(importer's globals)` is true."""

    def __init__(self, asks: Callable[[dict], bool]):
        self.asks = asks
        self.made: list[str] = []

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """A spec if the import comes from the right place and concerns no package of Python's own or EasyEdit's."""
        package = fullname.split(".")[0]
        if package in sys.stdlib_module_names or package == "easyeditor":
            return None
        parent = sys.modules.get(package)
        if "." in fullname and not isinstance(parent, _StandInModule):
            return None
        if not self.asks(_importer()):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """The stand-in."""
        self.made.append(spec.name)
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""

    def clear(self) -> None:
        """Take the stand-ins out of `sys.modules`, so that nobody takes the packages for installed."""
        for name in self.made:
            if isinstance(sys.modules.get(name), _StandInModule):
                del sys.modules[name]
        self.made.clear()


def _importer() -> dict:
    """Globals of the code whose import is being served: the nearest frame below the import system's own."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and not _of_import_system(frame):  # this file, and whatever wraps it
        frame = frame.f_back
    while frame is not None and _of_import_system(frame):
        frame = frame.f_back
    return {} if frame is None else frame.f_globals


def _of_import_system(frame: types.FrameType) -> bool:
    return (frame.f_globals.get("__name__") or "").split(".")[0] == "importlib" or "importlib" in frame.f_code.co_filename


@contextmanager
def standins(script: Path | None = None) -> Iterator[StandInFinder]:
    """Stand-ins for imports made by EasyEdit, and by `script` if one is given, inside the block."""

    def asks(importer: dict) -> bool:
        name = importer.get("__name__") or ""
        if name == "easyeditor" or name.startswith("easyeditor."):
            return True
        file = importer.get("__file__")
        return script is not None and file is not None and Path(file).resolve() == script

    finder = StandInFinder(asks)
    sys.meta_path.append(finder)
    try:
        yield finder
    finally:
        sys.meta_path.remove(finder)
        finder.clear()
