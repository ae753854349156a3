"""A thousand edits one after another, in batches: what remains of early and late ones, and of everything
else.

    python benchmarks/sequential_edits.py --hparams MEMIT_MDM/twin-llada --edits 1000 --batch 50 --out
    benchmarks/sequential-twin-llada.json

Facts of the twins' world in random order (seed), each edited to another object of 1 to 8 tokens in turn; no
fact is edited twice. At every tenth batch (and the first and last): multi-step exact match of the first and
of the latest `--watch` edits, token locality on facts that are never edited, ||dW|| / ||W|| of every edited
layer, pseudo-perplexity of held-out text of the world. Written after every report, so that nothing is lost.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from easyedit_mdm import Session, load_hparams, load_model, score_prompts
from easyedit_mdm.evaluation import perplexity
from easyedit_mdm.twins.world import World


def share(scores: list[dict], key: str = "exact") -> dict:
    """A mean with its n."""
    return {"value": sum(float(s[key]) for s in scores) / len(scores), "n": len(scores)}


def drawn(world: World, edits: int, seed: int) -> tuple[list[tuple], list]:
    """(fact, target) of every edit, and facts that are left alone."""
    rng = random.Random(seed)
    facts = world.all_facts()
    rng.shuffle(facts)
    if edits > len(facts) - 40:
        raise SystemExit(f"the world has {len(facts)} facts to edit: at most {len(facts) - 40} edits")
    todo = [
        (f, world.other_object(f, 1 + i % world.settings.max_length, rng))
        for i, f in enumerate(facts[:edits])
    ]
    edited = {f.subject for f, _ in todo}
    alone = [f for f in facts[edits:] if f.subject not in edited] or facts[edits:]
    return todo, alone[:100]


def main() -> None:
    """Edit, report, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hparams", default="MEMIT_MDM/twin-llada")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--watch", type=int, default=50)
    parser.add_argument("--mode", choices=("sequential", "rebase"), default="sequential")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--weight", type=float, help="mom2_update_weight (lambda), where it is to be another than the file's"
    )
    parser.add_argument("--out")
    args = parser.parse_args()
    hparams = load_hparams(args.hparams)
    if args.weight is not None:
        hparams = replace(hparams, mom2_update_weight=args.weight)
    model, world = load_model(hparams.model_name), World.build()
    todo, alone = drawn(world, args.edits, args.seed)
    names = [model.site(layer).weight for layer in hparams.layers]
    original = {name: value.detach().clone() for name, value in model.named_parameters() if name in names}
    rng = random.Random("held out")
    texts = ["".join(piece for piece, _ in world.document(rng).pieces) for _ in range(20)]
    before = score_prompts(model, [f.prompt() for f in alone], [f.object for f in alone])
    reports, began = [], time.monotonic()

    def written(pairs: list[tuple]) -> dict:
        return share(score_prompts(model, [f.prompt() for f, _ in pairs], [t for _, t in pairs]))

    def report(done: int) -> None:
        early, late = todo[: min(args.watch, done)], todo[max(0, done - args.watch) : done]
        after = score_prompts(model, [f.prompt() for f in alone], [f.object for f in alone])
        stay = [
            sum(a == b for a, b in zip(x["tokens"], y["tokens"])) / x["n_tokens"]
            for x, y in zip(before, after)
        ]
        weights = dict(model.named_parameters())
        reports.append({
            "edits": done,
            "early": written(early) if done else None,
            "late": written(late) if done else None,
            "locality": {"value": sum(stay) / len(stay), "n": len(stay)},
            "norm_ratio": {
                n: float((weights[n].detach() - original[n]).norm() / original[n].norm()) for n in names
            },
            "perplexity": perplexity(model, texts),
            "seconds": round(time.monotonic() - began, 1),
        })  # fmt: skip
        Console().print(reports[-1])
        if args.out:
            text = json.dumps(
                {
                    "hyperparameters": hparams.to_dict(),
                    "batch": args.batch,
                    "mode": args.mode,
                    "seed": args.seed,
                    "reports": reports,
                },
                indent=1,
            )
            Path(args.out).write_text(text + "\n", encoding="utf-8")

    report(0)
    requests = [{"prompt": f.prompt(), "subject": f.subject, "target_new": t} for f, t in todo]
    with Session(model, hparams) as session:
        steps = session.steps(requests, mode=args.mode, batch_size=args.batch)
        done = 0
        for step in tqdm(steps, total=-(-len(todo) // args.batch), desc="batches"):
            done += len(step.requests)
            if step.number % 10 == 9 or step.number == 0 or done == len(todo):
                report(done)


if __name__ == "__main__":
    main()
