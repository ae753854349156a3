"""Files that are written whole or not at all, and read without trusting what they hold.

A file is written beside its place, brought to the disk, and moved there in one step: whoever looks, before or
after a crash, sees the old file or the new one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_mdm.errors import EasyEditMDMError, FileError

_CURES = {
    errno.ENOSPC: "the disk is full: free some space, or write to another disk",
    errno.EDQUOT: "your quota on this disk is used up: free some space, or write to another disk",
    errno.EROFS: "the disk is mounted read-only: write elsewhere",
    errno.EACCES: (
        "this folder or file may not be written: check its owner and permissions, or write elsewhere"
    ),
    errno.EPERM: (
        "this folder or file may not be written: check its owner and permissions, or write elsewhere"
    ),
    errno.ENOENT: "a folder on the way does not exist: make it first",
    errno.ENOTDIR: "a file stands where a folder should be: give another place",
    errno.EISDIR: "a folder stands where the file should be: give another name",
    errno.EEXIST: "something stands there already: give another name, or remove it",
    errno.ENOTEMPTY: "something stands there already: give another name, or remove it",
}
# what the safetensors library may raise for a file that is not what it says; a panic of its Rust part is a
# BaseException
_FOREIGN = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    MemoryError,
    RecursionError,
    OverflowError,
)


@contextmanager
def explained(path: Path, what: str = "written") -> Iterator[None]:
    """Turns what the operating system says about `path` into an error that says what to do.

    Raises:
        FileError: for an `OSError`, or the same inside safetensors.
    """
    from safetensors import SafetensorError

    try:
        yield
    except EasyEditMDMError:
        raise
    except OSError as error:
        raise FileError(
            f"{path} cannot be {what}: {_CURES.get(error.errno or 0, error.strerror or str(error))}"
        ) from error
    except SafetensorError as error:
        number = next((n for n in _CURES if os.strerror(n) in str(error)), 0)
        raise FileError(f"{path} cannot be {what}: {_CURES.get(number, str(error))}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write; it takes the place of `path` when the block ends, and is removed if the
    block fails.

    Raises:
        FileError: if it cannot be written (disk full, read-only folder, ...). What stood at `path` is
            untouched then.
    """
    path = Path(path)
    part = _part(path)
    with explained(path):
        _sweep(path)
        try:
            yield part
            part.chmod(0o666 & ~_umask())
            _to_disk(part)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _to_disk(path.parent)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path` when the block ends, and is removed if the block fails.

    Raises:
        FileError: if `path` exists and is not an empty folder, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileError(f"{path} exists: give another folder, or remove it (nothing is ever overwritten)")
    part = _part(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        part.mkdir()
        try:
            yield part
            for inside in [*sorted(part.rglob("*")), part]:
                _to_disk(inside)
            os.replace(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _to_disk(path.parent)


def write_text(path: str | Path, text: str, errors: str = "strict") -> None:
    """Write a text file (UTF-8, line ends as they are), whole or not at all.

    Raises:
        FileError: see `replacing`.
    """
    with replacing(path) as part:
        part.write_bytes(text.encode("utf-8", errors))


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all; NaN and infinity, which JSON lacks, become null.

    Raises:
        FileError: see `replacing`.
    """
    write_text(path, json.dumps(_plain(value), indent=indent, default=str, allow_nan=False) + "\n")


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        FileError: see `replacing`.
    """
    from safetensors.torch import save_file

    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        ready[name] = (
            value.clone() if place in seen else value
        )  # safetensors refuses memory that two tensors share
        seen.add(place)
    with replacing(path) as part:
        beside = part.with_name(
            f"{part.name.removesuffix('.part')}-tensors.part"
        )  # the library writes a file of its own first
        beside.mkdir()
        try:
            save_file(ready, beside / "tensors", metadata=dict(metadata or {}) or None)
            os.replace(beside / "tensors", part)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def append_line(stream: Any, path: Path, line: str) -> None:
    """Add a line to an open file and bring it to the disk.

    Raises:
        FileError: if that fails; the file then ends in part of a line, which resuming cuts off.
    """
    with explained(path):
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_json(path: str | Path, error: type[EasyEditMDMError], what: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        error: the class of what is raised.
        what: what the file should be, for the message.

    Raises:
        EasyEditMDMError: of that class, if the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(
            f"{path} cannot be read ({problem.strerror or problem}): it should be {what}"
        ) from problem
    except (
        ValueError,
        RecursionError,
    ) as problem:  # not UTF-8, not JSON, a number of thousands of digits, thousands of brackets
        raise error(f"{path} is not valid JSON ({problem}): it should be {what}; get it again") from problem
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, not an object: it should be {what}")
    return value


@contextmanager
def opened_tensors(
    path: str | Path, error: type[EasyEditMDMError], what: str, cure: str = "remove it, or get it again"
) -> Iterator[Any]:
    """safetensors' `safe_open`; whatever goes wrong with the file inside the block becomes one error.

    Raises:
        EasyEditMDMError: of class `error`, naming the file and what it should be.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except EasyEditMDMError:
        raise
    except (SafetensorError, *_FOREIGN) as problem:
        raise error(f"{path} is not {what} ({problem}): {cure}") from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        raise error(f"{path} is not {what} (it breaks the safetensors library): {cure}") from problem


def check_size(path: str | Path, error: type[EasyEditMDMError], what: str) -> None:
    """Check that a file that is to be read as a whole is smaller than the memory of this machine: a file with
    holes may claim any size. A file that is not there passes.

    Raises:
        EasyEditMDMError: of class `error`, with both sizes.
    """
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else size
    if size > memory:
        raise error(
            f"{path} has {size:,} bytes, and this machine {memory:,} of memory: it cannot be read as {what};"
            " get it again, or use a larger machine"
        )


def read_tensors(
    path: str | Path, error: type[EasyEditMDMError], what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises:
        EasyEditMDMError: of class `error`, if it cannot be read, is larger than the memory, or holds NaN or
            infinity.
    """
    check_size(path, error, what)
    with opened_tensors(path, error, what) as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        metadata = dict(stored.metadata() or {})
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise error(
                f"{path}: {name!r} holds NaN or infinity, so this is not {what} that can be used: get it"
                " again"
            )
    return tensors, metadata


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")


def _sweep(path: Path) -> None:
    """Remove what processes of this machine that are no more left beside `path`."""
    start = f".{path.name}.{socket.gethostname()}-"
    for left in path.parent.glob(f".*{socket.gethostname()}-*.part"):
        number = left.name.removeprefix(start).removesuffix(".part").removesuffix("-tensors")
        if left.name.startswith(start) and number.isdigit() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle for a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, and say so
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's umask; reading it means setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
