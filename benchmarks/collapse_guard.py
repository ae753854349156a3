"""How often the collapse guard stops edits made destructive on purpose, and how often ordinary ones (false
alarms).

    python benchmarks/collapse_guard.py --n 200 --destructive 40 --out benchmarks/collapse_guard.json

Ordinary edits are the test cases of the twins' world, each made with the method's own file and applied to the
unedited model. The destructive ones are the same edits, spoiled in a way that each kind names. Every edit is
measured with all thresholds off, so that the file holds the figures of all of them, and `stopped` says what
the default thresholds would have done. What an edit did is told apart from what the guard says by the world's
facts: `damage` is the share of other facts, right before, that the model no longer writes.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from easyedit_mdm import load_model, make_edit, score_prompts
from easyedit_mdm.common.files import write_json
from easyedit_mdm.editing import METHODS, Edit, LowRank
from easyedit_mdm.editing.guard import GuardConfig, reasons
from easyedit_mdm.editing.hparams import find_hparams, read_yaml
from easyedit_mdm.errors import EasyEditMDMError
from easyedit_mdm.evaluation import CollapseGuard
from easyedit_mdm.twins.benchmark import cases
from easyedit_mdm.twins.world import World

OFF = GuardConfig(norm_ratio=None, condition=None, denominator=None, perplexity_ratio=1e300)
WATCHED = 40
KINDS = (
    "ordinary",
    "x10",
    "x100",
    "noise x10",
    "no clamp, no decay, high rate",
    "too few tokens",
    "denominator / 1000",
)


def scaled(edit: Edit, factor: float) -> Edit:
    """The same edit, so many times as large."""
    return Edit([replace(c, left=c.left * factor) for c in edit.changes if isinstance(c, LowRank)], edit.card)


def noise(edit: Edit, generator: torch.Generator) -> Edit:
    """A change of the same norms in random directions of full rank, ten times as large."""
    changes = []
    for c in edit.changes:
        left, right = (
            torch.randn(c.shape[0], 64, generator=generator),
            torch.randn(64, c.shape[1], generator=generator),
        )
        whole = LowRank(c.name, left, right)
        changes.append(replace(whole, left=left * (10 * c.dense().norm() / whole.dense().norm())))
    return Edit(changes, edit.card)


def spoiled(kind: str, model: Any, request: dict, hparams: Any, generator: torch.Generator) -> Edit:
    """An edit of one kind."""
    if kind == "no clamp, no decay, high rate":
        return make_edit(
            model,
            request,
            replace(
                hparams,
                clamp_norm_factor=100.0,
                v_weight_decay=0.0,
                kl_factor=0.0,
                v_lr=5.0,
                early_stop_loss=0.0,
            ),
        )
    if kind == "too few tokens":
        return make_edit(model, request, replace(hparams, mom2_n_tokens=128, mom2_eps=1e-12))
    edit = make_edit(model, request, hparams)
    if kind == "denominator / 1000":
        return Edit(
            scaled(edit, 1000.0).changes, {**edit.card, "denominator": edit.card["denominator"] / 1000}
        )
    return {
        "ordinary": edit,
        "noise x10": noise(edit, generator),
        "x10": scaled(edit, 10.0),
        "x100": scaled(edit, 100.0),
    }[kind]


def measured(model: Any, guard: CollapseGuard, edit: Edit, facts: list, right: list[bool]) -> dict[str, Any]:
    """Figures of one edit, what the default thresholds say, and what it did to other facts."""
    figures = guard.apply(edit)["figures"]
    try:
        after = [
            s["exact"] for s in score_prompts(model, [f.prompt() for f in facts], [f.object for f in facts])
        ]
    finally:
        edit.revert(model)
    known = [a for a, b in zip(after, right) if b]
    return {
        "figures": figures,
        "stopped": reasons(figures, GuardConfig()),
        "damage": 1 - sum(known) / max(1, len(known)),
    }


def run(file: str, n: int, destructive: int, seed: int) -> dict[str, Any]:
    """All kinds, for one hyperparameter file."""
    alg_name = read_yaml(find_hparams(file))["alg_name"]
    hparams = METHODS[alg_name].hparams.from_hparams(file)
    model, world, generator = (
        load_model(hparams.model_name),
        World.build(),
        torch.Generator().manual_seed(seed),
    )
    rng = random.Random(seed)
    chosen = rng.sample(cases(world, "test"), n)
    facts = rng.sample(world.all_facts(), WATCHED)
    right = [s["exact"] for s in score_prompts(model, [f.prompt() for f in facts], [f.object for f in facts])]
    guard, result = CollapseGuard(model, OFF), {}
    for kind in KINDS:
        rows, failed, began = [], [], time.monotonic()
        some = chosen[: n if kind == "ordinary" else destructive]
        if not some or METHODS[alg_name].batchable and kind.startswith("denominator"):
            continue  # batched methods have no single denominator that could be made small
        for case in tqdm(some, desc=f"{file}, {kind}"):
            try:
                edit = spoiled(kind, model, case.request(), hparams, generator)
                rows.append(
                    measured(
                        model, guard, edit, [f if f is not case.fact else facts[0] for f in facts], right
                    )
                )
            except EasyEditMDMError as error:
                failed.append(f"{type(error).__name__}: {error}")
        stopped = sum(bool(row["stopped"]) for row in rows)
        damage = sorted(row["damage"] for row in rows)
        result[kind] = {
            "n": len(rows) + len(failed), "stopped": stopped, "never made": failed, "by": _counts(rows),
            "extremes": _extremes(rows),
            "median_damage": damage[len(damage) // 2] if damage else None,
            "seconds": round(time.monotonic() - began, 1), "rows": rows,
        }  # fmt: skip
        Console().print({k: v for k, v in result[kind].items() if k != "rows"} | {"kind": kind})
    return result


def _counts(rows: list[dict]) -> dict[str, int]:
    words = [reason.split()[0] for row in rows for reason in row["stopped"]]
    return {name: words.count(name) for name in sorted(set(words))}


def _extremes(rows: list[dict]) -> dict[str, list[float]]:
    """Smallest, median and largest of each figure."""
    found = {}
    for name in ("norm_ratio", "condition", "denominator", "perplexity_ratio"):
        values = sorted(row["figures"][name] for row in rows if row["figures"].get(name) is not None)
        if values:
            found[name] = [values[0], values[len(values) // 2], values[-1]]
    return found


def main() -> None:
    """Run, and write after each file, so that nothing is lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hparams",
        nargs="+",
        default=["ROME_MDM/twin-llada", "ROME_MDM/twin-llama", "ROME_MDM/twin-qwen", "MEMIT_MDM/twin-llada"],
    )
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--destructive", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for file in args.hparams:
        results[file] = run(file, args.n, args.destructive, args.seed)
        write_json(
            args.out, {"n": args.n, "seed": args.seed, "thresholds": vars(GuardConfig()), "results": results}
        )


if __name__ == "__main__":
    main()
