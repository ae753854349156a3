"""Which hyperparameters for a twin: one file for the twins' world, one for real text.

    python benchmarks/presets.py --data-dir DATA --out build/presets [--world 10] [--text 10]
    python benchmarks/presets.py --data-dir DATA --out build/presets --method MEMIT_MDM --model twin-llama
    python benchmarks/presets.py --write          # hparams/METHOD/MODEL-text.yaml, from presets.json
    python benchmarks/presets.py --table          # the table of docs/methods.md

Every candidate edits the same held-back records: validation facts of the twins' world, or zsRE and
CounterFact records about subjects that no reported run has edited. The candidate with the largest harmonic
mean of success and locality is taken; ties go to more paraphrases. The runs stay in `--out` and go on where
they were stopped; the figures go to benchmarks/presets.json, a section for each method and model.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import yaml

from easyedit_mdm.common.files import write_json, write_text
from easyedit_mdm.data.cases import load_cases
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.summaries import summary
from easyedit_mdm.runs.run import BenchConfig, bench

HERE = Path(__file__).parent
SEED = 101
MEASURES = ("success", "locality_kept", "rephrase_exact")
# (file below the data folder, field of the subject): what the records come from
SOURCES = {
    "zsre": "zsre/zsre_mend_eval_portability_gpt4.json",
    "counterfact": "counterfact/counterfact-edit.json",
}
REPORTED = {"zsre": (200, 50, 20, 10), "counterfact": (50, 20, 10)}  # drawn with seed 0

SHIPPED = HERE.parent / "hparams"
ACTIVATION, OPEN = HERE / "twin-llada-activation.yaml", HERE / "twin-llada-open.yaml"
METHODS = ("ROME_MDM", "MEMIT_MDM", "EMMET_MDM", "AlphaEdit_MDM")
MODELS = ("twin-llada", "twin-llama")
# values optimised through the update: what ROME_MDM's file for real text has
THROUGH = {
    "optimise_through": "weights",
    "v_num_grad_steps": 200,
    "v_lr": 0.003,
    "v_lr_schedule": "cosine",
    "v_weight_decay": 0,
    "clamp_norm_factor": 10.0,
    "context_template_length_params": [[6, 1]],
    "state_schedule": "spread",
    "max_states": 4,
}
# a weaker and a stronger hold on what the layer knows, of the methods that have one
HOLDS = {
    "ROME_MDM": ({"mom2_adjustment": False}, {"clamp_norm_factor": 3.0}),
    "MEMIT_MDM": ({"mom2_update_weight": 10}, {"mom2_update_weight": 1000}),
    "EMMET_MDM": ({"emmet_lambda": 0.01}, {"emmet_lambda": 1.0}),
    "AlphaEdit_MDM": ({"L2": 1.0e-3}, {"L2": 0.1}),
}


@dataclass(frozen=True)
class Candidate:
    """A hyperparameter file and what is changed in it."""

    name: str
    base: Path
    changes: dict[str, Any]

    def write(self, folder: Path) -> Path:
        """The file of this candidate."""
        values = {**yaml.safe_load(self.base.read_text(encoding="utf-8")), **self.changes}
        file = folder / f"{self.name}.yaml"
        write_text(file, yaml.safe_dump(values, sort_keys=False))
        return file


def shipped(method: str, model: str) -> Candidate:
    """The file that ships for the twins' world."""
    return Candidate("before", SHIPPED / method / f"{model}.yaml", {})


def for_text(method: str, model: str) -> tuple[Candidate, ...]:
    """Candidates for real text: the file for the world, and values through the weights, at several layers and
    with a weaker or stronger hold on what is known.
    """
    before = shipped(method, model)
    weak, strong = HOLDS[method]
    through = [
        Candidate(name, before.base, {**THROUGH, **changes})
        for name, changes in (
            ("layer-0", {"layers": [0]}),
            ("layer-1", {"layers": [1]}),
            ("layer-3", {"layers": [3]}),
            ("layer-0-weak", {"layers": [0], **weak}),
            ("layer-0-strong", {"layers": [0], **strong}),
        )
    ]
    own = (method, model) == ("ROME_MDM", "twin-llada")
    return (before, *through, *((Candidate("open", OPEN, {}),) if own else ()))


def for_world(method: str, model: str) -> tuple[Candidate, ...]:
    """Candidates for the world that the twins were taught."""
    own = (method, model) == ("ROME_MDM", "twin-llada")
    more = (Candidate("activation", ACTIVATION, {}),) if own else ()
    return (shipped(method, model), *more)


def held_back(dataset: str, data_dir: Path, number: int, folder: Path) -> Path:
    """A file of records of subjects that no reported draw of the data set has."""
    file = data_dir / SOURCES[dataset]
    reported = {
        case.subject
        for limit in REPORTED[dataset]
        for case in load_cases(dataset, data_dir, limit=limit, seed=0).cases
    }
    records = json.loads(file.read_text(encoding="utf-8"))
    left = [record for record in records if record["subject"] not in reported]
    drawn = random.Random(SEED).sample(left, number)
    place = folder / f"{dataset}-{number}.json"
    write_text(place, json.dumps(drawn))
    return place


def figures(files: list[Path]) -> dict[str, Any]:
    """Means over the cases of several run files, and the score."""
    found = [summary(read_run(file), seed=0, resamples=2) for file in files]
    cases = sum(one["cases"] for one in found)
    means = {}
    for name in MEASURES:
        parts = [one["measures"][name] for one in found if name in one["measures"]]
        total = sum(part["n"] for part in parts)
        means[name] = round(sum((part["mean"] or 0.0) * part["n"] for part in parts) / max(1, total), 4)
    score = harmonic_mean([means["success"], means["locality_kept"]])
    return {"cases": cases, "failed": sum(one["failed"] for one in found), **means, "score": round(score, 4)}


def tried(
    method: str, candidates: tuple[Candidate, ...], data: dict[str, Path | int], folder: Path
) -> list[dict[str, Any]]:
    """Every candidate on every data set, best first."""
    rows = []
    for candidate in candidates:
        hparams, files = candidate.write(folder), []
        for dataset, source in data.items():
            file = folder / f"{candidate.name}-{dataset}.jsonl"
            limited = source if isinstance(source, int) else None
            own = None if isinstance(source, int) else str(source)
            config = BenchConfig(
                method, str(hparams), dataset, data_file=own, limit=limited, seed=SEED, light=True
            )
            bench(config, file, resume=True)
            files.append(file)
        changes = {"file": candidate.base.name, **candidate.changes}
        rows.append({"name": candidate.name, "changes": changes, **figures(files)})
    return sorted(rows, key=lambda row: (-row["score"], -row["rephrase_exact"]))


def write(result: dict[str, Any]) -> None:
    """The file for real text of every method and model, if the best is not the one for the world."""
    for name, found in result.items():
        method, model = name.split("/")
        best = found["text"][0]
        if best["name"] in ("before", "open"):
            continue
        base = yaml.safe_load((SHIPPED / method / f"{model}.yaml").read_text(encoding="utf-8"))
        changes = {k: v for k, v in best["changes"].items() if k != "file"}
        head = (
            f"# {method} for {model} on text outside its world (zsRE, CounterFact); {model}.yaml is for the"
            " world that it was taught.\n# The best of six on held-back records, by success and locality:"
            " benchmarks/presets.py, benchmarks/presets.json.\n"
        )
        body = yaml.safe_dump({**base, **changes}, sort_keys=False)
        write_text(SHIPPED / method / f"{model}-text.yaml", head + body)


def table(result: dict[str, Any]) -> str:
    """The file for the world beside the best for real text, of every method and model."""
    names = ("on real text", "records", "success", "paraphrase", "locality", "score")
    lines = ["| method, model | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for name, found in result.items():
        rows = {row["name"]: row for row in found["text"]}
        best = found["text"][0]
        for what, row in (("the world's file", rows["before"]), (f"best: {best['name']}", best)):
            measures = (f"{row[key]:.2f}" for key in ("success", "rephrase_exact", "locality_kept", "score"))
            lines.append("| " + " | ".join([name, what, str(row["cases"]), *measures]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Both choices, of every method and model that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true", help="write the files of the best")
    parser.add_argument("--table", action="store_true", help="print the table of docs/methods.md")
    parser.add_argument("--world", type=int, default=10, help="validation facts (default: 10)")
    parser.add_argument("--text", type=int, default=10, help="records of each data set (default: 10)")
    parser.add_argument("--method", choices=METHODS, action="append", help="may be given several times")
    parser.add_argument("--model", choices=MODELS, action="append", help="may be given several times")
    asked = parser.parse_args()
    file = HERE / "presets.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if asked.write or asked.table:
        if asked.write:
            write(result)
        return print(table(result), end="")
    if asked.data_dir is None or asked.out is None:
        parser.error("--data-dir and --out are needed")
    asked.out.mkdir(parents=True, exist_ok=True)
    text = {name: held_back(name, asked.data_dir, asked.text, asked.out) for name in SOURCES}
    for method in asked.method or METHODS:
        for model in asked.model or MODELS:
            folders = {part: asked.out / method / model / part for part in ("text", "world")}
            for folder in folders.values():
                folder.mkdir(parents=True, exist_ok=True)
            world = tried(
                method, for_world(method, model), {"twins_validation": asked.world}, folders["world"]
            )
            result[f"{method}/{model}"] = {
                "seed": SEED,
                "records_of_each": asked.text,
                "text": tried(method, for_text(method, model), {**text}, folders["text"]),
                "facts": asked.world,
                "world": world,
            }
            write_json(file, result)


if __name__ == "__main__":
    main()
