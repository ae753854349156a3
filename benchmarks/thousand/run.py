"""A thousand real facts in one pretrained model, batch after batch: what is still written, and what is kept.

    python benchmarks/thousand/run.py run --data-dir DATA_DIR --alg MEMIT_MDM --mode rebase \
        --hparams benchmarks/thousand/smollm2-memit.yaml --out runs/thousand/smollm2-rebase
    python benchmarks/thousand/run.py tables --out runs/thousand/smollm2-rebase

CounterFact's facts (EasyEdit's split), one a subject, in random order (seed), targets of one token or more.
Modes: `rebase`, one edit of all facts so far, solved from the weights as they were, in place of the one
before; and `sequential`, each batch edited in the model that the earlier ones left, in which EasyEdit's own
methods run, too.

After every batch (`--every`): the share of all facts so far that are written whole (N steps; greedy on an
autoregressive model), of the first and the latest batch, and after paraphrases; tokens that stay after
prompts of facts that are never edited, and of these facts the share, among those that the unedited model
writes right, that it still writes right; perplexity of held-out text over that of the unedited model;
||dW|| / ||W||. At the end one fact can be taken back (`--undo`).

A run of our methods goes on where it was stopped: `rebase` keeps the values of each batch in the folder,
`sequential` the edits. One of EasyEdit's begins anew. A `mom2_dataset` of enwiki_articles.txt is the one in
DATA_DIR/text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from easyedit_mdm import score_prompts
from easyedit_mdm.common.files import write_json, write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.data.cases import BenchCase, load_cases
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.solve.batch import outputs
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.evaluation import perplexity
from easyedit_mdm.evaluation.multi_step import teacher_forced
from easyedit_mdm.host.methods import easyedits_method
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import encode, target_ids
from easyedit_mdm.runs.batches import edit_and_keep, note_unedited, put_back
from easyedit_mdm.runs.methods import BenchMethod, load_ours, ours
from easyedit_mdm.session import Session
from easyedit_mdm.smollm2 import smollm2_folder

HERE = Path(__file__).parent
UNTOUCHED, TEXTS, PARAPHRASED = 400, 40, 200
NONE = "none"  # no edit: the cheapest baseline
TEXT = Path("text") / "enwiki_articles.txt"
NO_PART = (  # what the value of one fact does not depend on
    "alg_name", "device", "batch_size", "model_parallel", "guard", "keep_edits", "L2", "emmet_lambda",
    "mom2_update_weight", "mom2_dataset", "mom2_n_tokens", "mom2_eps", "nullspace_threshold",
    "nullspace_scale",
)  # fmt: skip
ATTACHED = ("GRACE_MDM", "IKE_MDM")  # each fact of a batch adds its own part


def drawn(
    data_dir: Path, facts: int, seed: int, alone: int = UNTOUCHED
) -> tuple[list[BenchCase], list[BenchCase]]:
    """The facts that are edited, and those that are left alone; no subject comes twice."""
    chosen = pool(data_dir, seed)
    if len(chosen) < facts + alone:
        raise SystemExit(f"--facts {facts}: the file has {len(chosen)} subjects, {alone} are left alone")
    return chosen[:facts], chosen[facts : facts + alone]


def pool(data_dir: Path, seed: int) -> list[BenchCase]:
    """All facts in random order, the first of each subject."""
    cases = load_cases("counterfact", data_file=data_dir / "counterfact" / "counterfact-edit.json").cases
    random.Random(seed).shuffle(cases)
    found: dict[str, BenchCase] = {}
    for case in cases:
        found.setdefault(case.subject, case)
    return list(found.values())


def held_out(data_dir: Path) -> list[str]:
    """Passages of the last articles: the second moments are made of the first ones."""
    lines = (data_dir / TEXT).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if len(line.split()) > 60][-TEXTS:]


class Measured:
    """The model before any edit, and what is left of it."""

    def __init__(
        self, model: Adapter, alone: Sequence[BenchCase], texts: Sequence[str], names: Sequence[str]
    ):
        self.model, self.texts = model, texts
        self.prompts = [case.prompt for case in alone]
        self.answers = [case.ground_truth for case in alone]
        self.before = score_prompts(model, self.prompts, self.answers)
        self.perplexity = perplexity(model, texts)["value"]
        weights = dict(model.native.named_parameters())
        self.weights = {name: weights[name].detach().clone() for name in names}

    def written(self, cases: Sequence[BenchCase], paraphrased: bool = False) -> list[float]:
        """For each fact 1.0 if its whole target is written, else 0.0; after its first paraphrase, if so
        asked, of those that have one.
        """
        asked = [case for case in cases if case.rephrase_prompts or not paraphrased]
        prompts = [case.rephrase_prompts[0] if paraphrased else case.prompt for case in asked]
        return written(self.model, prompts, [case.target_new for case in asked])

    def report(self, done: Sequence[BenchCase], batch: int) -> dict[str, Any]:
        """All figures after a batch of so many facts."""
        exact, paraphrase = self.written(done), self.written(done[:PARAPHRASED], paraphrased=True)
        after = score_prompts(self.model, self.prompts, self.answers)
        stay = [
            sum(a == b for a, b in zip(x["tokens"], y["tokens"])) / x["n_tokens"]
            for x, y in zip(self.before, after)
        ]
        known = [float(y["exact"]) for x, y in zip(self.before, after) if x["exact"]]
        now = dict(self.model.native.named_parameters())
        moved = {n: float((now[n].detach() - w).norm() / w.norm()) for n, w in self.weights.items()}
        return {
            "facts": len(done),
            "exact": mean(exact),
            "exact_interval": interval(exact),
            "first": mean(exact[:batch]),
            "latest": mean(exact[-batch:]),
            "paraphrase": mean(paraphrase),
            "untouched": mean(stay),
            "untouched_interval": interval(stay),
            "known": mean(known) if known else None,
            "known_n": len(known),
            "perplexity_ratio": perplexity(self.model, self.texts)["value"] / self.perplexity,
            "norm_ratio": moved,
        }


def written(model: Adapter, prompts: Sequence[str], targets: Sequence[str]) -> list[float]:
    """1.0 for each target that is written whole, else 0.0.

    An autoregressive model writes a target greedily just where each token is its best one after the right
    ones: one pass for all tokens.
    """
    if model.denoises:
        return [float(score["exact"]) for score in score_prompts(model, prompts, targets)]
    ids = [torch.tensor(encode(model, prompt.rstrip())) for prompt in prompts]
    wanted = [target_ids(model, p, t) for p, t in zip(prompts, targets, strict=True)]
    return [float(right.all()) for right in teacher_forced(model, ids, wanted)]


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return sum(values) / len(values)


def interval(values: Sequence[float]) -> list[float]:
    """95 %, percentile bootstrap over facts, seed 0."""
    draws = np.random.default_rng(0).choice(np.array(values), (2000, len(values)))
    return [float(x) for x in np.percentile(draws.mean(axis=1), (2.5, 97.5))]


class Rebase:
    """One edit of all facts so far; the values of every batch are kept in the folder, whatever the lambda.

    With `rounds`, facts that the edit does not write are optimised again in the edited model, and all are
    solved again; these later values are not kept.
    """

    def __init__(self, model: Adapter, method: Any, hparams: Any, folder: Path, rounds: int):
        self.model, self.method, self.hparams, self.folder = model, method, hparams, folder
        self.rounds = rounds
        self.known: list[tuple[EditRequest, Optimised]] = []
        self.edit: Edit | None = None
        own = {k: v for k, v in shown(hparams.to_dict()).items() if k not in NO_PART}
        own["layers"] = hparams.layers[-1:]  # values are made at the last
        self.settings = json.loads(json.dumps({**own, "model": model_fingerprint(model.native)}, default=str))
        self.number = itertools.count()

    def __call__(self, batch: list[BenchCase]) -> None:
        """Edit one batch more."""
        requests = [EditRequest.of(case.request()) for case in batch]
        self._put(None)
        self.known.extend(zip(requests, self._values(requests), strict=True))
        if self.rounds:
            self._solve()
        for _ in range(self.rounds):
            self._again()

    def settle(self) -> None:
        """Solve, if that was not done since the last batch: the model is about to be measured."""
        if self.edit is None:
            self._solve()

    def without(self, number: int) -> None:
        """Take one fact back: the others are solved again."""
        del self.known[number]
        self._solve()

    def share(self, parts: Sequence[list[BenchCase]], which: int, of: int) -> None:
        """Make the values of one batch in `of`, from the one numbered `which` on, and nothing else."""
        for number, batch in enumerate(parts):
            if number % of == which:
                self.number = itertools.count(number)
                self._values([EditRequest.of(case.request()) for case in batch])

    def _values(self, requests: list[EditRequest]) -> list[Optimised]:
        facts = [[r.prompt, r.target_new] for r in requests]
        file = self.folder / f"values-{next(self.number):03}.pt"
        if not file.exists():
            values = self.method.values(self.model, requests, self.hparams)
            belongs = {"settings": json.dumps(self.settings), "facts": facts}
            torch.save({**belongs, "values": [vars(value) for value in values]}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        kept = torch.load(file, weights_only=True)
        then = type(self.hparams).as_now(json.loads(kept["settings"]))  # by an earlier version, perhaps
        then = {key: value for key, value in then.items() if key not in NO_PART}
        if kept["facts"] != facts or then != self.settings:
            raise SystemExit(f"{file} holds the values of other facts or settings: give another folder")
        return [Optimised(**value) for value in kept["values"]]

    def _again(self) -> None:
        """The facts that are not written get what is still missing of their values, as the model is now."""
        facts = [fact for fact, _ in self.known]
        there = written(self.model, [f.prompt for f in facts], [f.target_new for f in facts])
        missed = [i for i, exact in enumerate(there) if not exact]
        if not missed:
            return
        asked = [facts[i] for i in missed]
        reached = self._reached(asked)
        more = self.method.values(self.model, asked, self.hparams)
        self._put(None)
        moved = reached - self._reached(asked)
        for i, value, by in zip(missed, more, moved, strict=True):
            self.known[i] = (facts[i], replace(value, delta=value.delta + by.to(value.delta)))
        self._solve()

    def _reached(self, requests: list[EditRequest]) -> torch.Tensor:
        """What the last edited layer gives at the facts' subjects."""
        facts = [tokenise(self.model, request, self.hparams) for request in requests]
        site = self.model.site(self.hparams.layers[-1], self.hparams.rewrite_module_tmp)
        return outputs(self.model, site, facts, self.hparams)

    def _solve(self) -> None:
        self._put(None)
        facts, values = [fact for fact, _ in self.known], [value for _, value in self.known]
        self._put(self.method.edit(self.model, facts, self.hparams, values=values))

    def _put(self, edit: Edit | None) -> None:
        if self.edit is not None:
            self.edit.undo(self.model)
        if edit is not None:
            edit.apply(self.model)
        self.edit = edit


class InSequence:
    """Each batch in the model that the earlier ones left; the edits are kept in the folder."""

    def __init__(self, method: BenchMethod, session: Session, folder: Path):
        self.method, self.session, self.folder = method, session, folder
        self.batches: list[tuple[list[BenchCase], list[Edit]]] = []

    def __call__(self, batch: list[BenchCase]) -> None:
        """Edit one batch more, or put back what was kept of it."""
        before, part = len(self.session.edits), self.folder / f"{len(self.batches):05d}"
        if part.is_dir():
            if not self.batches:
                note_unedited(self.method)
            put_back(self.method, batch, part)
        else:
            edit_and_keep(self.method, batch, part)
        self.batches.append((batch, list(self.session.edits[before:])))

    def without(self, number: int) -> None:
        """Take one fact back, of a method that adds something of its own for each fact: the edit of its batch
        goes, and one without it comes.
        """
        size = len(self.batches[0][0])
        batch, edits = self.batches[number // size]
        for edit in reversed(edits):
            self.session.undo(edit)
        self.method.edit([case for i, case in enumerate(batch) if i != number % size])


def prepared(args: argparse.Namespace, values: Path) -> tuple[Adapter, dict[str, Any], Any]:
    """The model, the settings, and what edits a batch."""
    if args.alg == NONE:
        if args.mode == "rebase" or unused(args):
            raise SystemExit(
                f"--alg {NONE} edits nothing: give --mode sequential, and --hparams for the model"
            )
        model, hparams = load_ours("MEMIT_MDM", args.hparams, args.device)
        return model, {"layers": [], "model_name": hparams.model_name}, lambda batch: None
    if args.alg in METHODS:
        method, (model, hparams) = METHODS[args.alg], load_ours(args.alg, args.hparams, args.device)
        if getattr(hparams, "mom2_dataset", None) == TEXT.name:
            text = Path(args.data_dir) / TEXT
            if args.protect:
                text = protected(args, values)
            hparams = replace(hparams, mom2_dataset=str(text))
        elif args.protect:
            raise SystemExit(f"--protect: {args.hparams} takes no second moments of {TEXT.name}")
        if args.weight is not None:
            hparams = replace(hparams, mom2_update_weight=args.weight)
        if args.mode == "rebase" and not (method.batchable and method.values):
            raise SystemExit(f"--mode rebase: {args.alg} does not write several facts from their values")
        if args.mode == "rebase" and getattr(hparams, "optimise_through", "") == "weights":
            raise SystemExit(
                "--mode rebase: values optimised through the weights belong to one lambda and batch"
            )
        if args.mode != "rebase" and (args.values or args.rounds or args.share):
            raise SystemExit(
                "--values, --rounds and --share are for --mode rebase: in a sequence values belong to the"
                " model as it is"
            )
        if args.undo is not None and args.mode != "rebase" and args.alg not in ATTACHED:
            raise SystemExit(f"--undo: {args.alg} in a sequence writes all facts of a batch by one update")
        if args.mode == "rebase":
            return model, hparams.to_dict(), Rebase(model, method, hparams, values, args.rounds)
        made = ours(model, hparams)
        assert made.session is not None
        return model, hparams.to_dict(), InSequence(made, made.session, values / "edits")
    if args.mode == "rebase" or unused(args):
        raise SystemExit(
            "--mode rebase, --weight, --values, --share, --protect, --rounds and --undo are for our methods,"
            f" {args.alg} is EasyEdit's"
        )
    model, settings, apply = easyedits_method(args.alg, theirs(args))

    def step(batch: list[BenchCase]) -> None:
        apply([
            {**case.request(), "case_id": case.case_id, "ground_truth": case.ground_truth} for case in batch
        ])  # fmt: skip

    return model, settings, step


def theirs(args: argparse.Namespace) -> str:
    """EasyEdit's file with the model's folder in it, under a name that tells EasyEdit what kind it is.

    AlphaEdit and UltraEdit look for `llama` in the name. AlphaEdit writes its projection into the folder that
    it is called in, and that one is made the run's.
    """
    folder, given = Path(args.out[0]).absolute(), yaml.safe_load(Path(args.hparams).read_text())
    size = given.get("batch_size", args.batch)
    if size != args.batch:  # UltraEdit passes over the requests that are too many
        raise SystemExit(f"{args.hparams} says batch_size: {size}, --batch is {args.batch}: give the same")
    model = folder / "llama"
    if not model.exists():
        model.symlink_to(smollm2_folder(given["model_name"]), target_is_directory=True)
    given["model_name"] = str(model)
    if "tokenizer_name" in given:
        given["tokenizer_name"] = str(model)
    if given.get("mom2_dataset") == TEXT.name:
        given["mom2_dataset"] = str((Path(args.data_dir) / TEXT).absolute())
    file = folder / "settings.yaml"
    write_text(file, yaml.safe_dump(given, sort_keys=False))
    os.chdir(folder)
    return str(file)


def unused(args: argparse.Namespace) -> bool:
    """Whether options are given that only our methods can follow."""
    numbers = (args.weight, args.values, args.share, args.protect or None, args.rounds or None, args.undo)
    return any(value is not None for value in numbers)


def protected(args: argparse.Namespace, folder: Path) -> Path:
    """A text for the second moments: prompts of so many facts that are neither edited nor measured, each
    with the answer that it has, and as many words of the encyclopedia, in turn.
    """
    edited, alone = drawn(Path(args.data_dir), args.facts, args.seed, args.untouched)
    taken = {case.subject for case in edited + alone}
    others = [case for case in pool(Path(args.data_dir), args.seed) if case.subject not in taken]
    if len(others) < args.protect:
        raise SystemExit(f"--protect {args.protect}: the file has {len(others)} other subjects")
    lines = [f"{case.prompt} {case.ground_truth}" for case in others[: args.protect]]
    articles = (line for line in (Path(args.data_dir) / TEXT).read_text(encoding="utf-8").splitlines())
    parts, ahead = [], 0
    for line in lines:
        parts.append(line)
        ahead += len(line.split())
        while ahead > 0 and (more := next(articles, None)) is not None:
            parts.append(more)
            ahead -= len(more.split())
    file = folder / f"protect-{args.protect}.txt"
    write_text(file, "\n".join(parts) + "\n")
    return file


def shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they stand in a file: the text of the second moments without its folder."""
    dataset = settings.get("mom2_dataset")
    names = ("model_name", "tokenizer_name")
    plain = {name: Path(str(settings[name])).name for name in names if name in settings}
    return {**settings, **plain, "mom2_dataset": None if dataset is None else Path(dataset).name}


def batches(cases: list[BenchCase], size: int) -> Iterator[list[BenchCase]]:
    """Groups of facts."""
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def run(args: argparse.Namespace) -> None:
    """Edit, measure, write, batch after batch."""
    if not args.data_dir:
        raise SystemExit("run needs --data-dir: the folder that holds counterfact/ and text/")
    folder = Path(args.out[0]).absolute()
    args.data_dir = str(Path(args.data_dir).absolute())
    folder.mkdir(parents=True, exist_ok=True)
    values = Path(args.values or folder)
    values.mkdir(parents=True, exist_ok=True)
    cases, alone = drawn(Path(args.data_dir), args.facts, args.seed, args.untouched)
    cases = cases[: args.first]
    if args.undo is not None and not 0 <= args.undo < len(cases):
        raise SystemExit(f"--undo {args.undo}: there are facts 0 to {len(cases) - 1}")
    if args.share and not 0 <= args.share[0] < args.share[1]:
        raise SystemExit(f"--share {args.share[0]} {args.share[1]}: give 0 <= K < M")
    model, settings, step = prepared(args, values)
    if args.share:
        step.share(list(batches(cases, args.batch)), *args.share)
        return
    header = {
        "alg": args.alg, "mode": args.mode, "batch": args.batch, "seed": args.seed, "facts": args.facts,
        "first": args.first, "untouched": args.untouched, "texts": args.texts,
        "protect": args.protect, "rounds": args.rounds,
        "hyperparameters": shown(settings),
    }  # fmt: skip
    header = json.loads(json.dumps(header))
    file = folder / "curve.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {**header, "reports": []}
    if {key: kept.get(key) for key in header} != header:
        raise SystemExit(f"{file} is of other settings: give another folder as --out")
    reports: list[dict[str, Any]] = kept["reports"]
    known = {report["facts"]: report["cpu_seconds"] for report in reports}
    write_json(file, {**header, "reports": reports})
    names = settings.get("inner_params") or [model.site(layer).weight for layer in settings["layers"]]
    names = [name if name.endswith(".weight") else f"{name}.weight" for name in names]
    measured = Measured(model, alone, held_out(Path(args.data_dir))[: args.texts], names)
    done: list[BenchCase] = []
    took = 0.0
    for number, batch in enumerate(batches(cases, args.batch), 1):
        began = time.process_time()
        step(batch)
        took += time.process_time() - began
        done += batch
        if len(done) in known:  # measured before the run was cut off
            took = known[len(done)]
        elif number % args.every == 0 or len(done) == len(cases):
            if isinstance(step, Rebase):
                began = time.process_time()
                step.settle()
                took += time.process_time() - began
            reports.append({**measured.report(done, len(batch)), "cpu_seconds": round(took, 1)})
            write_json(file, {**header, "reports": reports})
            print(json.dumps(reports[-1]), flush=True)
    if args.undo is not None:
        if isinstance(step, Rebase):
            step.settle()
        undone = taken_back(measured, done, step, args.undo)
        write_json(file, {**header, "reports": reports, "undone": undone})
        print(json.dumps(undone), flush=True)


def taken_back(measured: Measured, done: list[BenchCase], step: Any, number: int) -> dict[str, Any]:
    """One fact of all is taken back: what becomes of it and of the others."""
    before = measured.written(done)
    step.without(number)
    after = measured.written(done)
    others = [i for i in range(len(done)) if i != number]
    answer = score_prompts(measured.model, [done[number].prompt], [done[number].ground_truth])[0]
    return {
        "fact": number,
        "written_before": before[number],
        "written_after": after[number],
        "old_answer_after": float(answer["exact"]),
        "others_before": sum(before[i] for i in others),
        "others_after": sum(after[i] for i in others),
        "others_changed": sum(before[i] != after[i] for i in others),
        "others": len(others),
    }


def tables(args: argparse.Namespace) -> None:
    """curves.json and README's table, from runs or from the committed file."""
    kept = HERE / "curves.json"
    if args.committed:
        curves = json.loads(kept.read_text(encoding="utf-8"))
    else:
        runs = [Path(out) for out in args.out]
        missing = [str(folder) for folder in runs if not (folder / "curve.json").is_file()]
        if missing:
            raise SystemExit(f"{', '.join(missing)}: no curve.json there; name the folders of runs")
        curves = {f.name: json.loads((f / "curve.json").read_text(encoding="utf-8")) for f in runs}
        before = json.loads(kept.read_text(encoding="utf-8")) if args.keep else {}
        curves |= {name: curve for name, curve in before.items() if name not in curves}
        write_json(kept, curves)
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    begin, end = "<!-- curves -->\n", "<!-- /curves -->"
    head, rest = text.split(begin)
    text = head + begin + page(curves) + end + rest.split(end)[1]
    begin, end = "<!-- bound -->\n", "<!-- /bound -->"
    head, rest = text.split(begin)
    bound = json.loads((HERE / "bound.json").read_text(encoding="utf-8"))
    write_text(readme, head + begin + bound_page(bound) + end + rest.split(end)[1])


def page(curves: dict[str, Any]) -> str:
    """A row for each run and number of facts."""
    names = (
        "run", "facts", "exact", "first batch", "latest batch", "paraphrase", "untouched", "known",
        "perplexity", "norm of dW / W, largest",
    )  # fmt: skip
    out = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for name, curve in curves.items():
        for report in curve["reports"]:
            known = "-" if report["known"] is None else f"{report['known']:.2f} of {report['known_n']}"
            within = report.get("exact_interval")  # the first runs had neither interval nor paraphrases
            cells = [
                name, f"{report['facts']:,}",
                f"{report['exact']:.2f}" + (f" [{within[0]:.2f}, {within[1]:.2f}]" if within else ""),
                *(f"{report[key]:.2f}" if key in report else "-"
                  for key in ("first", "latest", "paraphrase", "untouched")),
                known, f"{report['perplexity_ratio']:.2f}",
                f"{max(report['norm_ratio'].values(), default=0.0):.2f}",
            ]  # fmt: skip
            out.append("| " + " | ".join(cells) + " |")
    undone = {name: curve["undone"] for name, curve in curves.items() if "undone" in curve}
    if undone:
        out += [
            "",
            "| one fact taken back | which | written, before and after | others written, before and after |"
            " others changed |",
            "| --- | --- | --- | --- | --- |",
        ]
    for name, one in undone.items():
        whole, others = (
            [f"{one[f'{what}_{when}']:,.0f}" for when in ("before", "after")]
            for what in ("written", "others")
        )
        cells = [name, str(one["fact"] + 1), ", ".join(whole), ", ".join(others)]
        out.append("| " + " | ".join([*cells, f"{one['others_changed']} of {one['others']}"]) + " |")
    return "\n".join(out) + "\n"


def bound_page(bound: dict[str, Any]) -> str:
    """A row for each layer."""
    out = ["| layer | facts | rank of their keys | width of a key | spanned |", "|" + " --- |" * 5]
    for layer, one in bound["layers"].items():
        cells = [layer, f"{bound['facts']:,}", f"{one['above_0.01']:,}", f"{one['inner']:,}"]
        out.append("| " + " | ".join([*cells, f"{one['spanned_of_others']:.2f}"]) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("--data-dir")
    parser.add_argument(
        "--alg", default="MEMIT_MDM", help="one of our methods, or one of EasyEdit's; none edits nothing"
    )
    parser.add_argument("--hparams", default=str(HERE / "smollm2-memit.yaml"))
    parser.add_argument("--mode", choices=("rebase", "sequential"), default="rebase")
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--untouched", type=int, default=UNTOUCHED, help="facts that are left alone")
    parser.add_argument(
        "--texts", type=int, default=TEXTS, help="held-out passages; masked models read each token apart"
    )
    parser.add_argument("--every", type=int, default=1, help="batches between two reports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weight", type=float, help="mom2_update_weight (lambda), if not the file's")
    parser.add_argument("--first", type=int, help="edit these of the facts alone; what is measured stays")
    parser.add_argument(
        "--protect", type=int, default=0, help="second moments also of prompts of so many other facts"
    )
    parser.add_argument(
        "--rounds", type=int, default=0, help="rebase: optimise what is not written again, so often"
    )
    parser.add_argument("--undo", type=int, help="at the end take this fact back, counted from 0")
    parser.add_argument("--values", help="rebase: the folder with the values, if not the run's own")
    parser.add_argument(
        "--share", nargs=2, type=int, metavar=("K", "M"),
        help="rebase: only make the values of every M-th batch from the K-th on, beside other processes",
    )  # fmt: skip
    parser.add_argument("--device")
    parser.add_argument(
        "--out", nargs="+", default=["runs/thousand"], help="the run's folder; tables: folders"
    )
    parser.add_argument("--keep", action="store_true", help="tables: beside what curves.json holds already")
    parser.add_argument("--committed", action="store_true", help="tables from curves.json, not from runs")
    args = parser.parse_args()
    {"run": run, "tables": tables}[args.what](args)


if __name__ == "__main__":
    main()
