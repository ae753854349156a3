"""benchmarks/thousand on a tiny model: every line of it, and values that are used again."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


SCRIPTS = ROOT / "benchmarks" / "thousand"


def called(name: str, *arguments: object) -> str:
    """Runs a script of the folder in this process; what it says where it ends with an error, else ""."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        except SystemExit as ended:
            return str(ended.code or "")
    return ""


@pytest.fixture
def thousand(tiny, tokenizer, data_dir, tmp_path, monkeypatch):
    """Runs the script on a tiny masked model with some settings and options; four facts in batches of two."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.folder("llada").iterdir():
        (model / file.name).symlink_to(file)
    tokenizer.save_pretrained(model)
    (tmp_path / "text.txt").write_text("The river of the old city is deep and wide and long.\n" * 60)
    memit = {
        "alg_name": "MEMIT_MDM", "model_name": str(model), "layers": [1], "v_num_grad_steps": 2,
        "context_templates": ["{}"], "mom2_dataset": str(tmp_path / "text.txt"), "mom2_n_tokens": 200,
        "device": "cpu",
    }  # fmt: skip
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))

    def run(out: str, settings: dict | None = None, **options) -> str:
        given = {**memit, **(settings or {})}
        (tmp_path / "tiny.yaml").write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
        options = {"alg": given["alg_name"], **options}
        return called(
            "run.py", "run", "--data-dir", data_dir, "--hparams", tmp_path / "tiny.yaml", "--facts", 4,
            "--batch", 2, "--untouched", 8, "--out", tmp_path / out,
            *(part for key, value in options.items()
              for part in (f"--{key}", *(value if isinstance(value, tuple) else (value,)))),
        )  # fmt: skip

    return run


def curve(folder: Path) -> dict:
    """What a run has written."""
    return json.loads((folder / "curve.json").read_text())


@pytest.mark.data
@pytest.mark.end_to_end
def test_a_few_facts_in_batches(thousand, tmp_path):
    """Reports after every batch. Another lambda takes the values that are there; other settings do not."""
    kept = tmp_path / "values"
    assert thousand("one", weight="10", values=kept, share=(1, 2)) == ""
    assert [file.name for file in kept.iterdir()] == ["values-001.pt"], "the second batch's, and no edit"
    assert not (tmp_path / "one" / "curve.json").exists()
    assert thousand("one", weight="10", values=kept) == ""
    reports = curve(tmp_path / "one")["reports"]
    assert [report["facts"] for report in reports] == [2, 4]
    assert all(report["perplexity_ratio"] != 1 for report in reports), "the model is another one now"
    values = {file.name: file.read_bytes() for file in kept.iterdir()}
    assert len(values) == 2
    assert thousand("two", weight="100000", values=kept) == ""
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == values
    moved = [curve(tmp_path / out)["reports"][-1]["norm_ratio"] for out in ("one", "two")]
    assert list(moved[1].values()) < list(moved[0].values()), "a larger lambda moves the weight less"
    other = thousand("three", values=kept, settings={"v_num_grad_steps": 3})
    assert "values of other facts or settings" in other
    other = thousand("one", weight="20", values=kept)
    assert "is of other settings" in other
    assert "0 <= K < M" in thousand("four", share=(2, 2))
    assert "--share are for --mode rebase" in thousand("four", share=(0, 2), mode="sequential")


TWIN = {
    "model_name": "twin-llama", "layers": [3], "v_num_grad_steps": 60, "v_lr": 0.5,
    "mom2_n_tokens": 1100,
}  # fmt: skip


@pytest.mark.data
@pytest.mark.end_to_end
def test_protected_prompts(thousand, tmp_path):
    """The second moments are also of other facts' prompts: the same values, another update."""
    settings = {**TWIN, "mom2_dataset": "enwiki_articles.txt"}
    kept = {"weight": "10", "values": tmp_path / "values"}
    for out, changes in (("plain", {}), ("more", {"protect": "30"})):
        assert thousand(out, settings=settings, **kept, **changes) == ""
    text = (tmp_path / "values" / "protect-30.txt").read_text()
    assert len(text.splitlines()) > 31, "prompts and articles in turn"
    plain, more = (curve(tmp_path / out)["reports"][-1]["norm_ratio"] for out in ("plain", "more"))
    assert plain != more
    wrong = thousand("wrong", settings={"mom2_dataset": str(tmp_path / "text.txt")}, protect="30")
    assert "--protect" in wrong


@pytest.mark.data
@pytest.mark.end_to_end
def test_facts_optimised_again_and_one_taken_back(thousand, tmp_path):
    """With a large lambda hardly a fact is written: rounds write more. One taken back is gone."""
    kept = {"weight": "1000", "values": tmp_path / "values"}
    for out, changes in (("once", {}), ("again", {"rounds": "3", "undo": "1"})):
        assert thousand(out, settings=TWIN, **kept, **changes) == ""
    once, again = (curve(tmp_path / out)["reports"][-1]["exact"] for out in ("once", "again"))
    assert once < again
    undone = curve(tmp_path / "again")["undone"]
    assert (undone["fact"], undone["others"]) == (1, 3)
    assert (undone["written_before"], undone["written_after"]) == (1, 0)
    assert undone["others_after"] > 0, "the others are still there"


@pytest.mark.data
@pytest.mark.end_to_end
def test_a_memory_in_a_sequence_and_no_edit(thousand, tmp_path):
    """GRACE_MDM writes facts, leaves the rest alone, and gives one fact back. No edit writes none."""
    grace = {
        "alg_name": "GRACE_MDM", "model_name": "twin-llama", "layers": [4], "v_num_grad_steps": None,
        "mom2_dataset": None, "mom2_n_tokens": None, "n_iter": 200, "edit_lr": 0.5, "eps": 0.001,
    }  # fmt: skip
    assert thousand("grace", settings=grace, mode="sequential", undo="1", first="3") == ""
    reports, undone = curve(tmp_path / "grace")["reports"], curve(tmp_path / "grace")["undone"]
    assert [report["facts"] for report in reports] == [2, 3]
    assert reports[-1]["exact"] > 0.5 and reports[-1]["untouched"] == 1
    assert undone["written_before"] == 1 and undone["written_after"] == 0
    assert (undone["fact"], undone["others"], undone["others_changed"]) == (1, 2, 0)
    refused = thousand("refused", mode="sequential", undo="1")
    assert "--undo" in refused
    assert thousand("nothing", mode="sequential", alg="none") == ""
    (_, report) = curve(tmp_path / "nothing")["reports"]
    assert (report["exact"], report["untouched"], report["perplexity_ratio"]) == (0, 1, 1)


@pytest.mark.data
@pytest.mark.end_to_end
def test_a_sequence_goes_on(thousand, tmp_path):
    """A run cut off after its first batch gives what a whole one gives; the first is not made again."""
    settings = {"alg_name": "AlphaEdit_MDM", "nullspace_threshold": 0.5}
    assert thousand("whole", settings=settings, mode="sequential") == ""
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "edits" / "00001")
    kept = curve(tmp_path / "whole")
    (tmp_path / "cut" / "curve.json").write_text(json.dumps({**kept, "reports": kept["reports"][:1]}))
    shutil.rmtree(tmp_path / "cache")  # second moments, too, must be those of the unedited model
    before = (tmp_path / "cut" / "edits" / "00000" / "keys.safetensors").stat().st_mtime_ns
    assert thousand("cut", settings=settings, mode="sequential") == ""
    assert (tmp_path / "cut" / "edits" / "00000" / "keys.safetensors").stat().st_mtime_ns == before
    runs = [curve(tmp_path / out)["reports"] for out in ("whole", "cut")]
    for report in [*runs[0], *runs[1]]:
        report.pop("cpu_seconds")
    assert runs[0] == runs[1]


@pytest.mark.data
@pytest.mark.end_to_end
def test_the_bounds_of_a_run(thousand, data_dir, tmp_path):
    """Ranks of the keys, and how many facts their values write with no weight changed."""
    settings = {**TWIN, "layers": [2, 3]}
    assert thousand("run", settings=settings, values=tmp_path / "values", weight="10") == ""
    kept = ("--data-dir", data_dir, "--values", tmp_path / "values", "--hparams", tmp_path / "tiny.yaml")
    done, wrong = (called("bound.py", *kept, "--out", tmp_path / "bound.json", "--facts", n) for n in (4, 3))
    assert done == ""
    bound = json.loads((tmp_path / "bound.json").read_text())
    assert bound["facts"] == 4 and 0 < bound["as_activations"] <= 1
    assert list(bound["layers"]) == ["2", "3"]
    assert all(
        layer["above_0.01"] == 4 and 0 < layer["spanned_of_others"] < 1 for layer in bound["layers"].values()
    )
    assert "holds 4 values" in wrong
