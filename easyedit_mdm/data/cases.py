"""Benchmark data in one form: a `BenchCase` is an edit and what to ask the model after it, whatever file it
came from.

No record is dropped in silence: one that cannot be used is listed as skipped, with the reason. Fields are
read under EasyEdit's names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from easyedit_mdm.common.registry import Registry, did_you_mean
from easyedit_mdm.data.kamel import TEMPLATES, Counterfact, Unusable, counterfacts, templates, text
from easyedit_mdm.errors import DataError
from easyedit_mdm.twins.benchmark import Case, cases
from easyedit_mdm.twins.world import World

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class BenchCase:
    """One edit, and the prompts that measure it.

    Attributes:
        case_id: the file's own number where it has one, else the position in the file; `P19/3` (line 3) in
            KAMEL.
        prompt: the prompt, with its subject filled in.
        ground_truth: what the prompt's answer was before; may be "".
        locality, portability: (prompt, answer) by section; an answer is "" where the file gives none.
        same_subject: (prompt, answer) about the same subject, in other relations.
        neighborhood: prompts of other subjects whose answer is `target_true` (ROME's schema).
    """

    case_id: int | str
    prompt: str
    subject: str
    target_new: str
    ground_truth: str
    rephrase_prompts: tuple[str, ...]
    locality: dict[str, Pairs]
    portability: dict[str, Pairs]
    same_subject: Pairs = ()
    neighborhood: tuple[str, ...] = ()
    target_true: str = ""

    def request(self) -> dict[str, str]:
        """The edit as EasyEdit and `make_edit` take it."""
        return {"prompt": self.prompt, "subject": self.subject, "target_new": self.target_new}


@dataclass(frozen=True)
class Skipped:
    """A record that cannot be used (its case id; a relation's name where KAMEL's relation has no prompts),
    and why.
    """

    record: int | str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What `load_cases` found: the cases, the records it skipped, and the SHA-256 of the files it read, by
    name.
    """

    cases: list[BenchCase]
    skipped: list[Skipped]
    files: dict[str, str]


class Reader:
    """One call of `load_cases`: what was asked for, and what has been found so far."""

    def __init__(
        self, dataset: str, data_dir: Path | None, data_file: Path | None, seed: int, tokenizer: Any
    ):
        self.dataset, self.data_dir, self.data_file, self.seed, self.tokenizer = (
            dataset,
            data_dir,
            data_file,
            seed,
            tokenizer,
        )
        self.found = Loaded([], [], {})
        self._seen: set[tuple[str, str]] = set()

    def no_file(self, instead: str) -> None:
        """Check that no file was given to a data set that is not read from one; `instead` says what to do.

        Raises:
            DataError: if one was.
        """
        if self.data_file is not None:
            raise DataError(
                f"data set {self.dataset!r} is not read from one file, so {str(self.data_file)!r} cannot be"
                f" used: {instead}"
            )

    def folder(self, *wanted: str) -> Path:
        """The folder that holds `wanted`: the one given, or the one above it if that is the data set's own
        (`zsre` for `zsre/...`).

        Raises:
            DataError: if none was given, or it does not exist.
        """
        if self.data_dir is None:
            raise DataError(
                f"data set {self.dataset!r} is read from a folder of benchmark data: name it with"
                " --data-dir (in Python: data_dir)"
            )
        if not self.data_dir.is_dir():
            raise DataError(
                f"data_dir {str(self.data_dir)!r} is not a folder: pass the one that holds the benchmark data"
            )
        given = self.data_dir.absolute()
        if given.name in {Path(name).parts[0] for name in wanted} and not any(
            (given / name).exists() for name in wanted
        ):
            self.data_dir = given.parent  # files are named alike either way
        return self.data_dir

    def path(self, *names: str) -> Path:
        """The file that was given, or the first of `names` in the data folder.

        Raises:
            DataError: if there is none.
        """
        if self.data_file is not None:
            return self.data_file
        given, folder = self.data_dir, self.folder(*names)
        here = [folder / name for name in names if (folder / name).is_file()]
        if not here:
            wanted = " nor ".join(names)
            raise DataError(
                f"data_dir {str(given)!r} has no {wanted}: pass the folder that has it, or the file itself as"
                " data_file"
            )
        return here[0]

    def read(self, path: Path) -> str:
        """A file's text; its hash is noted.

        Raises:
            DataError: if it cannot be read, or is not UTF-8.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}): pass a data_dir or data_file with the files of"
                f" {self.dataset!r}"
            ) from error
        folder = self.data_dir
        name = (
            path.name
            if folder is None or not path.is_relative_to(folder)
            else path.relative_to(folder).as_posix()
        )
        self.found.files[name] = hashlib.sha256(data).hexdigest()
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, byte {error.start}: not UTF-8; get the file again, or save it as UTF-8"
            ) from error

    def records(self, path: Path) -> list[Any]:
        """The records of a JSON list.

        Raises:
            DataError: if the file is not one.
        """
        records = _parse(self.read(path), path)
        if not isinstance(records, list):
            raise DataError(
                f"{path}, line 1: the file holds {type(records).__name__}, not a list of records; is it a"
                f" file of {self.dataset!r}?"
            )
        return records

    def lines(self, path: Path) -> list[Any]:
        """The records of a file with one JSON value a line; empty lines are none.

        Raises:
            DataError: if a line is not JSON.
        """
        lines = self.read(path).split("\n")  # not splitlines: texts may hold other line separators
        return [_parse(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]

    def add(self, record: int | str, make: Callable[[], BenchCase]) -> None:
        """Take the case that `make` gives, or list the record as skipped."""
        try:
            case = make()
            if (case.prompt, case.target_new) in self._seen:
                raise Unusable("the same prompt and target as an earlier record")
        except Unusable as reason:
            self.found.skipped.append(Skipped(record, str(reason)))
            return
        self._seen.add((case.prompt, case.target_new))
        self.found.cases.append(case)

    def add_all(self, records: list[Any], make: Callable[[int | str, dict[str, Any]], BenchCase]) -> None:
        """Every record of a list through `make`, with its id."""
        for position, record in enumerate(records):
            given = record.get("case_id") if isinstance(record, dict) else None
            name = given if isinstance(given, (int, str)) else position
            self.add(name, partial(_made, make, name, record))


DATASETS: Registry[Callable[[Reader], None]] = Registry("data set")


def load_cases(
    dataset: str,
    data_dir: str | Path | None = None,
    data_file: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
) -> Loaded:
    """The cases of a data set.

    Args:
        dataset: a name in `DATASETS`.
        data_dir: folder of the benchmark data, laid out as `zsre/...`, `counterfact/...`, or the data set's
            own folder in it; the twins' own data needs none.
        data_file: the file to read in place of the one of that name in `data_dir`; `requests` is read from
            nothing else.
        limit: how many cases at most; the rest are left out at random, and the order stays.
        seed: for what `limit` leaves out, and for KAMEL's targets; nothing else is drawn.
        tokenizer: needed by KAMEL, whose targets have as many tokens as the objects they replace.

    Raises:
        UnknownNameError: for a data set that there is not.
        DataError: for a folder or file that is missing or cannot be read, a limit below 1, or KAMEL without a
            tokenizer.
    """
    fill = DATASETS[dataset]
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: give the number of cases, at least 1, or None for all")
    reader = Reader(
        dataset,
        None if data_dir is None else Path(data_dir),
        None if data_file is None else Path(data_file),
        seed,
        tokenizer,
    )
    fill(reader)
    loaded = reader.found
    if limit is None or limit >= len(loaded.cases):
        return loaded
    kept = sorted(random.Random(seed).sample(range(len(loaded.cases)), limit))
    return replace(loaded, cases=[loaded.cases[i] for i in kept])


def _parse(data: str, path: Path, line: int = 0) -> Any:
    """JSON; `line` is the line of the file, if the text is only that.

    Raises:
        DataError: with file and position.
    """
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line or error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not JSON ({error.msg}); get the file again, or mend it there") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(
            f"{path}, line {line or 1} and on: JSON that cannot be read ({error}); get the file again"
        ) from error


def _made(make: Callable[[int | str, dict[str, Any]], BenchCase], name: int | str, record: Any) -> BenchCase:
    if not isinstance(record, dict):
        raise Unusable(f"the record is not an object but {type(record).__name__}")
    return make(name, record)


# ---- parts of records --------------------------------------------------------------------------------------


def _case(
    case_id: int | str,
    prompt: Any,
    subject: Any,
    target_new: Any,
    ground_truth: str,
    rephrase_prompts: tuple[str, ...],
    **more: Any,
) -> BenchCase:
    """The parts put together, once the edit itself has been checked.

    Raises:
        Unusable: if prompt, subject or target is missing or empty, or the subject is not in the prompt.
    """
    prompt, subject, target_new = (
        text(prompt, "prompt"),
        text(subject, "subject"),
        text(target_new, "target_new"),
    )
    if "{}" in subject or prompt.count("{}") > 1:
        raise Unusable(
            "'{}' marks the subject's place in the prompt, and is in the subject or more than once in the"
            " prompt"
        )
    prompt = prompt.replace("{}", subject)
    if subject not in prompt:
        raise Unusable("the subject is not in the prompt")
    return BenchCase(
        case_id,
        prompt,
        subject,
        target_new,
        ground_truth,
        rephrase_prompts,
        **{"locality": {}, "portability": {}, **more},
    )


def _answer(value: Any, field: str) -> str:
    """A text, or the first that says something in a list of aliases (or of lists of aliases); "" if there is
    none.

    Raises:
        Unusable: for anything else.
    """
    items = value if isinstance(value, list) else [value]
    aliases = [alias for item in items for alias in (item if isinstance(item, list) else [item])]
    wrong = [alias for alias in aliases if not isinstance(alias, str)]
    if wrong:
        raise Unusable(
            f"{field} is missing" if value is None else f"{field} is not text but {type(wrong[0]).__name__}"
        )
    first = next((alias for alias in aliases if alias.strip()), None)
    return "" if first is None else text(first, field)


def _texts(value: Any, field: str) -> tuple[str, ...]:
    """A text, a list of texts, or nothing."""
    if value is None:
        return ()
    return tuple(text(item, field) for item in (value if isinstance(value, list) else [value]))


def _sections(value: Any, field: str) -> dict[str, Pairs]:
    """`{section: {prompt, ground_truth}}`, or a list of such for a section.

    Raises:
        Unusable: for anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Unusable(f"{field} is not an object but {type(value).__name__}")
    return {
        text(name, field): tuple(
            pair
            for probe in (section if isinstance(section, list) else [section])
            for pair in _pairs(probe, f"{field}.{name}")
        )
        for name, section in value.items()
    }


def _pairs(probe: Any, field: str) -> Pairs:
    """One prompt with its answer or the answer's aliases; or as many prompts as answers.

    Raises:
        Unusable: for anything else.
    """
    if not isinstance(probe, dict):
        raise Unusable(f"{field} is not an object but {type(probe).__name__}")
    prompts, answers = probe.get("prompt"), probe.get("ground_truth", "")
    if not isinstance(prompts, list):
        return ((text(prompts, f"{field}.prompt"), _answer(answers, f"{field}.ground_truth")),)
    if not isinstance(answers, list) or len(answers) != len(prompts):
        raise Unusable(f"{field} has not as many answers as prompts")
    return tuple(
        (text(prompt, f"{field}.prompt"), _answer(answer, f"{field}.ground_truth"))
        for prompt, answer in zip(prompts, answers)
    )


# ---- data sets ---------------------------------------------------------------------------------------------


def _zsre_case(case_id: int | str, record: dict[str, Any]) -> BenchCase:
    hop = record.get("portability")
    if hop is not None and not isinstance(hop, dict):
        raise Unusable(f"portability is not an object but {type(hop).__name__}")
    return _case(
        case_id, record.get("src"), record.get("subject"), record.get("alt"), _answer(record.get("answers"),
            "answers"),
        (text(record.get("rephrase"), "rephrase"),),
        locality={"neighborhood": ((text(record.get("loc"), "loc"), _answer(record.get("loc_ans"),
            "loc_ans")),)},
        portability={"one_hop": ((text(hop.get("New Question"), "New Question"),
            _answer(hop.get("New Answer"), "New Answer")),)} if hop else {},
    )  # fmt: skip


def _counterfact_case(case_id: int | str, record: dict[str, Any]) -> BenchCase:
    if "requested_rewrite" in record:
        return _rome_case(case_id, record)
    near = (
        text(record.get("locality_prompt"), "locality_prompt"),
        _answer(record.get("locality_ground_truth"), "locality_ground_truth"),
    )
    return _case(
        case_id, record.get("prompt"), record.get("subject"), record.get("target_new"),
        _answer(record.get("ground_truth"), "ground_truth"),
        (text(record.get("rephrase_prompt"), "rephrase_prompt"),), locality={"neighborhood": (near,)},
    )  # fmt: skip


def _rome_case(case_id: int | str, record: dict[str, Any]) -> BenchCase:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, dict) or not all(
        isinstance(rewrite.get(key), dict) for key in ("target_new", "target_true")
    ):
        raise Unusable("requested_rewrite has no target_new and target_true with a str")
    true = text(rewrite["target_true"].get("str"), "target_true")
    near = _texts(record.get("neighborhood_prompts"), "neighborhood_prompts")
    return _case(
        case_id, rewrite.get("prompt"), rewrite.get("subject"), rewrite["target_new"].get("str"), true,
        _texts(record.get("paraphrase_prompts"), "paraphrase_prompts"),
        locality={"neighborhood": tuple((prompt, true) for prompt in near)}, neighborhood=near,
        target_true=true,
    )  # fmt: skip


def _request_case(case_id: int | str, record: dict[str, Any]) -> BenchCase:
    return _case(
        case_id, record.get("prompt"), record.get("subject"), record.get("target_new"),
        _answer(record.get("ground_truth", ""), "ground_truth"),
        _texts(record.get("rephrase_prompt"), "rephrase_prompt"), locality=_sections(record.get("locality"),
            "locality"),
        portability=_sections(record.get("portability"), "portability"),
    )  # fmt: skip


def _json_list(
    reader: Reader, make: Callable[[int | str, dict[str, Any]], BenchCase], names: tuple[str, ...]
) -> None:
    reader.add_all(reader.records(reader.path(*names)), make)


DATASETS.register("zsre")(
    partial(_json_list, make=_zsre_case, names=("zsre/zsre_mend_eval_portability_gpt4.json",))
)
DATASETS.register("counterfact")(
    partial(
        _json_list,
        make=_counterfact_case,
        names=("counterfact/counterfact-edit.json", "counterfact/counterfact_rome_700.json"),
    )
)
DATASETS.register("knowedit")(partial(_json_list, make=_request_case, names=("knowedit/ZsRE-test-all.json",)))
DATASETS.register("knowedit_counterfact")(
    partial(_json_list, make=_request_case, names=("knowedit/wiki_counterfact_test_cf.json",))
)


@DATASETS.register("requests")
def _requests(reader: Reader) -> None:
    if reader.data_file is None:
        raise DataError(
            "data set 'requests' is a file of your own: pass it as data_file, a JSON list of objects with"
            " prompt, subject and target_new"
        )
    _json_list(reader, _own_case, ())


_FIELDS = (
    "prompt", "subject", "target_new", "ground_truth", "rephrase_prompt", "locality", "portability",
    "case_id",
)  # fmt: skip


def _own_case(case_id: int | str, record: dict[str, Any]) -> BenchCase:
    """A user's own record; a key that is nearly one of ours is told of: it would not be measured."""
    for key in record:
        hint = did_you_mean(str(key), _FIELDS)
        if key not in _FIELDS and hint != ".":
            logging.getLogger(__name__).warning("record %s: %r is not read%s", case_id, key, hint)
    return _request_case(case_id, record)


def _kamel(reader: Reader, split: str) -> None:
    """KAMEL, relation by relation; the prompts are this package's, so their hash is noted too."""
    reader.no_file("pass the folder that holds kamel/ as data_dir")
    if reader.tokenizer is None:
        raise DataError(
            f"data set {reader.dataset!r} draws targets with as many tokens as the true objects: pass the"
            " model's tokenizer"
        )
    folder, known = reader.folder("kamel") / "kamel", templates()
    relations = sorted(
        (path.name for path in folder.glob("P*") if path.name[1:].isdecimal()), key=lambda name: int(name[1:])
    )
    if not relations:
        raise DataError(
            f"{folder} has no relations (folders such as P19): pass the folder that holds kamel/ as data_dir"
        )
    reader.read(TEMPLATES)
    for relation in relations:
        if relation not in known:
            reader.found.skipped.append(
                Skipped(relation, "the relation has no prompts in kamel_templates.yaml")
            )
            continue
        drawn = counterfacts(
            reader.lines(folder / relation / f"{split}.jsonl"),
            known[relation],
            reader.tokenizer,
            f"{reader.seed}/{relation}",
        )
        for number, result in enumerate(drawn, 1):
            reader.add(f"{relation}/{number}", partial(_kamel_case, f"{relation}/{number}", result))


def _kamel_case(case_id: str, result: Counterfact | Unusable) -> BenchCase:
    if isinstance(result, Unusable):
        raise result
    return _case(
        case_id, result.prompt, result.subject, result.target_new, result.ground_truth, (result.paraphrase,)
    )


DATASETS.register("kamel")(partial(_kamel, split="test"))
DATASETS.register("kamel_train")(partial(_kamel, split="train"))


def _twins(reader: Reader, split: str) -> None:
    reader.no_file("the twins' world is made, not read")
    world = World.build()
    for number, case in enumerate(cases(world, split)):
        reader.add(number, partial(_twin_case, number, case, world))


def _twin_case(case_id: int, case: Case, world: World) -> BenchCase:
    fact = case.fact
    return _case(
        case_id, fact.prompt(), fact.subject, case.target, fact.object, (fact.paraphrase(0),
            fact.paraphrase(1)),
        locality={"neighborhood": tuple((near.prompt(), near.object) for near in case.neighbours)},
        same_subject=tuple((other.prompt(),
            other.object) for other in world.facts[fact.subject] if other is not fact),
    )  # fmt: skip


DATASETS.register("twins")(partial(_twins, split="test"))
DATASETS.register("twins_validation")(partial(_twins, split="validation"))
DATASETS.register("twins_closed")(partial(_twins, split="closed"))
