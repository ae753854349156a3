"""The runs of PROTOCOL.md: edits of single facts of the twins' world, each to a target of every length,
judged after real decoding.

    python benchmarks/multi_token/study.py search  --model twin-llada              (validation split: chooses
    layer and clamp) python benchmarks/multi_token/study.py run     --model twin-llada              (test
    split: the frozen settings, once) python benchmarks/multi_token/study.py closed  --model twin-llada
          (facts whose objects are whole names of a closed list) python benchmarks/multi_token/study.py ablate
           --model twin-llada              (validation split: one change at a time)
    python benchmarks/multi_token/study.py beat    --model twin-llada              (validation: MEMIT_MDM with
    what the ablations showed) python benchmarks/multi_token/study.py best    --model twin-llada
    (test split, once: what ablations and `beat` chose, best.yaml) python benchmarks/multi_token/study.py
    batches --model twin-llada              (validation: 16 facts in one MEMIT_MDM edit, of one length or all)

Every command writes JSON lines into `results/`, a header first, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from easyedit_mdm import Session, load_model
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import METHODS, Edit, EditRequest
from easyedit_mdm.editing.activation import Activations, success_as_activation
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.solve.sites import check_modules
from easyedit_mdm.errors import OptimisationError
from easyedit_mdm.evaluation import score_prompts
from easyedit_mdm.models import Adapter
from easyedit_mdm.twins.benchmark import Case, cases
from easyedit_mdm.twins.world import Fact, World

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FROZEN = HERE / "frozen.yaml"
BEST = HERE / "best.yaml"
METHOD_NAMES = ("ROME_MDM", "MEMIT_MDM")
ARMS = {"plain": {"state_schedule": "full_mask"}, "aware": {"state_schedule": "enumerate"}}
SHARED = {"v_num_grad_steps": 50, "early_stop_loss": 0.05, "max_states": 16}
# the same number of tries for every arm, method and model
GRID = {
    "ROME_MDM": [
        {"layers": [layer], "clamp_norm_factor": clamp}
        for layer, clamp in ((0, 4.0), (1, 4.0), (3, 4.0), (1, 2.0))
    ],
    "MEMIT_MDM": [
        {"layers": layers, "clamp_norm_factor": clamp}
        for layers, clamp in (([3], 4.0), ([4], 4.0), ([3, 4], 4.0), ([4], 2.0))
    ],
}
APART = "plain, aware's settings"
# the files that have been chosen anew since the study was run, as they were then
THEN = {
    ("ROME_MDM", "twin-llada"): "twin-llada-activation.yaml",
    ("MEMIT_MDM", "twin-dream"): "twin-dream-memit.yaml",
}
# after the ablations: averaged keys and stratified states everywhere, the rest tried (PROTOCOL.md, "Then beat
# it")
BEAT: list[dict[str, Any]] = [
    {"layers": [4], "clamp_norm_factor": 4.0},
    {"layers": [4], "clamp_norm_factor": 4.0, "mom2_mask_ratio": "uniform"},
    {"layers": [4], "clamp_norm_factor": 8.0, "v_num_grad_steps": 100},
    {"layers": [4], "clamp_norm_factor": 4.0, "mom2_update_weight": 30},
    {"layers": [0], "clamp_norm_factor": 4.0},
    {"layers": [0], "clamp_norm_factor": 2.0},
    {"layers": [0], "clamp_norm_factor": 4.0, "mom2_mask_ratio": "uniform"},
    {"layers": [1], "clamp_norm_factor": 2.0, "mom2_update_weight": 10},
]
FACTS = {"search": 10, "run": 120, "best": 60, "closed": 40, "ablate": 12, "batches": 16, "beat": 20}
SPLITS = {"run": "test", "best": "test", "closed": "closed"}
LENGTHS = {"run": range(1, 9), "best": range(1, 9)}
NEIGHBOURS = 3
ABLATIONS: dict[str, dict[str, Any]] = {
    **{
        name: {"state_schedule": name}
        for name in ("full_mask", "cycle", "uniform", "stratified", "enumerate", "left_to_right", "spread")
    },
    "confidence": {"state_schedule": "confidence"},
    "on_policy": {"state_schedule": "on_policy"},
    "cycle, stop on the drawn state": {"state_schedule": "cycle", "early_stop_on": "drawn"},
    "full_mask, steps x 4": {
        "state_schedule": "full_mask",
        "v_num_grad_steps": 200,
        "early_stop_loss": 0.0125,
    },
    "key average": {"key_states": "average"},
    "key per state": {"key_states": "per_state"},
    "masked statistics": {"mom2_mask_ratio": "uniform"},
    "through the weights": {"optimise_through": "weights"},
    "full_mask, through the weights": {"state_schedule": "full_mask", "optimise_through": "weights"},
}


def settings(method: str, model: str, **changes: Any) -> ROMEMDMHyperParams:
    """A twin's own hyperparameter file as it was when the study was run, changed."""
    then = THEN.get((method, model))
    base = METHODS[method].hparams.from_hparams(HERE.parent / then if then else f"{method}/{model}")
    return replace(base, **{**SHARED, **changes})


def other_facts(world: World, fact: Fact) -> list[Fact]:
    """The subject's facts in the other relations."""
    return [f for f in world.facts[fact.subject] if f.relation is not fact.relation]


class Before:
    """What the unedited model writes: whether it knows a fact, and the tokens that an edit should leave
    alone.
    """

    def __init__(self, model: Adapter, world: World):
        self.model, self.world = model, world
        self.written: dict[str, tuple[bool, list[list[int]]]] = {}

    def __call__(self, case: Case) -> tuple[bool, list[list[int]]]:
        """(known, tokens of neighbours and of the subject's other facts)."""
        key = case.fact.prompt()
        if key not in self.written:
            asked = [case.fact, *kept_facts(case, self.world)]
            scores = score_prompts(self.model, [f.prompt() for f in asked], [f.object for f in asked])
            self.written[key] = bool(scores[0]["exact"]), [s["tokens"] for s in scores[1:]]
        return self.written[key]


def kept_facts(case: Case, world: World) -> list[Fact]:
    """Neighbours, then the subject's other facts."""
    return [*case.neighbours[:NEIGHBOURS], *other_facts(world, case.fact)]


def judge(
    model: Adapter, case: Case, world: World, before: list[list[int]], all_ways: bool
) -> dict[str, Any]:
    """Everything that is measured of one edited model."""
    kept = kept_facts(case, world)
    asked = [
        (case.fact.prompt(), case.target),
        *((case.fact.paraphrase(i), case.target) for i in range(2)),
        *((f.prompt(), f.object) for f in kept),
    ]
    scores = score_prompts(model, [p for p, _ in asked], [a for _, a in asked])
    same = [_share(s["tokens"], b) for s, b in zip(scores[3:], before, strict=True)]
    near = len(case.neighbours[:NEIGHBOURS])
    once = "one_step" if model.masked else "teacher_forced"
    found: dict[str, Any] = {k: scores[0].get(k) for k in ("exact", "token_acc", "first_commit", once)}
    found |= {
        "paraphrase": sum(bool(s["exact"]) for s in scores[1:3]) / 2,
        "kept": _mean(same[:near]),
        "same_subject_kept": _mean(same[near:]),
    }
    return {**found, **_other_ways(model, case)} if all_ways else found


def _other_ways(model: Adapter, case: Case) -> dict[str, Any]:
    """The same edit decoded otherwise: a longer canvas to the end of the text, other orders, fewer steps."""
    prompt, target = [case.fact.prompt()], [case.target]
    found = {
        "canvas16": (
            score_prompts(model, prompt, target, DecodeConfig(canvas=16))[0]["text_to_end"] == case.target
        )
    }
    if model.masked:
        for order in ("random", "left_to_right"):
            found[order] = score_prompts(model, prompt, target, DecodeConfig(order=order))[0]["exact"]
        found["half_steps"] = score_prompts(
            model, prompt, target, DecodeConfig(steps=(case.length + 1) // 2)
        )[0]["exact"]
    return found


def _share(now: Sequence[int], before: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(now, before)) / len(before)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def edits(
    model: Adapter, requests: list[EditRequest], hparams: ROMEMDMHyperParams
) -> Iterator[tuple[Edit | None, bool | None, dict[str, Any]]]:
    """Each request's edit, whether its value works as an activation (the ceiling of every weight update at
    that place), and its cost.
    """
    method = METHODS[hparams.alg_name]
    try:
        values = method.values(model, requests, hparams)
    except OptimisationError:  # one of them left the finite numbers: find out which, and keep the others
        if len(requests) == 1:
            yield None, None, {}
            return
        for request in requests:
            yield from edits(model, [request], hparams)
        return
    facts = [tokenise(model, request, hparams) for request in requests]
    deltas = torch.stack([v.delta for v in values])
    works = success_as_activation(
        model, Activations(check_modules(model, hparams), facts, deltas, deltas.norm(dim=1))
    )
    for request, value, ceiling in zip(requests, values, works):
        cost = {"steps": value.steps, "forwards": value.forwards, "last_loss": value.losses[-1]}
        yield method.make(model, [request], hparams, values=[value]), ceiling, cost


def study(
    model: Adapter,
    chosen: list[Case],
    hparams: ROMEMDMHyperParams,
    world: World,
    before: Before,
    label: dict,
    all_ways: Sequence[str],
) -> Iterator[dict]:
    """One line a case; `all_ways`: subjects whose edits are decoded in other ways too."""
    began = time.perf_counter()
    made = edits(model, [EditRequest.of(case.request()) for case in chosen], hparams)
    for case, (edit, ceiling, cost) in zip(chosen, made):
        known, tokens = before(case)
        line = {
            **label,
            "subject": case.fact.subject,
            "n_tokens": case.length,
            "target": case.target,
            "known": known,
            "activation": ceiling,
            **cost,
        }
        if edit is None:
            line["error"] = "the optimisation left the finite numbers"
        else:
            with Session(model, hparams) as session:
                session.apply(edit)
                line |= judge(model, case, world, tokens, case.fact.subject in all_ways)
        yield {**line, "seconds": round(time.perf_counter() - began, 3)}
        began = time.perf_counter()


def frozen(model: str, method: str, arm: str) -> dict[str, Any]:
    """The settings chosen by the search."""
    return yaml.safe_load(FROZEN.read_text())[model][method][arm]


def plan(
    command: str, name: str, masked: bool, methods: Sequence[str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(label, hyperparameters) of every series of a command."""
    arms = list(ARMS) if masked else ["plain"]
    if command == "search":
        return [
            ({"method": m, "arm": a, "try": i}, {**g, **ARMS[a]})
            for m in methods
            for a in arms
            for i, g in enumerate(GRID[m])
        ]
    if command in ("run", "closed"):
        series = [({"method": m, "arm": a}, {**frozen(name, m, a), **ARMS[a]}) for m in methods for a in arms]
        if not masked or command != "run":
            return series
        # the null control: both arms with the same layer and clamp, N = 1
        series += [
            ({"method": m, "arm": "null"}, {**frozen(name, m, "plain"), **ARMS["aware"]}) for m in methods
        ]
        # not in the protocol: where the search gave the arms different settings, plain with those of the
        # other
        apart = [m for m in methods if frozen(name, m, "plain") != frozen(name, m, "aware")]
        return series + [
            ({"method": m, "arm": APART}, {**frozen(name, m, "aware"), **ARMS["plain"]}) for m in apart
        ]
    if command == "beat":
        shared = {"state_schedule": "stratified", "key_states": "average"}
        return [
            ({"method": "MEMIT_MDM", "arm": "beat", "try": i}, {**shared, **change})
            for i, change in enumerate(BEAT)
        ]
    if command == "best":
        chosen = yaml.safe_load(BEST.read_text())[name]
        return [
            ({"method": m, "arm": "best"}, {**frozen(name, m, arms[-1]), **chosen[m]})
            for m in methods
            if m in chosen
        ]
    usual = arms[-1]
    changes = {n: c for n, c in ABLATIONS.items() if masked or n in ("full_mask", "through the weights")}
    pairs = [(m, n, c) for m in methods for n, c in changes.items() if _able(METHODS[m].hparams, c)]
    return [
        ({"method": m, "ablation": n}, {**frozen(name, m, usual), **ARMS[usual], **c}) for m, n, c in pairs
    ]


def _able(kind: type[ROMEMDMHyperParams], changes: dict[str, Any]) -> bool:
    return (
        changes.get("key_states", "full_mask") in kind.KEY_STATES
        and changes.get("optimise_through", "activation") in kind.THROUGH
    )


def finished(path: Path, header: dict[str, Any]) -> set[str]:
    """What a file holds already; it is begun if it does not exist. A half-written last line is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n")
    text = path.read_text()
    whole = text[: text.rindex("\n") + 1]
    if whole != text:
        path.write_text(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines[0] != header:
        raise SystemExit(
            f"{path} is a run of something else: {[k for k in header if lines[0].get(k) != header[k]]}"
            " differ; move it away"
        )
    return {_key(line) for line in lines[1:]}


def _key(line: dict[str, Any]) -> str:
    return json.dumps([line.get(k) for k in ("method", "arm", "try", "ablation", "subject", "n_tokens")])


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=tuple(FACTS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHOD_NAMES))
    parser.add_argument("--facts", type=int, help=f"the first of the split; by default {FACTS}")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world, model = World.build(), load_model(args.model)
    split = SPLITS.get(args.command, "validation")
    every = cases(world, split)[: (args.facts or FACTS[args.command]) * world.settings.max_length]
    chosen = [case for case in every if case.length in LENGTHS.get(args.command, (1, 2, 4, 8))]
    path = RESULTS / f"{args.command}-{args.model}.jsonl"
    header = {
        "command": args.command,
        "model": args.model,
        "fingerprint": model_fingerprint(model.native),
        "split": split,
        "shared": SHARED,
    }
    done = finished(path, header)
    if args.command == "batches":
        batches(model, args.model, chosen, world, done, path)
    else:
        one_by_one(model, args, chosen, world, done, path)


def one_by_one(
    model: Adapter, args: argparse.Namespace, chosen: list[Case], world: World, done: set[str], path: Path
) -> None:
    """All series of a command."""
    subjects = list(dict.fromkeys(case.fact.subject for case in chosen))
    all_ways = set(subjects[::3]) if args.command == "run" else set()
    before = Before(model, world)
    left = []
    for label, changes in plan(args.command, args.model, model.masked, args.methods):
        some = [
            c for c in chosen if _key({**label, "subject": c.fact.subject, "n_tokens": c.length}) not in done
        ]
        left.append(
            (
                label,
                settings(label["method"], args.model, **changes),
                [c for c in some if label.get("arm") != "null" or c.length == 1],
            )
        )
    with (
        path.open("a") as stream,
        tqdm(
            total=sum(len(some) for *_, some in left), desc=f"{args.command} {args.model}", unit="edit"
        ) as bar,
    ):
        for label, hparams, some in left:
            for start in range(0, len(some), 40):
                for line in study(model, some[start : start + 40], hparams, world, before, label, all_ways):
                    stream.write(json.dumps(line) + "\n")
                    stream.flush()
                    bar.update()


def batches(model: Adapter, name: str, chosen: list[Case], world: World, done: set[str], path: Path) -> None:
    """All facts in one MEMIT_MDM edit: every one to a target of the same length, or lengths in turn; the
    facts and methods are the same.
    """
    before, facts = Before(model, world), list(dict.fromkeys(case.fact.subject for case in chosen))
    by_place = {(case.fact.subject, case.length): case for case in chosen}
    arms = {
        arm: {**frozen(name, "MEMIT_MDM", arm), **ARMS[arm]} for arm in (ARMS if model.masked else ("plain",))
    }
    if "MEMIT_MDM" in (chosen := yaml.safe_load(BEST.read_text()).get(name, {})):
        arms["best"] = chosen["MEMIT_MDM"]
    for arm, changes in arms.items():
        hparams = settings("MEMIT_MDM", name, **changes)
        mixed = [
            [by_place[s, (1, 2, 4, 8)[(i + shift) % 4]] for i, s in enumerate(facts)] for shift in range(4)
        ]
        equal = [[by_place[s, n] for s in facts] for n in (1, 2, 4, 8)]
        for kind, sets in (("mixed lengths", mixed), ("equal lengths", equal)):
            for batch in sets:
                label = {"method": "MEMIT_MDM", "arm": arm, "ablation": kind}
                if any(
                    _key({**label, "subject": c.fact.subject, "n_tokens": c.length}) in done for c in batch
                ):
                    continue
                known = [before(c) for c in batch]
                with Session(model, hparams) as session:
                    session.edit([c.request() for c in batch], mode="batch")
                    lines = [
                        {
                            **label,
                            "subject": c.fact.subject,
                            "n_tokens": c.length,
                            "known": k,
                            **judge(model, c, world, t, False),
                        }
                        for c, (k, t) in zip(batch, known)
                    ]
                with path.open("a") as stream:
                    stream.write("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
