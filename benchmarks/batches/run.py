r"""Many facts of the twins' world in one batch, or batch after batch in the same model.

    python benchmarks/batches/run.py --model twin-llada --arm "joint, 300" --split test --facts 64
    python benchmarks/batches/run.py --model twin-llada --arm "joint, 1000, in a row" --split test \
        --facts 200 --batch 16

Arms stand in `arms.yaml`: changes to the model's MEMIT_MDM file, or a baseline that edits nothing. A line is
written to `results/SPLIT-MODEL.jsonl` when an arm is finished, with every fact's score; finished ones are
skipped, so that a run can be stopped and continued arm by arm.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pool import Judge, Pool, pools, shortened

from easyedit_mdm import load_model, score_prompts
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import METHODS, EditRequest, History
from easyedit_mdm.models import Adapter
from easyedit_mdm.twins.world import World

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def settings(model: str, arm: dict[str, Any]) -> Any:
    """The model's file, changed."""
    changes = {**arm.get("all", {}), **arm.get(model, {})}
    method = changes.pop("method", "MEMIT_MDM")
    base = METHODS[method].hparams.from_hparams(f"{method}/{model}")
    return replace(base, **changes)


def edit(model: Adapter, pool: Pool, size: int, hparams: Any, judge: Judge) -> dict[str, Any]:
    """Edit batch after batch, and score all of them in the model that is left."""
    site = model.site(hparams.layers[-1]).weight
    weights = dict(model.named_parameters())
    original, history, found = weights[site].detach().clone(), History(), {}
    for start in range(0, len(pool.cases), size):
        part = pool.cases[start : start + size]
        made = METHODS[hparams.alg_name].edit(
            model, [EditRequest.of(c.request()) for c in part], hparams, history
        )
        made.apply(model)
        if start == 0 and size < len(pool.cases):
            found["first_batch_when_made"] = [float(x) for x in judge.targets(part)]
    change = dict(model.named_parameters())[site].detach() - original
    return {**found, "norm_ratio": float(change.norm() / original.norm()), **judge(pool.cases)}


def in_context(model: Adapter, pool: Pool) -> dict[str, list[float]]:
    """The new fact as a sentence before the prompt, nothing edited."""
    told = [f"{c.fact.prompt(2)} {c.target}. " for c in pool.cases]
    found = {}
    for name, decode in (("exact", DecodeConfig()), ("one_step", DecodeConfig(steps=1))):
        if name == "one_step" and not model.masked:
            continue
        scores = score_prompts(
            model,
            [t + c.fact.prompt() for t, c in zip(told, pool.cases)],
            [c.target for c in pool.cases],
            decode,
        )
        found[name] = [float(s["exact"]) for s in scores]
    return found


def main() -> None:
    """Run some arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="twin-llada")
    parser.add_argument("--arm", nargs="+", default=["file"])
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--batch", type=int, help="facts a batch; all in one by default")
    parser.add_argument("--longest", type=int, default=8, help="targets have 1 to this many tokens in turn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size, arms = args.batch or args.facts, yaml.safe_load((HERE / "arms.yaml").read_text())
    path = RESULTS / f"{args.split}-{args.model}.jsonl"
    key = {"split": args.split, "model": args.model, "facts": args.facts, "batch": size}
    key["longest"] = args.longest
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    pool = shortened(pools(World.build(), args.longest)[args.split], args.facts)
    for name in args.arm:
        if any({**line, **key, "arm": name} == line for line in done):
            continue
        model, began = load_model(args.model), time.process_time()
        judge, used = Judge(model, pool), None
        if name == "in context":
            scores: dict[str, Any] = in_context(model, pool)
        elif name == "no edit":
            scores = judge(pool.cases)
        else:
            hparams = settings(args.model, arms[name])
            used, scores = hparams.to_dict(), edit(model, pool, size, hparams, judge)
        line = {**key, "arm": name, "cpu_seconds": round(time.process_time() - began), "scores": scores}
        RESULTS.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**line, "hyperparameters": used}) + "\n")


if __name__ == "__main__":
    main()
