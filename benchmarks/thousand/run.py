"""A thousand real facts in one pretrained model, batch after batch: what is still written, and what is kept.

    python benchmarks/thousand/run.py run --data-dir DATA_DIR --alg MEMIT_MDM --mode rebase \
        --hparams benchmarks/thousand/smollm2-memit.yaml --out runs/thousand/smollm2-rebase
    python benchmarks/thousand/run.py tables --out runs/thousand/smollm2-rebase

CounterFact's facts (EasyEdit's split), one a subject, in random order (seed), targets of one token or more.
Modes: `rebase`, one edit of all facts so far, solved from the weights as they were, in place of the one
before; and `sequential`, each batch edited in the model that the earlier ones left, in which EasyEdit's own
methods run, too.

After every batch: the share of all facts so far that are written whole (N steps; greedy on an autoregressive
model), of the first and the latest batch; tokens that stay after prompts of facts that are never edited, and
of these facts the share, among those that the unedited model writes right, that it still writes right;
perplexity of held-out text over that of the unedited model; ||dW|| / ||W||.

`rebase` keeps the values of each batch in the folder, so it goes on where it was stopped. `sequential` begins
anew. A `mom2_dataset` of enwiki_articles.txt is the one in DATA_DIR/text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm import score_prompts
from easyedit_mdm.common.files import write_json, write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.data.cases import BenchCase, load_cases
from easyedit_mdm.editing import METHODS, EditRequest, History
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.evaluation import perplexity
from easyedit_mdm.host.methods import easyedits_method
from easyedit_mdm.models import Adapter
from easyedit_mdm.runs.methods import load_ours

HERE = Path(__file__).parent
UNTOUCHED, TEXTS = 400, 40
TEXT = Path("text") / "enwiki_articles.txt"
NO_PART = ("mom2_update_weight", "device", "batch_size", "model_parallel", "guard")  # in a value
Step = Callable[[list[BenchCase]], None]


def drawn(data_dir: Path, facts: int, seed: int) -> tuple[list[BenchCase], list[BenchCase]]:
    """The facts that are edited, and those that are left alone; no subject comes twice."""
    cases = load_cases("counterfact", data_file=data_dir / "counterfact" / "counterfact-edit.json").cases
    random.Random(seed).shuffle(cases)
    found: dict[str, BenchCase] = {}
    for case in cases:
        found.setdefault(case.subject, case)
    if len(found) < facts + UNTOUCHED:
        raise SystemExit(f"--facts {facts}: the file has {len(found)} subjects, {UNTOUCHED} are left alone")
    chosen = list(found.values())
    return chosen[:facts], chosen[facts : facts + UNTOUCHED]


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

    def report(self, done: Sequence[BenchCase], batch: int) -> dict[str, Any]:
        """All figures after a batch of so many facts."""
        exact = [
            float(score["exact"])
            for score in score_prompts(self.model, [c.prompt for c in done], [c.target_new for c in done])
        ]
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
            "exact": sum(exact) / len(exact),
            "first": sum(exact[:batch]) / len(exact[:batch]),
            "latest": sum(exact[-batch:]) / len(exact[-batch:]),
            "untouched": sum(stay) / len(stay),
            "known": sum(known) / len(known) if known else None,
            "known_n": len(known),
            "perplexity_ratio": perplexity(self.model, self.texts)["value"] / self.perplexity,
            "norm_ratio": moved,
        }


def rebase(model: Adapter, method: Any, hparams: Any, folder: Path) -> Step:
    """One edit of all facts so far; the values of every batch are kept in the folder, whatever the lambda."""
    known: list[tuple[EditRequest, Optimised]] = []
    edits: list[Edit] = []
    number = itertools.count()
    own = {k: v for k, v in shown(hparams.to_dict()).items() if k not in NO_PART}
    settings = json.dumps({**own, "model": model_fingerprint(model.native)}, default=str)

    def step(batch: list[BenchCase]) -> None:
        requests = [EditRequest.of(case.request()) for case in batch]
        belongs = {"settings": settings, "facts": [[r.prompt, r.target_new] for r in requests]}
        if edits:
            edits.pop().undo(model)
        file = folder / f"values-{next(number):03}.pt"
        if not file.exists():
            values = method.values(model, requests, hparams)
            torch.save({**belongs, "values": [vars(value) for value in values]}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        kept = torch.load(file, weights_only=True)
        if any(kept[key] != belongs[key] for key in belongs):
            raise SystemExit(f"{file} holds the values of other facts or settings: give another folder")
        known.extend(zip(requests, (Optimised(**value) for value in kept["values"]), strict=True))
        facts, values = [fact for fact, _ in known], [value for _, value in known]
        edits.append(method.edit(model, facts, hparams, values=values))
        edits[0].apply(model)

    return step


def sequential(model: Adapter, method: Any, hparams: Any) -> Step:
    """Each batch in the model that the earlier ones left."""
    history = History()

    def step(batch: list[BenchCase]) -> None:
        made = method.edit(model, [EditRequest.of(case.request()) for case in batch], hparams, history)
        made.apply(model)
        history.claim(made)

    return step


def prepared(args: argparse.Namespace, values: Path) -> tuple[Adapter, dict[str, Any], Step]:
    """The model, the settings, and what edits a batch."""
    if args.alg in METHODS:
        method, (model, hparams) = METHODS[args.alg], load_ours(args.alg, args.hparams, args.device)
        if getattr(hparams, "mom2_dataset", None) == TEXT.name:
            hparams = replace(hparams, mom2_dataset=str(Path(args.data_dir) / TEXT))
        if args.weight is not None:
            hparams = replace(hparams, mom2_update_weight=args.weight)
        if args.mode == "rebase" and not (method.batchable and method.values):
            raise SystemExit(f"--mode rebase: {args.alg} does not write several facts from their values")
        if args.mode == "rebase" and getattr(hparams, "optimise_through", "") == "weights":
            raise SystemExit(
                "--mode rebase: values optimised through the weights belong to one lambda and batch"
            )
        if args.mode != "rebase" and args.values:
            raise SystemExit(
                "--values is for --mode rebase: in a sequence values belong to the model as it is"
            )
        step = rebase(model, method, hparams, values) if args.mode == "rebase" else None
        return model, hparams.to_dict(), step or sequential(model, method, hparams)
    if args.mode == "rebase" or args.weight is not None or args.values:
        raise SystemExit(
            f"--mode rebase, --weight and --values are for our methods, {args.alg} is EasyEdit's"
        )
    model, settings, apply = easyedits_method(args.alg, args.hparams)

    def step(batch: list[BenchCase]) -> None:
        apply([
            {**case.request(), "case_id": case.case_id, "ground_truth": case.ground_truth} for case in batch
        ])  # fmt: skip

    return model, settings, step


def shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they stand in a file: the text of the second moments without its folder."""
    dataset = settings.get("mom2_dataset")
    return {**settings, "mom2_dataset": None if dataset is None else Path(dataset).name}


def batches(cases: list[BenchCase], size: int) -> Iterator[list[BenchCase]]:
    """Groups of facts."""
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def run(args: argparse.Namespace) -> None:
    """Edit, measure, write, batch after batch."""
    if not args.data_dir:
        raise SystemExit("run needs --data-dir: the folder that holds counterfact/ and text/")
    folder = Path(args.out[0])
    folder.mkdir(parents=True, exist_ok=True)
    values = Path(args.values or folder)
    values.mkdir(parents=True, exist_ok=True)
    cases, alone = drawn(Path(args.data_dir), args.facts, args.seed)
    model, settings, step = prepared(args, values)
    header = {
        "alg": args.alg, "mode": args.mode, "batch": args.batch, "seed": args.seed, "facts": args.facts,
        "hyperparameters": shown(settings),
    }  # fmt: skip
    file = folder / "curve.json"
    if file.exists() and {k: json.loads(file.read_text())[k] for k in header} != json.loads(
        json.dumps(header)
    ):
        raise SystemExit(f"{file} is of other settings: give another folder as --out")
    names = [model.site(layer).weight for layer in settings["layers"]]
    measured = Measured(model, alone, held_out(Path(args.data_dir)), names)
    reports: list[dict[str, Any]] = []
    done: list[BenchCase] = []
    took = 0.0
    for number, batch in enumerate(batches(cases, args.batch), 1):
        began = time.process_time()
        step(batch)
        took += time.process_time() - began
        done += batch
        if number % args.every == 0 or len(done) == len(cases):
            reports.append({**measured.report(done, len(batch)), "cpu_seconds": round(took, 1)})
            write_json(file, {**header, "reports": reports})
            print(json.dumps(reports[-1]), flush=True)


def tables(args: argparse.Namespace) -> None:
    """curves.json and README's table, from runs or from the committed file."""
    kept = HERE / "curves.json"
    if args.committed:
        curves = json.loads(kept.read_text(encoding="utf-8"))
    else:
        curves = {
            Path(out).name: json.loads((Path(out) / "curve.json").read_text(encoding="utf-8"))
            for out in args.out
        }
        write_json(kept, curves)
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    begin, end = "<!-- curves -->\n", "<!-- /curves -->"
    head, rest = text.split(begin)
    write_text(readme, head + begin + page(curves) + end + rest.split(end)[1])


def page(curves: dict[str, Any]) -> str:
    """A row for each run and number of facts."""
    names = ("run", "facts", "exact", "first batch", "latest batch", "untouched", "known", "perplexity")
    out = ["| " + " | ".join([*names, "norm of dW / W, largest"]) + " |", "| --- |" + " --- |" * len(names)]
    for name, curve in curves.items():
        for report in curve["reports"]:
            figures = [f"{report[key]:.2f}" for key in ("exact", "first", "latest", "untouched")]
            known = "-" if report["known"] is None else f"{report['known']:.2f} of {report['known_n']}"
            moved = max(report["norm_ratio"].values(), default=0.0)
            figures += [known, f"{report['perplexity_ratio']:.2f}", f"{moved:.2f}"]
            cells = [name, f"{report['facts']:,}", *figures]
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("--data-dir")
    parser.add_argument("--alg", default="MEMIT_MDM", help="one of our methods, or one of EasyEdit's")
    parser.add_argument("--hparams", default=str(HERE / "smollm2-memit.yaml"))
    parser.add_argument("--mode", choices=("rebase", "sequential"), default="rebase")
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--every", type=int, default=1, help="batches between two reports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weight", type=float, help="mom2_update_weight (lambda), if not the file's")
    parser.add_argument("--values", help="rebase: the folder with the values, if not the run's own")
    parser.add_argument("--device")
    parser.add_argument(
        "--out", nargs="+", default=["runs/thousand"], help="the run's folder; tables: folders"
    )
    parser.add_argument("--committed", action="store_true", help="tables from curves.json, not from runs")
    args = parser.parse_args()
    {"run": run, "tables": tables}[args.what](args)


if __name__ == "__main__":
    main()
