"""Where the twins can be edited: success by layer and target length, as an activation and as a weight update.

    python benchmarks/twins_layers.py --model twin-llada --facts 12 --layers 0 1 2 3 --out benchmarks/twins_layers-twin-llada.json

For each layer and length, `--facts` facts of the four compositional relations (and as many of the closed-list one) are drawn by the seed, the
same for every layer, and edited to another object of that length with the settings of hparams/ROME_MDM/<model>.yaml. `activation`: the optimised
value is added at the site while the model decodes, no weight is changed. `rewrite`, `paraphrase`: after the weight update, exact match over N masks
in N steps. `neighbours`, `same_subject`: share of tokens that stay as they were, for four facts that share the object's first part and for the
subject's other facts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from easyedit_mdm import EditRequest, ROMEMDMHyperParams, load_model, make_edit, score_prompts
from easyedit_mdm.editing.keys import read_keys
from easyedit_mdm.editing.rome import tokenise
from easyedit_mdm.models.hooks import changing_output
from easyedit_mdm.twins.world import World


def as_activation(model, request: EditRequest, target: str, hparams: ROMEMDMHyperParams, edit) -> bool:
    """Exact match with delta added at the site of the bare prompt while decoding."""
    site = model.site(hparams.layers[0])
    fact = tokenise(model, request, hparams)
    delta = edit.changes[0].left[:, 0] * torch.dot(edit.changes[0].right[0], read_keys(model, site, fact).mean)

    def add(out):
        out = out.clone()
        out[:, fact.contexts[0].site] += delta
        return out

    with changing_output(model.module(site.name), add):
        return score_prompts(model, [request.prompt], [target])[0]["exact"]


def stay(model, facts, before) -> float:
    """Share of tokens that are as they were, over some facts."""
    after = score_prompts(model, [f.prompt() for f in facts], [f.object for f in facts])
    same = [sum(a == b for a, b in zip(x["tokens"], y["tokens"])) / x["n_tokens"] for x, y in zip(before, after)]
    return sum(same) / len(same)


def one(model, world: World, fact, length: int, rng: random.Random, hparams: ROMEMDMHyperParams) -> dict[str, float]:
    """One edit, judged and taken back."""
    target = world.other_object(fact, length, rng)
    request = EditRequest.of({"prompt": fact.prompt(), "subject": fact.subject, "target_new": target})
    near, own = world.neighbours(fact, 4), [f for f in world.facts[fact.subject] if f is not fact]
    before = [score_prompts(model, [f.prompt() for f in group], [f.object for f in group]) for group in (near, own)]
    edit = make_edit(model, {"prompt": request.prompt, "subject": fact.subject, "target_new": target}, hparams)
    row = {"activation": as_activation(model, request, target, hparams, edit)}
    edit.apply(model)
    scores = score_prompts(model, [fact.prompt(), fact.paraphrase(0), fact.paraphrase(1)], [target] * 3)
    row["rewrite"] = scores[0]["exact"]
    row["first_commit"] = scores[0]["first_commit"]
    row["paraphrase"] = (scores[1]["exact"] + scores[2]["exact"]) / 2
    row["neighbours"], row["same_subject"] = (stay(model, group, b) if group else 1.0 for group, b in zip((near, own), before))
    edit.revert(model)
    return {k: float(v) for k, v in row.items()}


def main() -> None:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="twin-llada")
    parser.add_argument("--schedule", help="state_schedule (default: the file's)")
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--facts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out")
    args = parser.parse_args()
    world, model = World.build(), load_model(args.model)
    hparams = ROMEMDMHyperParams.from_hparams(f"ROME_MDM/{args.model}")
    if args.schedule:
        hparams = dataclasses.replace(hparams, state_schedule=args.schedule)
    results, began = [], time.monotonic()
    for layer in args.layers if args.layers is not None else range(model.layers):
        for closed in (False, True):
            for length in range(1, world.settings.max_length + 1):
                rng = random.Random(f"{args.seed}/{closed}/{length}")
                facts = rng.sample([f for f in world.all_facts() if f.relation.closed == closed], args.facts)
                rows = [one(model, world, f, length, rng, dataclasses.replace(hparams, layers=[layer])) for f in facts]
                means = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}
                results.append({"layer": layer, "closed": closed, "n_tokens": length, "n": len(rows), **means})
    tell(args.model, hparams.state_schedule, results)
    if args.out:
        report = {
            "model": args.model, "seed": args.seed, "hyperparameters": hparams.to_dict(), "seconds": round(time.monotonic() - began), "results": results,
        }  # fmt: skip
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def tell(model: str, schedule: str, results: list[dict]) -> None:
    """The table."""
    table = Table(title=f"{model}, {schedule}, {results[0]['n']} facts a row")
    keys = ("activation", "rewrite", "first_commit", "paraphrase", "neighbours", "same_subject")
    for column in ("layer", "objects", "N", *keys):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(str(r["layer"]), "closed list" if r["closed"] else "compositional", str(r["n_tokens"]), *[f"{r[k]:.2f}" for k in keys])
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
