"""What `easyedit-mdm twins` does."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from easyedit_mdm.api import load_model
from easyedit_mdm.evaluation import score_prompts
from easyedit_mdm.twins.export import export
from easyedit_mdm.twins.folders import TWINS
from easyedit_mdm.twins.tokenizer import train_tokenizer
from easyedit_mdm.twins.train import RECIPES, train
from easyedit_mdm.twins.world import Fact, World


def train_twin(
    name: str, out: str | Path, steps: int | None = None, start_from: str | Path | None = None, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Train a twin by its recipe, resuming where `out` holds a checkpoint, and export it to `out/model`.

    Args:
        start_from: training folder of the twin whose weights it starts from.

    Returns:
        the final state: recipe, steps, seconds, loss.
    """
    recipe = replace(RECIPES[name], seed=seed, start_from=None if start_from is None else str(start_from))
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    world = World.build()
    tokenizer = train_tokenizer(world)
    train(recipe, world, tokenizer, Path(out), device)
    return export(Path(out), Path(out) / "model", tokenizer)


def evaluate_twins(models: Sequence[str] | None = None, limit: int = 100, file: str | Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Recall of the world's facts by greedy decoding (masked: N masks, N steps, low_confidence), by length of the object.

    Args:
        models: twins or folders; all twins by default.
        limit: facts a length, drawn by `seed`.
        file: where to write the figures as JSON.

    Returns:
        `{model: {"recall": {"1": {"value": v, "n": n}, ...}, "held_out": {...}}}`: trained phrasings, and those held out.
    """
    world = World.build()
    result = {}
    for name in models or TWINS:
        model = load_model(name)
        rng = random.Random(seed)
        figures: dict[str, Any] = {"recall": {}, "held_out": {}}
        for length in range(1, world.settings.max_length + 1):
            facts = [f for f in world.all_facts() if f.length == length]
            facts = rng.sample(facts, min(limit, len(facts)))
            for key, prompts in (("recall", [_trained(f, rng) for f in facts]), ("held_out", [f.paraphrase(rng.randrange(2)) for f in facts])):
                scores = score_prompts(model, prompts, [f.object for f in facts])
                figures[key][str(length)] = {"value": sum(s["exact"] for s in scores) / len(scores), "n": len(scores)}
        result[str(name)] = figures
    if file is not None:
        Path(file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _tell(result)
    return result


def _trained(fact: Fact, rng: random.Random) -> str:
    return fact.prompt(rng.randrange(len(fact.relation.phrasings)))


def _tell(result: dict[str, Any]) -> None:
    table = Table(title="share of facts recalled exactly, by tokens of the object (number of facts)")
    lengths = sorted({n for figures in result.values() for n in figures["recall"]})
    for column in ("model", "phrasing", *lengths):
        table.add_column(column, justify="left" if column in ("model", "phrasing") else "right")
    for name, figures in result.items():
        for key, title in (("recall", "trained"), ("held_out", "held out")):
            table.add_row(name, title, *[f"{figures[key][n]['value']:.3f} ({figures[key][n]['n']})" for n in lengths])
    Console().print(table)
