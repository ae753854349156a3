"""Layer and clamp of each arm, chosen on facts that no run tests, with the same eight tries (PROTOCOL.md).

    python benchmarks/real_facts/search.py run --data-dir DATA_DIR --out runs/search-block
    python benchmarks/real_facts/search.py run --data-dir DATA_DIR --out runs/search-mdm \
        --masked ROME_MDM/smollm2-mdm --causal none --control none
    python benchmarks/real_facts/search.py choose --out runs/search-block runs/search-mdm

Successive halving: all tries on the first facts, the better ones on more (`ROUNDS`). `run` goes on where it
was stopped. `choose` writes chosen.json, which `study.py run --chosen` reads, results.json and results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import study

from easyedit_mdm.common.files import append_line, write_json, write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.runs.judge import Judge
from easyedit_mdm.runs.run import Kept

HERE = Path(__file__).parent
TRIES = ((5, 4), (8, 2), (8, 4), (12, 4), (12, 8), (16, 4), (16, 8), (20, 4))  # (layer, clamp)
ROUNDS = ((8, 3), (4, 9), (2, 15))  # (tries that are left, facts that each has then)
LENGTHS, EACH, SEED, STEPS_TIMES = (2, 3, 4), 5, 2, 2
# by arm: the ways of decoding that a try is chosen for, and the arm that it is then run as
WAYS = {
    "plain x4": {"one step": "plain x4", "N steps": study.FOR_N_STEPS},
    "spread x4": {"N steps": "spread x4"},  # cycle x4 gets the same
    "autoregressive x4": {"N steps": "autoregressive x4"},
    "control x4": {"N steps": "control x4"},
}
Line = dict[str, Any]


def score(lines: Sequence[Line], way: str) -> float:
    """Share of right tokens in the way of decoding, times the share of the neighbours' tokens that stay."""
    key = "tokens" if way == "N steps" else "one_step_tokens"
    right = sum(line["after"][key] for line in lines) / len(lines)
    stay = [line["after"]["locality"] for line in lines if line["after"]["locality"] is not None]
    return right * sum(stay) / len(stay) if stay else right


def best(lines: Sequence[Line], way: str, facts: int, among: Sequence[int]) -> list[int]:
    """Tries, the best first, by their first `facts` facts; of two alike, the one with the lower loss."""

    def rank(number: int) -> tuple[float, float, int]:
        mine = [line for line in lines if line["try"] == number and line["fact"] < facts]
        return -score(mine, way), sum(line["loss"] for line in mine) / len(mine), number

    return sorted(among, key=rank)


def left(lines: Sequence[Line], way: str) -> list[list[int]]:
    """The tries of each round, as far as the lines go."""
    rounds, tries = [], list(range(len(TRIES)))
    for (keep, _), before in zip(ROUNDS, (None, *[facts for _, facts in ROUNDS])):
        if before is not None:
            have = {(line["try"], line["fact"]) for line in lines}
            if not all((number, fact) in have for number in tries for fact in range(before)):
                return rounds
            tries = best(lines, way, before, tries)[:keep]
        rounds.append(tries)
    return rounds


def run(args: argparse.Namespace) -> None:
    """Edit and judge: arm after arm, round after round."""
    if len(args.out) != 1 or not args.data_dir:
        raise SystemExit("run needs --data-dir and one folder as --out")
    out = Path(args.out[0])
    out.mkdir(parents=True, exist_ok=True)
    args.arms, args.chosen = list(WAYS), None
    judge, study.LENGTHS = Judge(DecodeConfig(), rungs=False, fluency=False), LENGTHS
    arms = study.arms_of(args)
    settings = {"tries": [*map(list, TRIES)], "rounds": [*map(list, ROUNDS)], "arms": study.told(arms)}
    file = study.begun(out, settings)
    facts = study.chosen(next(iter(arms.values()))[0], Path(args.data_dir), EACH, SEED)
    for arm, (model, hparams) in arms.items():
        name = f"{arm}, {Path(hparams.model_name).name}"
        base = hparams.v_num_grad_steps // study.ARMS[arm][0]
        before = Kept(model_fingerprint(model.native), judge)
        for number, (_, upto) in enumerate(ROUNDS):
            for fact in range(upto):
                mine = [line for line in study.read(file) if line["arm"] == name]
                wanted = {t for way in WAYS[arm] for t in left(mine, way)[number]}
                for tried in sorted(wanted - {line["try"] for line in mine if line["fact"] == fact}):
                    layer, clamp = TRIES[tried]
                    settings = replace(
                        hparams, layers=[layer], clamp_norm_factor=clamp, v_num_grad_steps=STEPS_TIMES * base
                    )
                    line = study.one(model, settings, facts[fact], judge, before.get(model, facts[fact]))
                    line = {"arm": name, "try": tried, "fact": fact, "layer": layer, "clamp": clamp, **line}
                    with file.open("a", encoding="utf-8") as stream:
                        append_line(stream, file, json.dumps(line, sort_keys=True))
                    print(name, TRIES[tried], fact, line["after"], f"{line['seconds']:.0f} s", flush=True)


def choose(args: argparse.Namespace) -> None:
    """chosen.json, results.json and results.md."""
    if args.committed:
        lines = study.lines_of(HERE / "search" / "results.json")
    else:
        lines = [line for out in args.out for line in study.read(Path(out) / "lines.jsonl")]
    if not lines:
        raise SystemExit(f"{args.out} holds no finished edits: run first")
    found, text = {}, ["# The search for layer and clamp: results", "", "Made by `search.py choose`.", ""]
    columns = (
        "arm",
        "chosen for",
        "layer",
        "clamp",
        "facts",
        "right tokens, N steps",
        "one step",
        "kept",
        "",
    )
    text += ["| " + " | ".join(columns) + " |", "| --- |" + " --- |" * 8]
    for name in sorted({line["arm"] for line in lines}):
        mine = [line for line in lines if line["arm"] == name]
        arm, model = name.split(", ")
        for way, runs_as in WAYS[arm].items():
            rounds = left(mine, way)
            have = {(line["try"], line["fact"]) for line in mine}
            last = {(number, fact) for number in rounds[-1] for fact in range(ROUNDS[-1][1])}
            if len(rounds) < len(ROUNDS) or not last <= have:
                raise SystemExit(f"the search of {name} is not finished: run it again")
            first = best(mine, way, ROUNDS[-1][1], rounds[-1])[0]
            layer, clamp = TRIES[first]
            found[f"{runs_as}, {model}"] = {"layers": [layer], "clamp_norm_factor": float(clamp)}
            if arm == "spread x4":
                found[f"cycle x4, {model}"] = found[f"{runs_as}, {model}"]
            for number in range(len(TRIES)):
                text.append(row(name, way, number, mine, rounds, number == first))
    folder = Path(args.folder)
    folder.mkdir(exist_ok=True)
    shown = [{k: v for k, v in line.items() if k not in ("subject", "text")} for line in lines]
    write_json(folder / "chosen.json", {"chosen": found})
    write_json(folder / "results.json", {"lines": shown})
    write_text(folder / "results.md", "\n".join(text) + "\n")


def row(name: str, way: str, number: int, mine: Sequence[Line], rounds: list[list[int]], first: bool) -> str:
    """A try, by the facts that all tries of its last round have."""
    facts = max(facts for (_, facts), tries in zip(ROUNDS, rounds) if number in tries)
    some = [line["after"] for line in mine if line["try"] == number and line["fact"] < facts]
    layer, clamp = TRIES[number]
    cells = [name, way, str(layer), str(clamp), str(len(some))]
    for key in ("tokens", "one_step_tokens", "locality"):
        values = [after[key] for after in some if after.get(key) is not None]
        cells.append(f"{sum(values) / len(values):.2f}" if values else "-")
    return "| " + " | ".join([*cells, "**chosen**" if first else ""]) + " |"


def main() -> None:
    """Run or choose."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "choose"))
    parser.add_argument("--data-dir")
    parser.add_argument("--out", nargs="+", default=["runs/search"], help="the run's folder; choose: folders")
    parser.add_argument("--masked", default="ROME_MDM/smollm2-block", help="its hyperparameter file, or none")
    parser.add_argument("--causal", default="ROME_MDM/smollm2", help="the same")
    parser.add_argument("--control", default="ROME_MDM/smollm2-control", help="the same")
    parser.add_argument("--device")
    parser.add_argument("--folder", default=str(HERE / "search"), help="where `choose` writes")
    parser.add_argument("--committed", action="store_true", help="choose from search/results.json")
    args = parser.parse_args()
    {"run": run, "choose": choose}[args.what](args)


if __name__ == "__main__":
    main()
