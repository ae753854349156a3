"""benchmarks/thousand on a tiny model: every line of it, and values that are used again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


SCRIPT = ROOT / "benchmarks" / "thousand" / "run.py"


@pytest.fixture
def thousand(tiny, tokenizer, data_dir, tmp_path):
    """Runs the script on a tiny masked model with some settings and options; four facts in batches of two."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.folder("llada").iterdir():
        (model / file.name).symlink_to(file)
    tokenizer.save_pretrained(model)
    (tmp_path / "text.txt").write_text("The river of the old city is deep and wide and long.\n" * 40)
    memit = {
        "alg_name": "MEMIT_MDM", "model_name": str(model), "layers": [1], "v_num_grad_steps": 2,
        "context_templates": ["{}"], "mom2_dataset": str(tmp_path / "text.txt"), "mom2_n_tokens": 200,
        "device": "cpu",
    }  # fmt: skip
    environment = {**os.environ, "EASYEDIT_MDM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def run(out: str, *options: str, settings: dict | None = None, **changes) -> subprocess.CompletedProcess:
        given = {**memit, **(settings or {})}
        (tmp_path / "tiny.yaml").write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
        command = [
            sys.executable, SCRIPT, "run", "--data-dir", data_dir, "--hparams", tmp_path / "tiny.yaml",
            "--alg", given["alg_name"], "--facts", "4", "--batch", "2",
            "--untouched", "8", "--out", tmp_path / out, *options,
        ]  # fmt: skip
        command += [part for key, value in changes.items() for part in (f"--{key}", value)]
        return subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True
        )

    return run


def curve(folder: Path) -> dict:
    """What a run has written."""
    return json.loads((folder / "curve.json").read_text())


@pytest.mark.data
@pytest.mark.end_to_end
def test_a_few_facts_in_batches(thousand, tmp_path):
    """Reports after every batch. Another lambda takes the values that are there; other settings do not."""
    kept = tmp_path / "values"
    done = thousand("one", weight="10", values=kept)
    assert done.returncode == 0, done.stderr
    reports = curve(tmp_path / "one")["reports"]
    assert [report["facts"] for report in reports] == [2, 4]
    assert all(report["perplexity_ratio"] != 1 for report in reports), "the model is another one now"
    values = {file.name: file.read_bytes() for file in kept.iterdir()}
    assert len(values) == 2
    again = thousand("two", weight="100000", values=kept)
    assert again.returncode == 0, again.stderr
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == values
    moved = [curve(tmp_path / out)["reports"][-1]["norm_ratio"] for out in ("one", "two")]
    assert list(moved[1].values()) < list(moved[0].values()), "a larger lambda moves the weight less"
    other = thousand("three", values=kept, settings={"v_num_grad_steps": 3})
    assert other.returncode == 1 and "values of other facts or settings" in other.stderr
    other = thousand("one", weight="20", values=kept)
    assert other.returncode == 1 and "is of other settings" in other.stderr


@pytest.mark.data
@pytest.mark.end_to_end
def test_protected_prompts_rounds_and_a_fact_taken_back(thousand, tmp_path):
    """Second moments of other facts' prompts; facts optimised again; one fact of all is taken back."""
    settings = {"mom2_dataset": "enwiki_articles.txt", "v_num_grad_steps": 20, "v_lr": 0.5}
    plain = thousand("plain", settings=settings, weight="10", values=tmp_path / "values")
    assert plain.returncode == 0, plain.stderr
    more = thousand(
        "more", settings=settings, weight="10", values=tmp_path / "values", protect="30", rounds="1", undo="1"
    )
    assert more.returncode == 0, more.stderr
    text = (tmp_path / "values" / "protect-30.txt").read_text()
    assert len(text.splitlines()) > 31, "prompts and articles in turn"
    one, other = curve(tmp_path / "plain"), curve(tmp_path / "more")
    assert one["reports"][-1]["norm_ratio"] != other["reports"][-1]["norm_ratio"]
    undone = other["undone"]
    assert (undone["fact"], undone["others"]) == (1, 3)
    assert undone["others_before"] == undone["others_after"] or undone["others_changed"]
    wrong = thousand("wrong", settings={"mom2_dataset": str(tmp_path / "text.txt")}, protect="30")
    assert wrong.returncode == 1 and "--protect" in wrong.stderr


@pytest.mark.data
@pytest.mark.end_to_end
def test_a_memory_in_a_sequence(thousand, tmp_path):
    """GRACE_MDM writes all facts, leaves the rest alone, and gives one fact back."""
    grace = {
        "alg_name": "GRACE_MDM", "v_num_grad_steps": None, "mom2_dataset": None, "mom2_n_tokens": None,
        "n_iter": 60, "edit_lr": 0.5, "eps": 0.001, "key_states": "per_state", "state_schedule": "enumerate",
    }  # fmt: skip
    done = thousand("grace", settings=grace, mode="sequential", undo="1", first="3")
    assert done.returncode == 0, done.stderr
    reports, undone = curve(tmp_path / "grace")["reports"], curve(tmp_path / "grace")["undone"]
    assert [report["facts"] for report in reports] == [2, 3]
    assert (
        reports[-1]["exact"] > 0
        and reports[-1]["untouched"] == 1
        and not any(reports[-1]["norm_ratio"].values())
    )
    assert (undone["fact"], undone["others"], undone["others_changed"]) == (1, 2, 0)
    refused = thousand("refused", mode="sequential", undo="1")
    assert refused.returncode == 1 and "--undo" in refused.stderr


@pytest.mark.data
@pytest.mark.end_to_end
def test_the_bounds_of_a_run(thousand, data_dir, tmp_path):
    """Ranks of the keys, and how many facts their values write with no weight changed."""
    settings = {"model_name": "twin-llama", "layers": [2, 3], "v_num_grad_steps": 60, "v_lr": 0.5}
    made = thousand("run", settings=settings, values=tmp_path / "values", weight="10")
    assert made.returncode == 0, made.stderr
    command = [
        sys.executable, SCRIPT.parent / "bound.py", "--data-dir", data_dir, "--values", tmp_path / "values",
        "--hparams", tmp_path / "tiny.yaml", "--out", tmp_path / "bound.json", "--facts",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done, wrong = (
        subprocess.run([*map(str, command), n], env=environment, capture_output=True, text=True)
        for n in ("4", "3")
    )
    assert done.returncode == 0, done.stderr
    bound = json.loads((tmp_path / "bound.json").read_text())
    assert bound["facts"] == 4 and 0 < bound["as_activations"] <= 1
    assert list(bound["layers"]) == ["2", "3"]
    assert all(
        layer["above_0.01"] == 4 and 0 < layer["spanned_of_others"] < 1 for layer in bound["layers"].values()
    )
    assert wrong.returncode == 1 and "holds 4 values" in wrong.stderr
