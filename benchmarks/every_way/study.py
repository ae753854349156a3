"""An edit that is written whichever way it is decoded: the runs of PROTOCOL.md, and their tables.

    python benchmarks/every_way/study.py tries --model twin-llada    (validation facts: what was tried)
    python benchmarks/every_way/study.py run --model twin-llada      (test facts, the chosen settings, once)
    python benchmarks/every_way/study.py tables                      (README's tables, from results/)

Every command writes JSON lines into `results/`, a header first, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from easyedit_mdm import Session, load_model
from easyedit_mdm.common.files import write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.evaluation import score_prompts
from easyedit_mdm.models import Adapter
from easyedit_mdm.twins.benchmark import Case, cases
from easyedit_mdm.twins.world import RELATIONS, Fact, World

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CANVAS = 16
SUBJECTS = {"tries": ("validation", 16), "run": ("test", 80)}
PARTNER = {"twin-llada": "twin-llama", "twin-dream": "twin-qwen"}  # of the same family, autoregressive
OPEN = {"open_canvas": CANVAS, "state_schedule": "spread", "max_states": 16}
SLOW = {"v_num_grad_steps": 150, "v_lr": 0.1, "early_stop_loss": 0.02}
THROUGH = {"optimise_through": "weights"}
# what the files of each twin are changed by; "shipped" is the denoising-aware edit of today
CHOSEN: dict[tuple[str, str], dict[str, Any]] = {
    ("twin-llada", "ROME_MDM"): OPEN,
    ("twin-llada", "MEMIT_MDM"): OPEN,
    ("twin-dream", "ROME_MDM"): {**OPEN, **SLOW, "clamp_norm_factor": 2.0},
    ("twin-dream", "MEMIT_MDM"): {**OPEN, **THROUGH},
}
WAYS = ("one_step", "half", "n_steps", "random", "left_to_right", "canvas")
LOCAL = ("neighbours", "same_subject")
PARAPHRASED = ("paraphrase", "paraphrase_one_step", "paraphrase_canvas")


def arms(model: str, method: str, masked: bool) -> dict[str, dict[str, Any]]:
    """The arms of the test: what each changes in the twin's file."""
    if not masked:
        return {"shipped": {}, "open": {"open_canvas": CANVAS}}
    chosen = CHOSEN[model, method]
    plain = {"state_schedule": "full_mask"}
    return {
        "plain": plain,
        "shipped": {},
        "plain, open": {**chosen, **plain},
        "open": chosen,
    }


def tried(model: str, method: str) -> dict[str, dict[str, Any]]:
    """The settings that were tried on validation facts."""
    found = {
        "shipped": {},
        "open": {"open_canvas": CANVAS},
        "open, spread": OPEN,
        "open, spread of 64": {**OPEN, "max_states": 64},
        "open, spread, keys of all states": {**OPEN, "key_states": "average"},
        "open, spread, slow, clamp 2": {**OPEN, **SLOW, "clamp_norm_factor": 2.0},
        "open, spread, slow, clamp 3": {**OPEN, **SLOW, "clamp_norm_factor": 3.0},
        "open, spread, slow, clamp 4": {**OPEN, **SLOW, "clamp_norm_factor": 4.0},
    }
    if method == "MEMIT_MDM":
        found |= {
            "open, spread, through": {**OPEN, **THROUGH},
            "open, spread, slow, clamp 3, through": {
                **OPEN, **SLOW, **THROUGH, "clamp_norm_factor": 3.0
            },
            "open, spread, slow, clamp 3, through, a key each state": {
                **OPEN, **SLOW, **THROUGH, "clamp_norm_factor": 3.0, "key_states": "per_state"
            },
            "open, spread, slow, clamp 4, through, other text 10": {
                **OPEN, **SLOW, **THROUGH, "clamp_norm_factor": 4.0, "mom2_factor": 10
            },
        }  # fmt: skip
    return found


def chosen_facts(world: World, split: str, number: int) -> list[Case]:
    """One edit a subject, targets of 1 to 8 tokens in turn: the relation that follows the one in which
    benchmarks/multi_token edits the subject.
    """
    open_ended = [i for i, relation in enumerate(RELATIONS) if not relation.closed]
    found = []
    for case in cases(world, split):
        before = open_ended.index(RELATIONS.index(case.fact.relation))
        fact = world.facts[case.fact.subject][open_ended[(before + 1) % len(open_ended)]]
        if case.length != 1 + len(found) % world.settings.max_length or len(found) == number:
            continue
        if any(other.fact.subject == fact.subject for other in found):
            continue
        rng = random.Random(f"{world.settings.seed}/every way/{fact.subject}/{case.length}")
        near = tuple(world.neighbours(fact, 3))
        found.append(Case(fact, world.other_object(fact, case.length, rng), near))
    return found


class Judge:
    """What is measured of an edited model.

    Attributes:
        reads: the held-out wordings, by number, after which the unedited model writes a fact's own object.
    """

    def __init__(self, model: Adapter, world: World, edited: Sequence[Case]):
        self.model, self.world = model, world
        facts = {f.prompt(): f for case in edited for f in (case.fact, *self.kept(case))}
        scores = score_prompts(model, list(facts), [f.object for f in facts.values()])
        self.before = {prompt: s["tokens"] for prompt, s in zip(facts, scores)}
        self.known = {prompt: bool(s["exact"]) for prompt, s in zip(facts, scores)}
        self.reads = {case.fact.prompt(): self._read(case) for case in edited}

    def kept(self, case: Case) -> list[Fact]:
        """Neighbours, then the subject's other facts."""
        same = [f for f in self.world.facts[case.fact.subject] if f.relation is not case.fact.relation]
        return [*case.neighbours, *same]

    def _read(self, case: Case) -> list[int]:
        asked = [case.fact.paraphrase(i) for i in range(2)]
        scores = score_prompts(self.model, asked, [case.fact.object] * 2)
        return [i for i, s in enumerate(scores) if s["exact"]]

    def __call__(self, case: Case) -> dict[str, Any]:
        """Every way of decoding, paraphrases, and what is kept."""
        asked, kept = [case.fact.prompt(), *(case.fact.paraphrase(i) for i in range(2))], self.kept(case)
        targets = [case.target] * 3
        scores = score_prompts(
            self.model, [*asked, *(f.prompt() for f in kept)], [*targets, *(f.object for f in kept)]
        )
        longer = score_prompts(self.model, asked, targets, DecodeConfig(canvas=CANVAS))
        ended = [float(s["text_to_end"] == case.target) for s in longer]
        reads = [1 + i for i in self.reads[case.fact.prompt()]]
        found: dict[str, Any] = {"n_steps": float(scores[0]["exact"]), "canvas": ended[0]}
        found["canvas_begins"] = float(longer[0]["exact"])
        found["wordings"] = {str(i): [float(scores[i]["exact"]), ended[i]] for i in reads}
        found["paraphrase"] = average([float(scores[i]["exact"]) for i in reads])
        found["paraphrase_canvas"] = average([ended[i] for i in reads])
        same = [
            average([float(a == b) for a, b in zip(s["tokens"], self.before[f.prompt()], strict=True)])
            for s, f in zip(scores[3:], kept, strict=True)
        ]
        near = len(case.neighbours)
        found |= {"neighbours": average(same[:near]), "same_subject": average(same[near:])}
        if self.model.masked:
            found |= {
                "one_step": float(scores[0]["one_step_exact"]),
                "paraphrase_one_step": average([float(scores[i]["one_step_exact"]) for i in reads]),
                "half": self._decoded(case, DecodeConfig(steps=(case.length + 1) // 2)),
                "random": self._decoded(case, DecodeConfig(order="random")),
                "left_to_right": self._decoded(case, DecodeConfig(order="left_to_right")),
            }
            found["every_way"] = min(found[way] for way in WAYS)
        return found

    def _decoded(self, case: Case, decode: DecodeConfig) -> float:
        return float(score_prompts(self.model, [case.fact.prompt()], [case.target], decode)[0]["exact"])


def average(values: Sequence[Any]) -> Any:
    """Of those that are there; None if none is."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def edited(
    model: Adapter, judge: Judge, some: Sequence[Case], hparams: ROMEMDMHyperParams
) -> Iterator[dict[str, Any]]:
    """A line a case."""
    for case in some:
        began = time.process_time()
        with Session(model, hparams) as session:
            (edit,) = session.edit([EditRequest.of(case.request())])
            cpu = time.process_time() - began
            outcome = edit.card["facts"][0]
            yield {
                "subject": case.fact.subject,
                "relation": case.fact.relation.name,
                "n_tokens": case.length,
                "target": case.target,
                "known": judge.known[case.fact.prompt()],
                **judge(case),
                "steps": outcome["steps"],
                "layer_passes": outcome["layer_passes"],
                "last_loss": outcome["losses"][-1],
                "cpu_seconds": round(cpu, 3),
            }


def lines_of(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file holds already; it is begun if it does not exist. A half-written last line is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    kept, *lines = [json.loads(line) for line in whole.splitlines()]
    if kept != header:
        raise SystemExit(f"{path} is a run of something else: move it away")
    return lines


def run(args: argparse.Namespace) -> None:
    """All series of one model."""
    torch.set_num_threads(args.threads)
    world, model = World.build(), load_model(args.model)
    split, number = SUBJECTS[args.command]
    asked = chosen_facts(world, split, number)
    path = Path(args.out) / f"{args.command}-{args.model}.jsonl"
    header = {"command": args.command, "model": args.model, "fingerprint": model_fingerprint(model.native)}
    known = {(x["method"], x["arm"], x["subject"]): x.get("changed") for x in lines_of(path, header)}
    judge = Judge(model, world, asked)
    series = []
    for method in args.methods:
        makes = (
            tried(args.model, method) if args.command == "tries" else arms(args.model, method, model.masked)
        )
        for arm, changes in makes.items():
            if args.arms and arm not in args.arms:
                continue
            done = [known.get((method, arm, case.fact.subject), changes) for case in asked]
            if any(then not in (None, changes) for then in done):
                raise SystemExit(f"{path} has {method}, {arm}, with other settings: move it away")
            left = [case for case in asked if (method, arm, case.fact.subject) not in known]
            file = METHODS[method].hparams.from_hparams(f"{method}/{args.model}")
            series.append((method, arm, changes, replace(file, **changes), left))
    with (
        path.open("a", encoding="utf-8") as stream,
        tqdm(total=sum(len(left) for *_, left in series), desc=args.model, unit="edit") as bar,
    ):
        for method, arm, changes, hparams, left in series:
            for line in edited(model, judge, left, hparams):
                line = {"method": method, "arm": arm, **line, "changed": changes}
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                bar.update()


Lines = list[dict[str, Any]]


def read(command: str) -> dict[str, Lines]:
    """Lines by model."""
    return {
        path.stem.removeprefix(f"{command}-"): [
            json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]
        ]
        for path in sorted(RESULTS.glob(f"{command}-*.jsonl"))
    }


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval, percentile bootstrap over subjects, seed 0."""
    drawn = np.random.default_rng(0).choice(np.array(values), (2000, len(values))).mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{np.mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


def figure(lines: Lines, name: str) -> str:
    """The mean of a column, over the lines that have it."""
    values = [line[name] for line in lines if line.get(name) is not None]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def series_of(lines: Lines) -> dict[tuple[str, str], Lines]:
    """Lines by method and arm, in their order; facts that the unedited model does not write are left out."""
    found: dict[tuple[str, str], Lines] = {}
    for line in lines:
        if line["known"]:
            found.setdefault((line["method"], line["arm"]), []).append(line)
    return found


def table(command: str) -> str:
    """A row a series."""
    names = ("every_way", *WAYS, "canvas_begins", *PARAPHRASED, *LOCAL, "layer_passes", "cpu_seconds")
    heads = ("every way", "one step", "N/2", "N", "random", "left to right", "canvas of 16", "begins",
             "paraphrase, N", "paraphrase, one step", "paraphrase, canvas", "neighbours", "same subject",
             "passes", "CPU s")  # fmt: skip
    rows = [
        f"| model, method | arm | edits | {' | '.join(heads)} |",
        "| --- " * (len(heads) + 3) + "|",
    ]
    for model, lines in read(command).items():
        for (method, arm), some in series_of(lines).items():
            if command == "tries" and len(some) < SUBJECTS[command][1]:  # not finished
                continue
            cells = [figure(some, name) for name in names]
            cells[-2] = f"{sum(x['layer_passes'] for x in some) / len(some):,.0f}"
            rows.append(f"| `{model}` {method} | {arm} | {len(some)} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def paired(ours: Lines, theirs: Lines, name: str) -> list[float]:
    """Differences of a column, by subject, where both have it."""
    values = {line["subject"]: line[name] for line in theirs if line[name] is not None}
    return [
        line[name] - values[line["subject"]]
        for line in ours
        if line["subject"] in values and line[name] is not None
    ]


def verdicts() -> str:
    """The primary outcomes of the protocol, and what the states bring beside the end alone."""
    runs = {model: series_of(lines) for model, lines in read("run").items()}
    rows = [
        "| model, method | arm | least of five ways | canvas | paraphrase, N steps | paraphrase, canvas |"
        " every way, less shipped | the same, less plain, open | neighbours, less plain |",
        "| --- " * 9 + "|",
    ]
    for model, partner in PARTNER.items():
        for method in ("ROME_MDM", "MEMIT_MDM"):
            for arm in ("open, first", "open"):
                own, reference = runs[model], runs[partner][method, "open"]
                if (method, arm) not in own:
                    continue
                ours = own[method, arm]
                five = [ratio(pairs(ours, reference, w, "n_steps")) for w in WAYS if w != "canvas"]
                cells = [min(five), ratio(pairs(ours, reference, "canvas", "canvas"))]
                cells += [ratio(worded(ours, reference, which)) for which in (0, 1)]
                cells += [
                    interval(paired(ours, own[method, other], name))
                    for other, name in (
                        ("shipped", "every_way"), ("plain, open", "every_way"), ("plain", "neighbours")
                    )
                ]  # fmt: skip
                rows.append(f"| `{model}` {method} | {arm} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


Pairs = list[tuple[float, float]]


def pairs(ours: Lines, theirs: Lines, name: str, other: str) -> Pairs:
    """A column and another's column, by subject."""
    there = {line["subject"]: line[other] for line in theirs}
    return [(line[name], there[line["subject"]]) for line in ours if line["subject"] in there]


def worded(ours: Lines, theirs: Lines, which: int) -> Pairs:
    """Paraphrases by subject, over the wordings that both unedited models read; `which`: 0 in N steps, 1 on
    the canvas.
    """
    there = {line["subject"]: line["wordings"] for line in theirs}
    found = []
    for line in ours:
        both = [i for i in line.get("wordings", ()) if i in there.get(line["subject"], ())]
        if both:
            sums = [sum(w[i][which] for i in both) for w in (line["wordings"], there[line["subject"]])]
            found.append((sums[0], sums[1]))
    return found


def ratio(some: Pairs) -> str:
    """The sum of the first over that of the second, with a 95 % interval: percentile bootstrap over subjects,
    seed 0.
    """
    if not some:
        return "-"
    values = np.array(some)
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    sums = values[drawn].sum(1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], (2.5, 97.5))
    return f"{values[:, 0].sum() / values[:, 1].sum():.2f} [{low:.2f}, {high:.2f}]"


def by_length() -> str:
    """Right in every way, by target length; of the autoregressive twins, on the canvas."""
    rows = ["| model, method | arm | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |", "| --- " * 10 + "|"]
    for model, lines in read("run").items():
        for (method, arm), some in series_of(lines).items():
            name = "every_way" if model in PARTNER else "canvas"
            cells = [figure([x for x in some if x["n_tokens"] == n], name) for n in range(1, 9)]
            rows.append(f"| `{model}` {method} | {arm} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def tables() -> None:
    """README's tables."""
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = {"verdicts": verdicts(), "run": table("run"), "lengths": by_length(), "tries": table("tries")}
    for name, rows in made.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(begin)
        text = head + begin + rows + end + rest.split(end)[1]
    write_text(readme, text)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("tries", "run", "tables"))
    parser.add_argument("--model", choices=[*PARTNER, *PARTNER.values()])
    parser.add_argument("--methods", nargs="+", default=["ROME_MDM", "MEMIT_MDM"])
    parser.add_argument("--arms", nargs="+", help="some of the arms; by default all")
    parser.add_argument("--out", default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.command == "tables":
        tables()
    elif args.model is None:
        parser.error(f"{args.command} needs --model")
    else:
        run(args)


if __name__ == "__main__":
    main()
