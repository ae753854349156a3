"""Which hyperparameters of ROME_MDM for twin-llada: one file for the twins' world, one for real text.

    python benchmarks/presets.py --data-dir DATA --out build/presets [--world 10] [--text 4]

Every candidate edits the same held-back records: validation facts of the twins' world, or zsRE and
CounterFact records about subjects that no reported run has edited. The candidate with the largest harmonic
mean of success and locality is taken; ties go to more paraphrases. The runs stay in `--out` and go on where
they were stopped; the figures go to benchmarks/presets.json.
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

SHIPPED = HERE.parent / "hparams" / "ROME_MDM" / "twin-llada.yaml"
ACTIVATION, OPEN = HERE / "twin-llada-activation.yaml", HERE / "twin-llada-open.yaml"


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


BEFORE = Candidate("before", SHIPPED, {})
WORLD = (
    BEFORE,
    Candidate("activation", ACTIVATION, {}),
)
TEXT = (
    BEFORE,
    Candidate("clamp-3", SHIPPED, {"clamp_norm_factor": 3.0}),
    Candidate("no-moments", SHIPPED, {"mom2_adjustment": False}),
    Candidate("layer-0", SHIPPED, {"layers": [0]}),
    Candidate("open", OPEN, {}),
)


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
    candidates: tuple[Candidate, ...], data: dict[str, Path | int], folder: Path
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
                "ROME_MDM", str(hparams), dataset, data_file=own, limit=limited, seed=SEED, light=True
            )
            bench(config, file, resume=True)
            files.append(file)
        changes = {"file": candidate.base.name, **candidate.changes}
        rows.append({"name": candidate.name, "changes": changes, **figures(files)})
    return sorted(rows, key=lambda row: (-row["score"], -row["rephrase_exact"]))


def main() -> None:
    """Both choices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", type=int, default=10, help="validation facts (default: 10)")
    parser.add_argument("--text", type=int, default=4, help="records of each data set (default: 4)")
    asked = parser.parse_args()
    for part in ("world", "text"):
        (asked.out / part).mkdir(parents=True, exist_ok=True)
    text = {name: held_back(name, asked.data_dir, asked.text, asked.out / "text") for name in SOURCES}
    result = {
        "seed": SEED,
        "text": {"records_of_each": asked.text, "tried": tried(TEXT, {**text}, asked.out / "text")},
        "world": {
            "facts": asked.world,
            "tried": tried(WORLD, {"twins_validation": asked.world}, asked.out / "world"),
        },
    }
    write_json(HERE / "presets.json", result)


if __name__ == "__main__":
    main()
