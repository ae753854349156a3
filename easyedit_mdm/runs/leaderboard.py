"""`easyedit-mdm leaderboard`: every method on every model, with equal search, in one table.

A suite says which models, data sets, modes and methods, and how many settings of each method are tried: the
same number for all. A model's setting of a method is the one with the largest harmonic mean of success,
paraphrase and locality on the suite's search cases, which are not those of the table. Every run is one of
`easyedit-mdm bench`, with its own file, so that what is finished is never run again, and several processes
share the work: each takes the runs that no other is at.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from easyedit_mdm.common.files import write_text
from easyedit_mdm.common.kinds import checked
from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.common.yaml_files import find_hparams, read_yaml
from easyedit_mdm.editing import METHODS
from easyedit_mdm.errors import DataError, EasyEditMDMError, FileError, HyperParameterError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.leaderboard import Entry, Left, write_board
from easyedit_mdm.report.summaries import summary
from easyedit_mdm.runs.run import BenchConfig, bench
from easyedit_mdm.runs.sweep import SCORED, score
from easyedit_mdm.session import RUN_MODES
from easyedit_mdm.twins import TWINS

SUITES = Path(__file__).parent / "suites"
PAUSE = 2.0  # seconds between two looks at runs that other processes are at


@dataclass(frozen=True)
class Mode:
    """How facts are edited; see `BenchConfig`."""

    mode: str
    facts: int
    batch_size: int | None = None


@dataclass(frozen=True)
class Search:
    """The cases on which a method's setting is chosen."""

    dataset: str
    facts: int


@dataclass(frozen=True)
class Suite:
    """What is compared.

    Attributes:
        models: as the files of hyperparameters call them.
        datasets: of the table.
        modes: by name.
        methods: the settings tried for each, as changes to the file that ships for the method and the model.
        search: where a setting is chosen; left out where there is one setting a method.
        seed: of the cases.
        text: a text below `--data-dir` that second moments are made of, instead of what the files name. The
            twins keep their own.
    """

    models: list[str]
    datasets: list[str]
    modes: dict[str, Any]
    methods: dict[str, Any]
    search: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    text: str = ""
    name: str = field(default="", compare=False)

    @classmethod
    def read(cls, named: str) -> Suite:
        """A suite that ships, by name, or a YAML file.

        Raises:
            HyperParameterError: for one that does not exist, or whose methods are not all tried equally
                often.
        """
        shipped = SUITES / f"{named}.yaml"
        path = shipped if shipped.exists() else Path(named)
        if not path.is_file():
            known = sorted(file.stem for file in SUITES.glob("*.yaml"))
            raise HyperParameterError(
                f"--suite {named!r} is neither a file nor one of"
                f" {', '.join(known)}{did_you_mean(named, known)}"
            )
        suite = cls(**checked(cls, {**read_yaml(path), "name": path.stem}, f"entry of {path.name}"))
        suite.check(path)
        return suite

    def check(self, path: Path) -> None:
        """As `read`."""
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise HyperParameterError(
                f"{path}: {unknown[0]!r} is no method of ours{did_you_mean(unknown[0], METHODS)}"
            )
        numbers = {name: len(tries or []) for name, tries in self.methods.items()}
        if len(set(numbers.values())) != 1 or not all(numbers.values()):
            raise HyperParameterError(
                f"{path}: the methods are tried unequally often ({numbers}): give each the same number of"
                " settings"
            )
        for name, mode in self.modes.items():
            if Mode(**checked(Mode, mode, f"entry of mode {name}")).mode not in RUN_MODES:
                raise HyperParameterError(f"{path}: mode {name!r} is none of {', '.join(RUN_MODES)}: {mode}")
        if max(numbers.values()) > 1:
            Search(**checked(Search, self.search, "entry of search"))
        elif self.search:
            raise HyperParameterError(
                f"{path}: search: {self.search} is for choosing, and no method has several settings: leave it"
                " out"
            )


@dataclass(frozen=True)
class Place:
    """Where a leaderboard is written, and with which data."""

    folder: Path
    data_dir: str | None = None
    device: str | None = None

    def file(self, *names: str) -> Path:
        """A run file."""
        return self.folder / "runs" / f"{'--'.join(names)}.jsonl"

    def text(self, suite: Suite) -> Path:
        """The suite's text.

        Raises:
            DataError: without `--data-dir`, or if it is not there.
        """
        file = Path(self.data_dir or "", suite.text)
        if self.data_dir is None or not file.is_file():
            raise DataError(f"suite {suite.name} needs {suite.text} below --data-dir ({self.data_dir})")
        return file.absolute()


def leaderboard(
    named: str,
    out: str | Path,
    data_dir: str | None = None,
    device: str | None = None,
    so_far: bool = False,
) -> Path:
    """Run a suite, or go on with it; writes leaderboard.html, .md, .csv and .json.

    Args:
        so_far: run nothing; write what is finished, and list what is not.

    Raises:
        HyperParameterError: for a suite that cannot be run.
        DataError: if `out` holds another suite's runs, or the suite's text is not there.
    """
    suite, place = Suite.read(named), Place(Path(out), data_dir, device)
    _note(suite, place.folder)
    left: list[Left] = []
    about = {"suite": suite.name, "seed": suite.seed}
    if so_far:
        return write_board(list(_entries(suite, place, left)), left, about, place.folder)
    if suite.text:
        place.text(suite)
    work = [(model, method) for model in suite.models for method in suite.methods]
    while work:
        waiting = [pair for pair in work if not _done(suite, place, *pair, left)]
        if len(waiting) == len(work):
            time.sleep(PAUSE)  # other processes are at all of them
        work = waiting
    once = [one for i, one in enumerate(left) if one not in left[:i]]  # some pairs were come back to
    return write_board(list(_entries(suite, place)), once, about, place.folder)


def _note(suite: Suite, folder: Path) -> None:
    """The suite, kept beside its runs.

    Raises:
        DataError: if the folder holds another one.
    """
    kept = folder / "suite.yaml"
    settings = {key: value for key, value in vars(suite).items() if key != "name" and value != ""}
    text = yaml.safe_dump(settings, sort_keys=False)
    if kept.exists() and kept.read_text(encoding="utf-8") != text:
        raise DataError(f"{kept} is another suite: give another --out, or the suite that it was begun with")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(kept, text)


def _done(suite: Suite, place: Place, model: str, method: str, left: list[Left]) -> bool:
    """All runs of one method on one model; False if another process is at one of them."""
    where = f"{method}/{model}"
    try:
        base = read_yaml(find_hparams(where))
    except HyperParameterError:
        left.append({"model": model, "method": method, "what": "all", "why": f"there is no file {where}"})
        return True
    try:
        hparams = _chosen(suite, place, model, method, base)
        for dataset in suite.datasets:
            for name, mode in suite.modes.items():
                _run(place, suite, method, hparams, dataset, name, Mode(**mode), model, left)
    except _Busy:
        return False
    except EasyEditMDMError as error:
        left.append({"model": model, "method": method, "what": "all", "why": str(error)})
    return True


class _Busy(Exception):
    """Another process is at a run."""


def _bench(config: BenchConfig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        bench(config, path, resume=True)
    except FileError as error:
        if "is being written by" not in str(error):
            raise
        raise _Busy from error


def _chosen(suite: Suite, place: Place, model: str, method: str, base: Mapping[str, Any]) -> Path:
    """The hyperparameter file of the setting that did best on the search cases; ties go to the earlier."""
    best = (-1.0, Path())
    if suite.text and base.get("mom2_dataset") and model not in TWINS:
        base = {**base, "mom2_dataset": str(place.text(suite))}
    for number, change in enumerate(suite.methods[method]):
        file = place.folder / "hparams" / f"{model}--{method}--{number}.yaml"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, yaml.safe_dump({**base, **(change or {})}, sort_keys=False))
        if len(suite.methods[method]) == 1:
            return file
        search = Search(**suite.search)
        path = place.file("search", model, method, str(number))
        config = BenchConfig(
            method, str(file), search.dataset, place.data_dir, limit=search.facts, seed=suite.seed,
            label=f"{model} {method} setting {number}", light=True, device=place.device,
        )  # fmt: skip
        _bench(config, path)
        measures = summary(read_run(path), suite.seed, 2)["measures"]
        value = score({key: measures[key] for key in SCORED if key in measures})
        best = max(best, (value, file), key=lambda pair: pair[0])
    return best[1]


def _run(
    place: Place,
    suite: Suite,
    method: str,
    hparams: Path,
    dataset: str,
    name: str,
    mode: Mode,
    model: str,
    left: list[Left],
) -> None:
    if why := _never(method, mode):
        left.append({"model": model, "method": method, "what": f"{dataset}, {name}", "why": why})
        return
    config = BenchConfig(
        method, str(hparams), dataset, place.data_dir, limit=mode.facts, seed=suite.seed,
        label=f"{model} {method} {name}", light=True, decodings=True, device=place.device,
        mode=mode.mode, batch_size=mode.batch_size,
    )  # fmt: skip
    try:
        _bench(config, place.file(model, method, dataset, name))
    except (DataError, HyperParameterError) as error:
        left.append({"model": model, "method": method, "what": f"{dataset}, {name}", "why": str(error)})


def _entries(suite: Suite, place: Place, left: list[Left] | None = None) -> Iterator[Entry]:
    """The rows of the table: what is there. With `left`, only what is finished, and the rest is noted."""
    for model, dataset, name, method in product(suite.models, suite.datasets, suite.modes, suite.methods):
        path = place.file(model, method, dataset, name)
        run = read_run(path) if path.exists() else None
        if left is not None and (run is None or len(run.cases) < run.header["dataset"]["cases"]):
            why = _never(method, Mode(**suite.modes[name])) or "not finished"
            left.append({"model": model, "method": method, "what": f"{dataset}, {name}", "why": why})
        elif run is not None:
            found = summary(run, suite.seed)
            yield Entry(model, dataset, name, method, found, _setting(suite, run.header))


def _never(method: str, mode: Mode) -> str:
    """Why a method cannot be run in a mode; empty if it can."""
    one_only = mode.mode == "batch" and not METHODS[method].batchable
    return "it writes one fact at a time" if one_only else ""


def _setting(suite: Suite, header: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen: the change, among those that were tried, that the run's hyperparameters have."""
    used, best = header.get("hparams", {}), {}
    for change in suite.methods[str(header["alg_name"])]:
        if change and all(used.get(key) == value for key, value in change.items()):
            best = change
    return json.loads(json.dumps(best))


def shipped() -> Sequence[str]:
    """Names of the suites that ship."""
    return sorted(file.stem for file in SUITES.glob("*.yaml"))
