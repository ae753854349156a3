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
from easyedit_mdm.common.files import write_json
from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import EditRequest, ROMEMDMHyperParams
from easyedit_mdm.editing.activation import optimise_at, success_as_activation
from easyedit_mdm.errors import UnknownNameError
from easyedit_mdm.evaluation import score_prompts
from easyedit_mdm.evaluation.records import Score
from easyedit_mdm.models import Adapter
from easyedit_mdm.training.export import export
from easyedit_mdm.training.tokenizer import train_tokenizer
from easyedit_mdm.training.twins import RECIPES, RELATIVES, SIZES, train
from easyedit_mdm.twins.benchmark import cases, remaining_entropy, write_benchmark
from easyedit_mdm.twins.folders import TWINS
from easyedit_mdm.twins.world import Fact, World

LONG_CANVAS = 16


def train_twin(
    name: str,
    out: str | Path,
    steps: int | None = None,
    start_from: str | Path | None = None,
    seed: int = 0,
    size: str = "small",
) -> dict[str, Any]:
    """Train a twin by its recipe, resuming where `out` holds a checkpoint, and export it to `out/model`.

    Args:
        steps: of this stage and all earlier ones, instead of the recipes'.
        start_from: training folder of the stage before it (`RELATIVES` says which); without it all earlier
            stages are trained as well, in `out/stages`.
        size: `small` (2.6 million parameters) or `medium` (30 million, for a GPU).

    Returns:
        the final state: recipe, steps, seconds, loss.

    Raises:
        UnknownNameError: for a name that has no recipe.
    """
    if name not in RECIPES:
        raise UnknownNameError(
            f"no recipe is called {name!r}{did_you_mean(name, RECIPES)} Known: {', '.join(RECIPES)}"
        )
    if name in RELATIVES and start_from is None:
        start_from = Path(out) / "stages" / RELATIVES[name]
        train_twin(RELATIVES[name], start_from, steps, seed=seed, size=size)
    recipe = replace(
        RECIPES[name], seed=seed, start_from=None if start_from is None else str(start_from), **SIZES[size]
    )
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    world = World.build()
    tokenizer = train_tokenizer(world)
    train(recipe, world, tokenizer, Path(out))
    return export(Path(out), Path(out) / "model", tokenizer)


def write_data(folder: str | Path) -> None:
    """Write the benchmark files of the twins' world, and print how predictable the objects' tokens are from
    each other.
    """
    world, console = World.build(), Console()
    for path in write_benchmark(folder, world):
        console.print(f"{path}: {len(json.loads(path.read_text()))} records")
    table = Table(title="bits still to be guessed, given k revealed tokens at random places")
    for column in ("objects", "N", *(f"k = {k}" for k in range(world.settings.max_length))):
        table.add_column(column, justify="right")
    for closed in (False, True):
        for length, bits in remaining_entropy(world, closed).items():
            table.add_row(
                "closed list" if closed else "compositional", str(length), *(f"{b:.1f}" for b in bits)
            )
    console.print(table)


def evaluate_twins(
    models: Sequence[str] | None = None, limit: int = 100, file: str | Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """How good the twins are, by length of the object (or target).

    - `recall`: facts written exactly after a trained phrasing (masked: N masks, N steps, low_confidence; else
      greedy).
    - `held_out`: the same after a phrasing that was held out of training.
    - `canvas16`: 16 masks (or greedy tokens), and nothing but the object before the end of the text.
    - `editability`: validation facts, a target of that length, the value, optimised in the bare prompt, added
      as an activation at the site of the model's own ROME_MDM file, kept within 4 times the MLP output's
      norm; no weight is changed. A sixth as many facts.

    Args:
        models: twins or folders; all twins by default.
        limit: facts a length, drawn by `seed`.
        file: where to write the figures as JSON.

    Returns:
        `{model: {"recall": {"1": {"value": v, "n": n}, ...}, ...}}`.
    """
    world = World.build()
    result = {}
    for name in models or TWINS:
        model = load_model(name)
        rng = random.Random(seed)
        figures: dict[str, Any] = {"recall": {}, "held_out": {}, "canvas16": {}, "editability": {}}
        for length in range(1, world.settings.max_length + 1):
            facts = [f for f in world.all_facts() if f.length == length]
            facts = rng.sample(facts, min(limit, len(facts)))
            trained = [_trained(f, rng) for f in facts]
            scores = _score(model, [*trained, *(f.paraphrase(rng.randrange(2)) for f in facts)], facts * 2)
            figures["recall"][str(length)] = _mean([s["exact"] for s in scores[: len(facts)]])
            figures["held_out"][str(length)] = _mean([s["exact"] for s in scores[len(facts) :]])
            longer = _score(model, trained, facts, DecodeConfig(canvas=LONG_CANVAS))
            figures["canvas16"][str(length)] = _mean(
                [s["text_to_end"] == f.object for s, f in zip(longer, facts)]
            )
        editable = _editable(model, str(name), world, max(1, limit // 6))
        figures["editability"] = {str(length): _mean(values) for length, values in editable.items()}
        result[str(name)] = figures
    if file is not None:
        write_json(file, result)
    _print_scores(result)
    return result


def _score(
    model: Adapter, prompts: Sequence[str], facts: Sequence[Fact], config: DecodeConfig = DecodeConfig()
) -> list[Score]:
    return score_prompts(model, prompts, [f.object for f in facts], config)


def _editable(model: Adapter, name: str, world: World, n: int) -> dict[int, list[bool]]:
    """By length, of `n` validation facts each; the values of all are optimised together."""
    twin = next((t for t in TWINS if t == name or t == model.name), None) or _twin_of(model)
    hparams = replace(
        ROMEMDMHyperParams.from_hparams(f"ROME_MDM/{twin}"), clamp_norm_factor=4.0, context_templates=["{}"]
    )
    chosen = cases(world, "validation")[: n * world.settings.max_length]
    works = success_as_activation(
        model, optimise_at(model, [EditRequest.of(case.request()) for case in chosen], hparams)
    )
    by_length: dict[int, list[bool]] = {}
    for case, value in zip(chosen, works):
        by_length.setdefault(case.length, []).append(value)
    return by_length


def _twin_of(model: Adapter) -> str:
    return next(t for t in TWINS if t.endswith({"qwen2": "qwen"}.get(model.spec.name, model.spec.name)))


def _mean(values: Sequence[Any]) -> dict[str, Any]:
    return {"value": sum(map(float, values)) / len(values), "n": len(values)}


def _trained(fact: Fact, rng: random.Random) -> str:
    return fact.prompt(rng.randrange(len(fact.relation.phrasings)))


def _print_scores(result: dict[str, Any]) -> None:
    table = Table(title="share of facts, by tokens of the object")
    lengths = sorted({n for figures in result.values() for n in figures["recall"]}, key=int)
    for column in ("model", "what", "facts", *lengths):
        table.add_column(column, justify="left" if column in ("model", "what") else "right")
    for name, figures in result.items():
        for key, cells in figures.items():
            table.add_row(
                name, key, str(cells[lengths[0]]["n"]), *[f"{cells[n]['value']:.3f}" for n in lengths]
            )
    Console().print(table)
