"""What is written of a case and of a run, and how it is read back.

A run file holds JSON lines: a header, then one line a case. The types below say what stands in them; they are
what `score_prompts`, the ladder and the judge return. Reading trusts no file: a value of another type than
its record says counts as absent. So do NaN and infinity. Keys that are not named here are kept as they are.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from easyedit_mdm.errors import DataError

VERSION = 2  # of what is measured; it stands in a header's `judge`. Files without it are of version 1.

# Rungs of the ladder, the most lenient first; docs/metrics.md says what each implies. After `any_order` come
# those that show the model another canvas or another prompt, and so are neither implied nor imply anything.
RUNGS = (
    "teacher_forced", "left_to_right", "multi_step", "random", "steps_half", "one_step", "any_order",
    "canvas8", "canvas16", "canvas32", "in_context",
)  # fmt: skip


class Score(TypedDict, total=False):
    """One answer, as `score_prompts` judges it.

    Attributes:
        token_acc: share of the answer's N tokens that were written in their place.
        exact: all were.
        first_commit: the token committed first was right.
        one_step, one_step_exact: masked models: share of the tokens that are right, and whether all are, when
            every slot is committed at the first step (parallel commit).
        teacher_forced: autoregressive models: share of the tokens that are right after the right ones.
        text, text_to_end: what was written; the part before the first end of the text.
        tokens: ids on the first N slots.
        decode: settings of the decoding.
    """

    token_acc: float
    exact: bool
    first_commit: bool
    one_step: float
    one_step_exact: bool
    teacher_forced: float
    text: str
    text_to_end: str
    n_tokens: int
    tokens: list[int]
    decode: dict[str, Any]


Section = Score | list[Score]


class Sections(TypedDict, total=False):
    """The scores of a case. EasyEdit's records have one score where EasyEdit has one prompt, else a list."""

    rewrite: Section
    rephrase: Section
    same_subject: Section
    locality: dict[str, Section]
    portability: dict[str, Section]
    with_statement: dict[str, Section]


class Rung(TypedDict, total=False):
    """One rung of the ladder; `states`: how many states of partly revealed tokens were tried."""

    token_acc: float
    exact: bool
    states: int


class Counterfact(TypedDict, total=False):
    """ES to NM from sums of log-probabilities and from means, and the likelihood that they come from."""

    sum: dict[str, float]
    per_token: dict[str, float]
    likelihood: str


class Place(TypedDict, total=False):
    """A denoising step and a slot."""

    step: int
    slot: int


class Judgement(TypedDict, total=False):
    """Everything that is measured of a case with the model as it is. `mirage_gap_exact`: version 1 only."""

    rewrite_acc: list[float]
    rephrase_acc: list[float]
    multi_step: Sections
    first_wrong: Place | None
    ladder: dict[str, Rung]
    mirage_gap: float
    mirage_gap_exact: float
    given_k: list[bool | None]
    counterfact: Counterfact
    fluency: dict[str, float]
    perplexity: dict[str, float]
    locality_kept: dict[str, float]
    same_subject_kept: float


class Denoising(TypedDict, total=False):
    """Token, step and confidence of every slot."""

    tokens: list[str]
    step: list[int | None]
    confidence: list[float | None]


class EditFigures(TypedDict, total=False):
    """What an edit took: optimiser steps, forward passes, rows through a layer, bytes that keep it (a fact's
    share), the schedule of states, and the guard's figures.
    """

    steps: float
    forwards: float
    layer_passes: float
    stored_bytes: float
    schedule: str
    guard: dict[str, float | None]


class Times(TypedDict, total=False):
    """Seconds, and the most memory that was held while the edit was made, which varies as they do."""

    edit_seconds: float
    edit_peak_bytes: float
    evaluation_seconds: float


class CaseRecord(TypedDict, total=False):
    """A line of a run file: a case before and after its edit, or the error that it ended in.

    Attributes:
        alg_name: the method; older files have it in the header alone.
        batch: number of the batch that it was edited in, from 0; runs in batches or sequences only.
    """

    case_id: int | str
    subject: str | int
    prompt: str
    target_new: str
    n_tokens: int
    pre: Judgement
    post: Judgement
    edit: EditFigures
    history: dict[str, Denoising]
    time: Times
    alg_name: str
    batch: int
    error: object


class ModelRecord(TypedDict, total=False):
    """Which model; `paradigm` is `masked` or `causal`."""

    name: str
    fingerprint: str
    paradigm: str
    family: str


class SkippedRecord(TypedDict, total=False):
    """A record of the data set that cannot be used, and why."""

    record: int | str
    reason: str


class DatasetRecord(TypedDict, total=False):
    """The cases: where they are from and how they were drawn."""

    name: str
    files: dict[str, str]
    limit: int | None
    seed: int
    cases: int
    skipped: list[SkippedRecord]


class JudgeRecord(TypedDict, total=False):
    """What was measured."""

    version: int
    decode: dict[str, Any]
    rungs: bool
    fluency: bool
    held_out: list[str]
    decodings: bool


class BatchesRecord(TypedDict):
    """How a run edited several facts: facts a batch, and ids of the cases that were watched, not edited."""

    size: int
    untouched: list[int | str]


class Header(TypedDict, total=False):
    """Line 1 of a run file: everything that determines the result."""

    header: bool
    version: str
    label: str
    alg_name: str
    mode: str
    batches: BatchesRecord
    hparams: dict[str, Any]
    model: ModelRecord
    dataset: DatasetRecord
    judge: JudgeRecord
    decode: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One run file: where it was, its header, and its cases in the order of the file."""

    path: Path
    header: Header
    cases: list[CaseRecord]

    @property
    def model(self) -> str | None:
        """The model's name, None where the header does not say."""
        return self.header.get("model", {}).get("name")

    @property
    def method(self) -> str | None:
        """The method's name."""
        return self.header.get("alg_name")

    @property
    def schedule(self) -> str | None:
        """The schedule of states."""
        schedule = self.header.get("hparams", {}).get("state_schedule")
        return None if schedule is None else str(schedule)

    @property
    def name(self) -> str:
        """The header's label, or model, method and schedule, or the file's name."""
        parts = " ".join(filter(None, (self.model, self.method, self.schedule)))
        return self.header.get("label") or parts or self.path.stem


def scores(part: object) -> list[Score]:
    """The scores of a section or of several: one, a list of them, or lists by name, as one flat list."""
    if isinstance(part, list):
        return [score for entry in part for score in scores(entry)]
    if not isinstance(part, dict):
        return []
    if "token_acc" in part or "exact" in part:
        return [part]  # type: ignore[list-item]
    return [score for entry in part.values() for score in scores(entry)]


def mirage_gap(rungs: Mapping[str, Rung]) -> float:
    """Token accuracy when teacher-forced, minus token accuracy when the model's own tokens stand there.

    Both from left to right, in both paradigms. On whole targets there is no gap: by induction the two are
    right together.
    """
    written = rungs["left_to_right"] if "left_to_right" in rungs else rungs["multi_step"]
    return rungs["teacher_forced"]["token_acc"] - written["token_acc"]


def read_run(path: str | Path) -> Run:
    """Read a run file as `easyedit-mdm bench` writes it, or wrote it in an earlier version.

    Raises:
        DataError: for a file that cannot be read, a line that is no JSON object, a header that is missing or
            comes twice, a case without an id, or two cases with the same one. It names the file, the line and
            what to do.
    """
    path = Path(path)
    try:
        lines = run_lines(path.read_bytes(), path, finite=True)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): give a run file of `easyedit-mdm bench`"
        ) from None
    if not lines:
        raise DataError(f"{path}, line 1: the file is empty, without even a header: start the run again")
    (number, first), *rest = lines
    if first.get("header") is not True:
        raise DataError(
            f'{path}, line {number}: the header (an object with "header": true) is missing: give a run file '
            "of `easyedit-mdm bench`"
        )
    header: Header = _HEADER(first)
    cases: list[CaseRecord] = [_CASE(line) for _, line in rest]
    _check_cases(path, [(number, case) for (number, _), case in zip(rest, cases)])
    if header.get("judge", {}).get("version", 1) < VERSION:
        masked = header.get("model", {}).get("paradigm") != "causal"
        for judgement in (case[when] for case in cases for when in ("pre", "post") if when in case):
            _rename(judgement, masked)
    return Run(path, header, cases)


def run_lines(data: bytes, path: str | Path, finite: bool = False) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a run file as they are, with their numbers from 1; empty lines are left out.

    Args:
        path: the file's name, for errors.
        finite: read NaN and infinity as None.

    Raises:
        DataError: for a line that is no JSON object.
    """
    options: Any = {"parse_constant": lambda _: None, "parse_float": _finite} if finite else {}
    texts = [(number, text) for number, text in enumerate(data.split(b"\n"), 1) if text.strip()]
    records = []
    for number, text in texts:
        cure = (
            "start the run again"
            if number == 1
            else "delete this line and all after it, and finish with --resume"
        )
        try:
            record = json.loads(text.decode("utf-8"), **options)
        except (ValueError, RecursionError) as error:
            if number > 1 and number == texts[-1][0] and not data.endswith(b"\n"):
                raise DataError(
                    f"{path}, line {number}: half-written: finish the run with --resume"
                ) from None
            raise DataError(f"{path}, line {number}: not JSON ({error}): {cure}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: {type(record).__name__}, not a JSON object: {cure}")
        records.append((number, record))
    return records


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _check_cases(path: Path, cases: list[tuple[int, CaseRecord]]) -> None:
    seen: dict[int | str, int] = {}
    for number, case in cases:
        if case.get("header"):
            raise DataError(
                f"{path}, line {number}: a second header: two runs were written into one file; split it "
                "here, one file a run"
            )
        if "case_id" not in case:
            raise DataError(
                f"{path}, line {number}: no case_id: delete this line and finish the run with --resume"
            )
        name = case["case_id"]
        if name in seen:
            raise DataError(
                f"{path}, line {number}: case_id {name!r} was already in line {seen[name]}: delete one of "
                "the two lines"
            )
        seen[name] = number


def _rename(judgement: Judgement, masked: bool) -> None:
    """Names of version 1 turned into today's, where the meaning is the same.

    There `one_step` also stood for teacher forcing, a masked model was teacher-forced in states of any order,
    and the mirage gap was that of whole targets, to the answer in context.
    """
    for score in scores(list(judgement.get("multi_step", {}).values())):
        if "one_step" in score and not masked:
            score["teacher_forced"] = score.pop("one_step")
        elif "one_step" in score:
            score["one_step_exact"] = score["one_step"] == 1
    if "mirage_gap" in judgement:
        judgement["mirage_gap_exact"] = judgement.pop("mirage_gap")
    if "counterfact" in judgement and not masked:
        judgement["counterfact"]["likelihood"] = "causal"
    rungs = judgement.get("ladder", {})
    if masked and "teacher_forced" in rungs:
        rungs["any_order"] = rungs.pop("teacher_forced")
    if all("token_acc" in rungs.get(name, {}) for name in ("teacher_forced", "multi_step")):
        judgement["mirage_gap"] = mirage_gap(rungs)


_MISFIT = object()


def _fitting(hint: Any) -> Callable[[Any], Any]:
    """A function from a value to that value as `hint` has it, or to `_MISFIT`."""
    origin, parts = get_origin(hint), [_fitting(part) for part in get_args(hint)]
    if is_typeddict(hint):
        fields = {name: _fitting(part) for name, part in get_type_hints(hint).items()}
        return lambda value: _record(value, fields) if isinstance(value, dict) else _MISFIT
    if origin in (Union, UnionType):
        return lambda value: next(
            (fitted for part in parts if (fitted := part(value)) is not _MISFIT), _MISFIT
        )
    if origin is list:
        return lambda value: _list(value, parts[0]) if isinstance(value, list) else _MISFIT
    if origin is dict:
        return lambda value: (
            _record(value, dict.fromkeys(value, parts[1])) if isinstance(value, dict) else _MISFIT
        )
    return lambda value: _single(value, hint)


def _record(value: dict[str, Any], fields: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    fitted = {key: fields[key](part) if key in fields else part for key, part in value.items()}
    return {key: part for key, part in fitted.items() if part is not _MISFIT}


def _list(value: list[Any], fit: Callable[[Any], Any]) -> list[Any]:
    """Entries that do not fit are None where the list may hold None, which keeps the others' places."""
    fitted = [fit(entry) for entry in value]
    return [
        entry
        for entry in (fit(None) if entry is _MISFIT else entry for entry in fitted)
        if entry is not _MISFIT
    ]


def _single(value: Any, hint: Any) -> Any:
    if hint is Any or (hint is object and value is not None):
        return value
    if hint is bool and not isinstance(value, bool):
        return bool(value) if isinstance(value, int | float) and value in (0, 1) else _MISFIT
    if hint is float:
        return (
            float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else _MISFIT
        )
    return value if isinstance(value, hint) and hint is not object else _MISFIT


_HEADER, _CASE = _fitting(Header), _fitting(CaseRecord)
