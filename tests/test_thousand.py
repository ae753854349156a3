"""benchmarks/thousand on a tiny model: every line of it, and values that are used again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.data
@pytest.mark.end_to_end
def test_a_few_facts_in_batches(tiny, tokenizer, data_dir, tmp_path):
    """Reports after every batch. Another lambda takes the values that are there; other settings do not."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.folder("llada").iterdir():
        (model / file.name).symlink_to(file)
    tokenizer.save_pretrained(model)
    (tmp_path / "text.txt").write_text("The river of the old city is deep and wide and long.\n" * 40)
    settings = {
        "alg_name": "MEMIT_MDM", "model_name": str(model), "layers": [1], "v_num_grad_steps": 2,
        "context_templates": ["{}"], "mom2_dataset": str(tmp_path / "text.txt"), "mom2_n_tokens": 200,
        "device": "cpu",
    }  # fmt: skip
    environment = {**os.environ, "EASYEDIT_MDM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def run(out: str, **changes) -> subprocess.CompletedProcess:
        (tmp_path / "tiny.yaml").write_text(json.dumps({**settings, **changes.pop("settings", {})}))
        command = [
            sys.executable, ROOT / "benchmarks" / "thousand" / "run.py", "run", "--data-dir", data_dir,
            "--hparams", tmp_path / "tiny.yaml", "--facts", "4", "--batch", "2",
            "--values", tmp_path / "values", "--out", tmp_path / out,
        ]  # fmt: skip
        command += [part for key, value in changes.items() for part in (f"--{key}", value)]
        return subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True
        )

    done = run("one", weight="10")
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "one" / "curve.json").read_text())["reports"]
    assert [report["facts"] for report in reports] == [2, 4]
    assert all(report["perplexity_ratio"] != 1 for report in reports), "the model is another one now"
    values = {file.name: file.read_bytes() for file in (tmp_path / "values").iterdir()}
    assert len(values) == 2
    again = run("two", weight="100000")
    assert again.returncode == 0, again.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "values").iterdir()} == values
    moved = [
        json.loads((tmp_path / out / "curve.json").read_text())["reports"][-1]["norm_ratio"]
        for out in ("one", "two")
    ]
    assert list(moved[1].values()) < list(moved[0].values()), "a larger lambda moves the weight less"
    other = run("three", settings={"v_num_grad_steps": 3})
    assert other.returncode == 1 and "values of other facts or settings" in other.stderr
    other = run("one", weight="20")
    assert other.returncode == 1 and "is of other settings" in other.stderr
