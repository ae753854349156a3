"""Who may be trained on: the declared split of subjects.

A subject of any file below is edited in studies, or asked in the gates, so no fact about it is trained on.
The split is by subject, not by fact: an edit of a subject changes what the model says about it in every
relation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from easyedit_mdm.errors import DataError

HELD_OUT_FILES = (
    "counterfact/counterfact-val.json",
    "counterfact/counterfact_rome_700.json",
    "kamel/*/test.jsonl",
    "knowedit/*.json",
    "known/known_1000.json",
    "zsre/zsre_mend_eval_portability_gpt4.json",
)


def same_name(subject: str) -> str:
    """How subjects are compared: case and white space do not count."""
    return " ".join(subject.casefold().split())


def held_out_subjects(data_dir: str | Path) -> frozenset[str]:
    """The subjects of `HELD_OUT_FILES`, as `same_name` writes them.

    Raises:
        DataError: if a file of the split is missing, so that nobody trains on what it would have held out.
    """
    subjects: set[str] = set()
    for pattern in HELD_OUT_FILES:
        files = sorted(Path(data_dir).glob(pattern))
        if not files:
            raise DataError(
                f"{data_dir} has no {pattern}, which says what must not be trained on: give the whole folder"
            )
        for file in files:
            subjects.update(map(same_name, _subjects(file)))
    return frozenset(subjects)


class Mentions:
    """Whether a text names a held-out subject of two words or more (one, as Apple, means too much else)."""

    def __init__(self, subjects: frozenset[str]):
        self._names = {s for s in subjects if 2 <= len(s.split()) <= 6}

    def __call__(self, text: str) -> bool:
        """Whether `text` names one of them."""
        words = [word.strip(".,;:!?()[]\"'") for word in same_name(text).split()]
        return any(
            " ".join(words[i : i + n]) in self._names for n in range(2, 7) for i in range(len(words) - n + 1)
        )


def _subjects(file: Path) -> Iterator[str]:
    for record in records_of(file):
        nested = record.get("requested_rewrite")
        subject = (nested if isinstance(nested, dict) else record).get(
            "sub_label" if file.suffix == ".jsonl" else "subject"
        )
        if isinstance(subject, str):
            yield subject


def records_of(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list, or of JSON lines.

    Raises:
        DataError: if it is neither.
    """
    try:
        text = file.read_text(encoding="utf-8")
        parsed = (
            list(map(partial(json.loads), filter(str.strip, text.splitlines())))
            if file.suffix == ".jsonl"
            else json.loads(text)
        )
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}): get it again") from error
    if not isinstance(parsed, list) or not all(isinstance(record, dict) for record in parsed):
        raise DataError(f"{file} should hold a list of objects: get it again")
    return parsed
