"""Where the text comes from: a file, JSON lines, a `datasets` name, or a text that ships with the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.errors import MissingPackageError, StatisticsError

SHIPPED = Path(__file__).parent / "texts"
_BLOCK = 1 << 16


@dataclass(frozen=True)
class TextSource:
    """Documents, and the fingerprint under which what is made of them is kept.

    Attributes:
        name: as the user gave it.
        fingerprint: SHA-256 of the file's bytes, or name and fingerprint of the data set.
        documents: gives an iterator over the texts, from the first, at each call.
    """

    name: str
    fingerprint: str
    documents: Callable[[], Iterator[str]]


def text_source(name: str | Path) -> TextSource:
    """Find a text: a path (`.jsonl` / `.json`: one object a line with a `text`), a shipped text such as
    `twins`, or `datasets:NAME[:CONFIG[:SPLIT]]` (split `train` by default), which is the only form that may
    use the network.

    Raises:
        StatisticsError: if it is none of these.
        MissingPackageError: for a data set where `datasets` is not installed.
    """
    text = str(name)
    if text.startswith("datasets:"):
        return _data_set(text)
    shipped = SHIPPED / f"{text}.txt"
    path = shipped if shipped.is_file() else Path(text).expanduser()
    if not path.is_file():
        known = [p.stem for p in SHIPPED.glob("*.txt")]
        raise StatisticsError(
            f"mom2_dataset {text!r} is not a file{did_you_mean(text, known)} Give a plain-text file, JSON"
            " lines (.jsonl), a data set as datasets:NAME:CONFIG:SPLIT, or one of the shipped texts:"
            f" {', '.join(known)}"
        )
    read = _json_lines if path.suffix in (".jsonl", ".json") else _blocks
    return TextSource(text, _file_hash(path), lambda: read(path))


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[str]:
    """A plain text in pieces of about 64 k characters that end with a line, so that a large file need not fit
    in memory.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            while block := stream.read(_BLOCK):
                yield block + stream.readline()
    except UnicodeDecodeError as error:
        raise StatisticsError(f"{path} is not UTF-8 text: {error}") from error


def _json_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8"))["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise StatisticsError(
                    f"{path}, line {number}: no JSON object with a 'text' ({error!r})"
                ) from error
            if not isinstance(text, str):
                raise StatisticsError(
                    f"{path}, line {number}: 'text' is a {type(text).__name__}, not a string"
                )
            yield text


def _data_set(name: str) -> TextSource:
    try:
        import datasets
    except ImportError:
        raise MissingPackageError(f"{name} needs the package datasets: pip install datasets") from None
    _, path, *rest = name.split(":")
    config, split = (rest[0] or None) if rest else None, rest[1] if len(rest) > 1 else "train"
    try:
        folder = Path(path).expanduser()
        rows = (
            datasets.load_from_disk(str(folder))
            if folder.is_dir()
            else datasets.load_dataset(path, config, split=split)
        )
    except Exception as error:
        raise StatisticsError(f"{name}: datasets cannot load it ({type(error).__name__}: {error})") from error
    rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    if "text" not in rows.column_names:
        raise StatisticsError(f"{name} has no column 'text', but {', '.join(rows.column_names)}")
    return TextSource(name, f"{name} {rows._fingerprint}", lambda: (row["text"] for row in rows))
