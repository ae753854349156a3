"""Imports of EasyEdit that the installed packages cannot serve any more, answered for.

`import easyeditor` pulls in some twenty packages that editing does not need, and names that newer versions of
them have moved or dropped. Inside `standins()`, an import statement in EasyEdit's own code, or in the script
that is run, never fails for that reason:

- a name or module that has moved, and one of which a method of EasyEdit needs a working version, is taken
  from the table in `moved`;
- anything else gets a stand-in, which raises `MissingPackageError` with package, version and cure as soon as
  it is used.

What stands in is handed to the import statement alone. No module is changed and nothing is put into
`sys.modules`, so nobody else takes a package for installed. Where EasyEdit catches the error itself (`try:
import ... except ImportError`), its own way is left to it, and what `BaseEditor` cannot do without is not
answered for.
"""

from __future__ import annotations

import abc
import ast
import builtins
import contextlib
import importlib
import importlib.metadata
import linecache
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from easyedit_mdm.errors import MissingPackageError
from easyedit_mdm.host.moved import LAST_WITH, MOVED

_PIP_NAMES = {"cv2": "opencv-python-headless", "sentence_transformers": "sentence-transformers",
    "hydra": "hydra-core", "sklearn": "scikit-learn",
              "qwen_vl_utils": "qwen-vl-utils", "PIL": "pillow", "yaml": "pyyaml"}  # fmt: skip

# the modules that every call of BaseEditor runs through, and what they cannot do without
_EDITOR = ("easyeditor.editors.editor", "easyeditor.editors.utils", "easyeditor.editors.batch_editor")
_NEEDED = (
    "torch",
    "numpy",
    "tqdm",
    "yaml",
    "transformers.AutoModelForCausalLM",
    "transformers.AutoTokenizer",
)


# ---- what stands in ----------------------------------------------------------------------------------------


class _StandInType(
    abc.ABCMeta
):  # as a metaclass, so that a class with abstract methods may inherit from a stand-in
    """A class that may be named, subclassed and passed around, and raises when it is called or read from."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return make_standin(f"{cls.__standin__}.{name}", cls.__why__)

    def __getitem__(cls, item: Any) -> Any:
        return cls  # used in an annotation, as in `typing.Optional[X]` taken from a missing package

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise MissingPackageError(f"{cls.__standin__} was used, but {cls.__why__}", name=cls.__standin__)

    def __iter__(cls) -> Iterator[Any]:
        raise MissingPackageError(f"{cls.__standin__} was used, but {cls.__why__}", name=cls.__standin__)


def make_standin(name: str, why: str | None = None) -> type:
    """A stand-in for the dotted `name`; `why` says what is wrong and what to do (default: the package is not
    installed).
    """
    module, _, last = name.rpartition(".")
    return _StandInType(
        last, (), {"__standin__": name, "__why__": why or _not_installed(name), "__module__": module}
    )


class _Answer(types.ModuleType):
    """What an import statement gets: the real module, where there is one, and behind it whatever stands
    in.
    """

    def __init__(self, name: str, real: types.ModuleType | None, instead: Mapping[str, Any], why: str):
        super().__init__(name)
        vars(self).update(instead)
        self.__real, self.__why = real, why

    def __getattr__(self, name: str) -> Any:
        if self.__real is not None:
            return getattr(self.__real, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return make_standin(f"{self.__name__}.{name}", self.__why)


# ---- why it stands in --------------------------------------------------------------------------------------


def version_of(package: str) -> str | None:
    """The installed version of a top-level package, `None` if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(pip_name(package))
    return getattr(sys.modules.get(package), "__version__", None)


def pip_name(package: str) -> str:
    """What pip calls a top-level package."""
    return _PIP_NAMES.get(package, package)


def older(package: str, name: str = "") -> str:
    """The command that installs a version of an installed package that still has the dotted `name`."""
    last = next(
        (bound for gone, bound in LAST_WITH.items() if name == gone or name.startswith(f"{gone}.")), None
    )
    return f'pip install "{pip_name(package)}<{last or version_of(package)}"'


def _not_installed(name: str) -> str:
    package = name.split(".")[0]
    return f"the package {package!r} is not installed: pip install {pip_name(package)}"


def _gone(name: str, error: Exception) -> str:
    """Why the dotted `name`, of which the import failed with `error`, cannot be had, and the cure."""
    package = name.split(".")[0]
    version = version_of(package)
    missing = (error.name or "") if isinstance(error, ImportError) else ""
    if missing == package or version is None:
        return _not_installed(name)
    if isinstance(error, AttributeError) or name == missing or name.startswith(f"{missing}."):
        return f"{package} {version} has it no more: {older(package, name)}"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return (
        f"{package} {version} fails to import it ({reason}); install what it asks for, or"
        f" {older(package, name)}"
    )


# ---- import statements -------------------------------------------------------------------------------------


class _Import:
    """`builtins.__import__` that answers for what is missing when `asks(importer's globals)` is true."""

    def __init__(self, asks: Callable[[dict], bool]):
        self.asks, self.before, self.active = asks, builtins.__import__, True

    def __call__(
        self,
        name: str,
        globals: dict | None = None,
        locals: Any = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> types.ModuleType:
        """Python's own import, and an answer where it fails."""
        names = tuple(fromlist or ())
        try:
            module = self.before(name, globals, locals, names, level)
        except Exception as error:  # an installed package may raise anything at import
            if level or not self._answers(name, names, globals):
                raise
            return _instead(name, names, error)
        missing = _missing(module, names)
        if not missing or level or not self._answers(name, missing, globals):
            return module
        return _Answer(name, module, {n: _one(name, n, error) for n, error in missing.items()}, "")

    def _answers(self, name: str, names: Iterable[str], importer: dict | None) -> bool:
        package = name.split(".")[0]
        if (
            not self.active
            or importer is None
            or package == "easyeditor"
            or package in sys.stdlib_module_names
            or not self.asks(importer)
        ):
            return False
        return not _needed(
            importer.get("__name__", ""), [name, *(f"{name}.{n}" for n in names)]
        ) and not _guarded(importer)


def _needed(importer: str, wanted: Sequence[str]) -> bool:
    """Whether BaseEditor's own modules ask for something that they cannot do without."""
    if importer not in _EDITOR and not importer.startswith("easyeditor.util."):
        return False
    return any(name == needed or name.startswith(f"{needed}.") for name in wanted for needed in _NEEDED)


def _guarded(importer: dict) -> bool:
    """Whether the import statement that runs stands in a `try` that catches an ImportError."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals is not importer:
        frame = frame.f_back
    if frame is None:
        return False
    file, number = frame.f_code.co_filename, frame.f_lineno
    if linecache.getline(file, number, importer).startswith(("import ", "from ")):
        return False  # not indented: no need to parse the file
    try:
        tree = ast.parse("".join(linecache.getlines(file, importer)))
    except SyntaxError:  # no source at hand, as under `python -c`
        return False
    tries = [
        node for node in ast.walk(tree) if isinstance(node, ast.Try) and any(map(_catches, node.handlers))
    ]
    return any(
        body.lineno <= number <= (body.end_lineno or body.lineno) for node in tries for body in node.body
    )


def _catches(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        k is None
        or getattr(k, "id", "") in ("ImportError", "ModuleNotFoundError", "Exception", "BaseException")
        for k in kinds
    )


def _missing(module: types.ModuleType, names: Iterable[str]) -> dict[str, Exception]:
    """The names that a module does not give, with what it raises for each."""
    missing: dict[str, Exception] = {}
    for name in names:
        try:
            if name != "*":
                getattr(module, name)
        except Exception as error:  # transformers imports its modules here, which may fail in any way
            missing[name] = error
    return missing


def _one(module: str, name: str, error: Exception) -> Any:
    """What an import gets for a name that a module does not give: the working one from the table, a stand-in
    otherwise.
    """
    dotted = f"{module}.{name}"
    place, _, other = MOVED.get(dotted, "").partition(":")
    with contextlib.suppress(ImportError, AttributeError):
        if place:
            return getattr(importlib.import_module(place), other)
    return make_standin(dotted, _gone(dotted, error))


def _instead(name: str, names: Sequence[str], error: Exception) -> types.ModuleType:
    """What `from name import names`, or `import name` without them, gets where the import failed."""
    why = _gone(name, error)
    if names:  # the module may be there, and one of its submodules fail
        module = sys.modules.get(name)
        missing = dict.fromkeys(names, error) if module is None else _missing(module, names)
        return _Answer(name, module, {n: _one(name, n, e) for n, e in missing.items() if n != "*"}, why)
    top, *rest = name.split(".")
    return _beside(sys.modules[top], rest, why) if top in sys.modules else _Answer(top, None, {}, why)


def _beside(module: types.ModuleType, rest: Sequence[str], why: str) -> types.ModuleType:
    """An answer that has the real module's names, and a stand-in where the path `rest` below it leaves what
    is there.
    """
    dotted = f"{module.__name__}.{rest[0]}"
    child = sys.modules.get(dotted)
    child_module = (
        make_standin(dotted, why) if child is None or len(rest) == 1 else _beside(child, rest[1:], why)
    )
    return _Answer(module.__name__, module, {rest[0]: child_module}, why)


@contextmanager
def standins(script: Path | None = None) -> Iterator[None]:
    """Answers for imports made by EasyEdit, and by `script` if one is given, inside the block."""

    def asks(importer: dict) -> bool:
        """Whether a module that imports is one whose imports are answered."""
        name = importer.get("__name__") or ""
        if name == "easyeditor" or name.startswith("easyeditor."):
            return True
        file = importer.get("__file__")
        return script is not None and file is not None and Path(file).resolve() == script

    ours: Any = _Import(asks)
    before, builtins.__import__ = builtins.__import__, ours
    try:
        yield
    finally:
        ours.active = False  # somebody may have wrapped it meanwhile
        if builtins.__import__ is ours:
            builtins.__import__ = before
