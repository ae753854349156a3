"""Runs in batches: together or in sequence, scored after every batch, and the same file after a kill in the
middle.
"""

from __future__ import annotations

import json
import shutil

import pytest
from test_bench import alike, lines

from easyedit_mdm.cli import main
from easyedit_mdm.editing.hparams import find_hparams
from easyedit_mdm.errors import DataError, FileError, HyperParameterError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.summaries import summary
from easyedit_mdm.runs import batches
from easyedit_mdm.runs import run as running
from easyedit_mdm.runs.batches import batches_file, edits_folder, read_batches
from easyedit_mdm.runs.run import BenchConfig, bench

pytestmark = pytest.mark.end_to_end


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Kept evaluations and statistics stay in the test's folder."""
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Five facts of the twins' world, two a batch, with few optimiser steps."""
    monkeypatch.setattr(running, "WATCHED", 12)

    def make(method: str, mode: str, prefixes: str = 'templates: ["{}"]', **changes) -> BenchConfig:
        text = find_hparams(f"{method}/twin-llama").read_text()
        lines_ = [
            line
            for line in text.splitlines()
            if not line.startswith(("v_num_grad_steps", "context_", "mom2_n_tokens"))
        ]
        file = tmp_path / f"{method}.yaml"
        file.write_text(
            "\n".join([*lines_, "v_num_grad_steps: 3", f"context_{prefixes}", "mom2_n_tokens: 2000"])
        )
        given = {"limit": 5, "light": True, "mode": mode, "batch_size": 2, **changes}
        return BenchConfig(method, str(file), "twins_validation", **given)

    return make


def test_batches_are_taken_back(config, tmp_path):
    """Three batches of five facts: a line a case, scores after each batch, untouched facts among them, the
    model as before.
    """
    path = tmp_path / "run.jsonl"
    assert bench(config("MEMIT_MDM", "batch"), path) == 5
    header, *cases = lines(path)
    assert header["mode"] == "batch"
    assert header["batches"]["size"] == 2
    assert [case["batch"] for case in cases] == [0, 0, 1, 1, 2]
    assert all("post" in case and "locality_kept" in case["post"] for case in cases)
    watched = list(read_batches(path))
    assert [w["batch"] for w in watched] == [0, 1, 2]
    assert [len(w["last"]["exact"]) for w in watched] == [2, 2, 1]
    assert all("first" not in w for w in watched), "a batch that was taken back is not asked for"
    assert all(len(w["untouched"]["kept"]) == len(header["batches"]["untouched"]) > 10 for w in watched)
    edited = {case["subject"] for case in cases}
    assert len(edited) > 1
    assert summary(read_run(path))["measures"]["success"]["n"] == 5
    assert not edits_folder(path).exists()


@pytest.mark.parametrize(
    ("method", "mode"), [("MEMIT_MDM", "sequential"), ("AlphaEdit_MDM", "sequential"), ("MEMIT_MDM", "batch")]
)
@pytest.mark.end_to_end
def test_killed_in_the_middle(config, tmp_path, monkeypatch, method, mode):
    """After a kill in the second batch the resumed run is the uninterrupted one; finished batches are not
    made again.
    """
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    bench(config(method, mode), whole)
    real, calls = batches.append_line, []

    def killed(stream, path, line):
        calls.append(path)
        if len(calls) == 4:  # the second batch's edits are kept and its scores written, its cases not
            raise KeyboardInterrupt
        real(stream, path, line)

    monkeypatch.setattr(batches, "append_line", killed)
    with pytest.raises(KeyboardInterrupt):
        bench(config(method, mode), cut)
    assert len(lines(cut)) == 1 + 2
    monkeypatch.setattr(batches, "append_line", real)
    made = []
    edit = batches.edit_and_keep
    monkeypatch.setattr(
        batches, "edit_and_keep", lambda m, group, folder: made.append(len(group)) or edit(m, group, folder)
    )
    bench(config(method, mode), cut, resume=True)
    assert made == [2, 1]
    assert lines(cut) == alike(lines(whole))
    assert lines(batches_file(cut)) == alike(lines(batches_file(whole)))
    with monkeypatch.context() as patch:  # a finished run is not touched: nothing edited, nothing put back
        patch.setattr(batches, "put_back", None)
        patch.setattr(batches, "_written", None)
        bench(config(method, mode), cut, resume=True)
    if mode == "sequential":
        assert [w["edited"] for w in read_batches(cut)] == [2, 4, 5]
        assert all(len(w["first"]["exact"]) == 2 for w in read_batches(cut))


def test_resumed_edits_take_the_unedited_models_part(config, tmp_path, monkeypatch):
    """Context prefixes that the model writes, and second moments, are the unedited model's after a kill too,
    although the model carries edits when the run goes on.
    """
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    asked = config("MEMIT_MDM", "sequential", "template_length_params: [[4, 1]]", limit=2, batch_size=1)
    bench(asked, whole)
    kept = sorted((tmp_path / "cache").glob("mom2-*"))
    cut.write_text("".join(whole.read_text().splitlines(keepends=True)[:2]))
    first = batches_file(whole).read_text().splitlines(keepends=True)[:1]
    batches_file(cut).write_text("".join(first))
    shutil.copytree(edits_folder(whole) / "00000", edits_folder(cut) / "00000")
    bench(asked, cut, resume=True)
    assert lines(cut) == alike(lines(whole))
    assert sorted((tmp_path / "cache").glob("mom2-*")) == kept, "no second moments of an edited model"


def test_one_fact_at_a_time_in_sequence(config, tmp_path):
    """ROME_MDM edits one fact after another; `batch` is refused for it, with what to do."""
    path = tmp_path / "run.jsonl"
    bench(config("ROME_MDM", "sequential", batch_size=None, limit=2), path)
    assert [case["batch"] for case in lines(path)[1:]] == [0, 1]
    assert len(list(edits_folder(path).iterdir())) == 2
    with pytest.raises(HyperParameterError, match="writes one fact at a time"):
        bench(config("ROME_MDM", "batch"), tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "bacth"], "'bacth' is not one of"),
        (["--batch-size", "2"], "add --mode batch or --mode sequential"),
        (["--mode", "batch", "--batch-size", "0"], "at least 1"),
    ],
)
def test_modes_that_make_no_sense(tmp_path, capsys, arguments, message):
    """One line with the value, before a model is loaded."""
    out = ["--out", str(tmp_path / "x.jsonl")]
    asked = [
        "bench",
        "--alg",
        "MEMIT_MDM",
        "--hparams",
        "MEMIT_MDM/twin-llama",
        "--dataset",
        "twins_validation",
    ]
    assert main([*asked, *out, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "x.jsonl").exists()


def test_two_writers(config, tmp_path):
    """A second run with the same file is refused, and names the first; the file is the first one's alone."""
    from easyedit_mdm.common.locks import only_writer

    path = tmp_path / "run.jsonl"
    with only_writer(path), pytest.raises(FileError, match=r"is being written by process \d+"):
        bench(config("MEMIT_MDM", "batch"), path)
    assert not path.exists()
    bench(config("MEMIT_MDM", "batch", limit=2), path)


@pytest.mark.end_to_end
def test_a_file_of_batches_that_does_not_fit(config, tmp_path):
    """Lines are missing from NAME.batches.jsonl: said, and nothing is overwritten."""
    path = tmp_path / "run.jsonl"
    bench(config("MEMIT_MDM", "batch"), path)
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:3]))
    batches_file(path).write_text("")
    with pytest.raises(DataError, match="start another run"):
        bench(config("MEMIT_MDM", "batch"), path, resume=True)
    assert json.loads(path.read_text().splitlines()[0])["mode"] == "batch"


def asked(out, *more: str) -> list[str]:
    """A bench of EasyEdit-shaped requests through the command line."""
    return [
        "bench",
        "--alg",
        "ROME_MDM",
        "--hparams",
        "ROME_MDM/twin-llama",
        "--light",
        "--out",
        str(out),
        *more,
    ]


def test_the_end_says_what_came_out(tmp_path, capsys, world):
    """Figures with intervals, the file and the next command; a record that cannot be used has a line and a
    status.
    """
    fact = next(iter(world.all_facts()))
    good = {"prompt": fact.prompt(), "subject": fact.subject, "target_new": "red"}
    (tmp_path / "mine.json").write_text(json.dumps([good, {**good, "subject": "Nobody At All"}]))
    data = ["--dataset", "requests", "--data-file", str(tmp_path / "mine.json")]
    assert main(asked(tmp_path / "run.jsonl", *data)) == 1
    told = capsys.readouterr()
    assert "1 cases, 1 subjects, 0 failed" in told.out
    assert "next: easyedit-mdm compare" in told.out
    assert "was skipped" in told.err
    assert main(asked(tmp_path / "run.jsonl", *data, "--resume", "--allow-skipped")) == 0


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    """One line with the command that goes on, no traceback, status 130."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "load_cases", interrupted)
    out = tmp_path / "a run.jsonl"
    assert main(asked(out, "--dataset", "twins_validation", "--limit", "1")) == 130
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("easyedit-mdm:")]
    assert line.endswith(f"--out '{out}' --dataset twins_validation --limit 1 --resume")
