"""`easyedit-mdm trace` and `easyedit-mdm sweep`: numbers, files, and the pages as a reader opens them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from easyedit_mdm.cli import main
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.hparams import find_hparams
from easyedit_mdm.errors import DataError, HyperParameterError
from easyedit_mdm.models.prompts import encode
from easyedit_mdm.runs import run as running
from easyedit_mdm.runs.run import BenchConfig
from easyedit_mdm.runs.sweep import SweepJob, layer_choices, prediction, ranked, score, sweep
from easyedit_mdm.tracing import TraceConfig
from easyedit_mdm.tracing.averages import (
    averages,
    band,
    correlation,
    peaks,
    ranges,
    rank_correlation,
    side_by_side,
    totals,
)
from easyedit_mdm.tracing.job import TraceJob, read_trace, trace
from easyedit_mdm.twins.benchmark import split_facts

QUICK = TraceConfig(samples=2)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Statistics and kept evaluations stay in the test's folder."""
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory, world) -> tuple[Path, dict]:
    """Two twins traced side by side on two facts of two tokens, from a file that also holds facts nobody
    knows.
    """
    folder = tmp_path_factory.mktemp("trace")
    known = [
        {"prompt": f.prompt(), "subject": f.subject, "attribute": f.object}
        for f in split_facts(world)["test"]
        if f.length == 2
    ][:2]
    evil = {
        "prompt": f"{known[0]['prompt']} <script>document.body.id='pwned'</script>",
        "subject": known[0]["subject"],
        "attribute": "<img src=x>",
    }
    (folder / "known.json").write_text(json.dumps([*known, evil, {"prompt": "no subject"}]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("easyedit_mdm.tracing.job.SHOWN", 1)  # drawing is what takes time
        report = trace(
            TraceJob(["twin-llada", "twin-llama"], known=str(folder / "known.json")),
            folder / "out",
            QUICK,
            resamples=100,
        )
    return folder / "out", report


def test_experts_of_a_mixture(compared, tiny, tokenizer, tmp_path):
    """Through which experts the subject's last token goes, in the JSON and on the page; dense layers have
    none, and neither have dense models.
    """
    assert "experts" not in compared[1]["models"][0]["facts"][0]
    assert 'id="experts"' not in (compared[0] / "trace.html").read_text()
    base = tmp_path / "model"
    shutil.copytree(tiny.folder("llada2"), base)
    tokenizer.save_pretrained(base)
    job = TraceJob([str(base)], prompt="The river of Ann is", subject="Ann")
    report = trace(job, tmp_path / "out", QUICK, resamples=20)
    (found,) = json.loads((tmp_path / "out" / "trace.json").read_text())["models"][0]["facts"]
    assert found == report["models"][0]["facts"][0] and list(found["experts"]) == ["1", "2"]
    model = tiny("llada2")
    row = torch.tensor([[*encode(model, found["prompt"]), model.ids.mask]])
    last = found["classes"].index("subject_last")
    for layer, through in found["experts"].items():
        weights, numbers = (part[0, last].tolist() for part in model.routes(int(layer), row))
        assert {one["expert"]: one["weight"] for one in through} == pytest.approx(
            dict(zip(numbers, weights)), abs=1e-4
        )
        assert [one["weight"] for one in through] == sorted((o["weight"] for o in through), reverse=True)
    page = (tmp_path / "out" / "trace.html").read_text()
    first = found["experts"]["1"][0]
    assert 'id="experts"' in page and f"{first['expert']} ({first['weight']:.2f})" in page


def rendered(page: Path, folder: Path) -> str:
    """The page's DOM by headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("neither chromium nor chromium-browser is on the PATH")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}",
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


# ---- numbers -----------------------------------------------------------------------------------------------


def fact(subject: str, effect: list[list[float]], k: int = 0) -> dict:
    """A record with one state whose effects are `effect` (layers x 3 tokens) for every kind."""
    table = {"probability": effect, "log_probability": effect}
    runs = {"probability": 0.9, "log_probability": -0.1}, {"probability": 0.1, "log_probability": -2.0}
    state = {
        "k": k,
        "clean": runs[0],
        "corrupted": runs[1],
        "effects": {kind: table for kind in ("hidden", "mlp", "attention")},
    }
    joint = {"method": "causal", "clean": -0.1, "corrupted": -2.0}
    return {
        "subject": subject,
        "classes": ["subject_last", "further", "further"],
        "states": [state],
        "joint": joint,
    }


def test_averages_by_hand():
    """Mean over a class's tokens, then over facts; intervals by subject; groups of states apart."""
    facts = [
        fact("a", [[0.0, 0.2, 0.4], [0.8, 0.0, 0.0]]),
        fact("b", [[0.4, 0.0, 0.2], [0.4, 0.0, 0.0]]),
        fact("b", [[9.0] * 3, [9.0] * 3], k=1),
    ]
    found = averages(facts, resamples=50)
    table = found["none"]["mlp"]["probability"]
    assert (
        table["subject_last"]["mean"] == [0.2, 0.6]
        and table["further"]["mean"] == [0.2, 0.0]
        and "last" not in table
    )
    assert (table["further"]["n"], table["further"]["subjects"]) == (2, 2) and table["subject_last"]["low"][
        1
    ] == 0.4
    assert (
        found["some"]["mlp"]["probability"]["further"]["mean"] == [9.0, 9.0]
        and "final_log_probability" not in found["none"]["mlp"]
    )
    (row,) = [
        r for r in peaks(found) if (r["group"], r["kind"], r["class"]) == ("none", "hidden", "subject_last")
    ]
    assert (row["layer"], row["effect"], row["band"], row["n"]) == (1, 0.6, [1], 2)
    total = totals(facts, resamples=50)
    assert (
        total["none"]["probability"]["clean"]["mean"] == 0.9 and total["joint"]["corrupted"]["mean"] == -2.0
    )


def test_bands_and_correlations():
    """Half of the largest effect; Pearson over depth whatever the numbers of layers; Spearman with ties."""
    assert band([0.1, 0.5, 1.0, 0.4]) == [1, 2] and band([-1.0, 0.0]) == []
    assert ranges([0, 1, 2, 5]) == "0-2, 5" and ranges([3]) == "3" and ranges([]) == "none"
    assert (
        correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == 1.0
        and correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    )
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 10.0, 100.0], [3.0, 2.0, 1.0]) == -1.0
    assert rank_correlation([1.0, 2.0, 2.0, 3.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(
        np.corrcoef([0, 1.5, 1.5, 3], [0, 2, 1, 3])[0, 1], abs=1e-4
    )

    def model(profile: list[float]) -> dict:
        """A model whose every kind has this profile."""
        return {
            "averages": {
                "none": {
                    kind: {"probability": {"subject_last": {"mean": profile}}}
                    for kind in ("hidden", "mlp", "attention")
                }
            }
        }

    rows = side_by_side(
        ["a", "b"], [model([0.0, 1.0, 1.0, 0.0]), model([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])]
    )
    assert [r["kind"] for r in rows] == ["hidden", "mlp", "attention"]
    assert (
        rows[0]["bands"] == [[1, 2], [2, 3, 4, 5]]
        and rows[0]["overlap"] == 1.0
        and rows[0]["correlation"] > 0.8
    )
    assert (
        side_by_side(["a", "b"], [model([1.0, 0.0, 0.0, 0.0]), model([0.0, 0.0, 0.0, 1.0])])[0]["overlap"]
        == 0
    )


# ---- the report --------------------------------------------------------------------------------------------


def test_side_by_side(compared):
    """Both models on the facts that both know, which are counted; whoever is not known is named; JSON and
    return value agree.
    """
    folder, report = compared
    assert json.loads((folder / "trace.json").read_text()) == report
    checked = report["checked"]
    assert (
        checked["asked"] == 3
        and checked["known"] == {"twin-llada": 2, "twin-llama": 2}
        and checked["known_by_all"] == 2
    )
    assert checked["unknown"][0]["answer"] == "<img src=x>" and report["facts"]["skipped"][0]["record"] == 3
    masked, causal = report["models"]
    assert [f["prompt"] for f in masked["facts"]] == [f["prompt"] for f in causal["facts"]]
    assert masked["averages"]["none"]["hidden"]["final_log_probability"]["slots"]["n"] == 2 and set(
        causal["averages"]
    ) == {"none"}
    assert (
        set(masked["averages"]) == {"none", "some"}
        and masked["averages"]["some"]["mlp"]["probability"]["last"]["n"] == 2
    )
    assert (
        masked["totals"]["none"]["probability"]["clean"]["mean"]
        > masked["totals"]["none"]["probability"]["corrupted"]["mean"]
    )
    assert masked["forwards_a_fact"] == sum(f["forwards"] for f in masked["facts"]) / 2 > 2 * 24
    assert [p["kind"] for p in report["pairs"]] == ["hidden", "mlp", "attention"]
    assert {p.stem for p in folder.glob("*.svg")} >= {
        "average",
        "side-by-side",
        "temporal",
        "average-revealed",
        "fact-1-twin-llada",
    }
    assert {p.stem for p in folder.glob("*.svg")} == {p.stem for p in folder.glob("*.png")}
    for path in folder.glob("*.svg"):
        assert "#0a0b" not in path.read_text(), "the page's colours in a file of its own"


def test_page_in_a_browser(compared, tmp_path):
    """Self-contained, with every figure inline in the page's own colours; markup in data stays text."""
    folder, report = compared
    text = (folder / "trace.html").read_text()
    for word in ("http", "@import", "src=", "<link", "#0a0b", "#0102"):
        assert word not in text.replace("&lt;img src=x&gt;", ""), word
    assert "prefers-color-scheme: dark" in text and "var(--series-3)" in text
    dom = rendered(folder / "trace.html", tmp_path / "browser")
    assert dom.count("<svg") == 1 + 4 + 2, "side by side, four averages, a fact on each of two models"
    assert "Temporal indirect effect" in dom and "Asked" not in dom and "3 asked" in dom
    assert '<body id="pwned"' not in dom and "&lt;img src=x&gt;" in dom


@pytest.mark.end_to_end
def test_trace_of_one_prompt(world, tmp_path, capsys):
    """From the command line: the model's own answer, masks for the subject, one random slot revealed."""
    known = next(f for f in split_facts(world)["test"] if f.length == 2)
    arguments = [
        "--prompt",
        known.prompt().replace(known.subject, "{}"),
        "--subject",
        known.subject,
        "--answer-tokens",
        "2",
        "--corrupt",
        "mask",
    ]
    more = ["--revealed", "0", "1", "--reveal", "random", "--window", "3", "--max-rows", "32", "--seed", "4"]
    assert main(["trace", "--model", "twin-llada", *arguments, *more, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "trace.json").read_text())
    (model,) = report["models"]
    (found,) = model["facts"]
    assert (
        found["answer"] == known.object
        and found["samples"] == 1
        and model["window"] == 3
        and [s["k"] for s in found["states"]] == [0, 1]
    )
    assert report["config"] == TraceConfig("mask", 3.0, 10, 3, (0, 1), "random", 32, 4).record() | {
        "revealed": [0, 1]
    }
    told = capsys.readouterr().out
    assert "twin-llada knows 1" in told and "forward passes a fact" in told and "trace.html" in told


def test_traces_belong_to_their_model(compared, twin_llada, tmp_path):
    """A trace is found by the model's weights."""
    folder, _ = compared
    assert read_trace(folder / "trace.json", twin_llada)["name"] == "twin-llada"
    only = json.loads((folder / "trace.json").read_text())
    only["models"] = only["models"][1:]
    (tmp_path / "other.json").write_text(json.dumps(only))
    with pytest.raises(DataError, match="holds traces of twin-llama, but none of the weights of twin-llada"):
        read_trace(tmp_path / "other.json", twin_llada)
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(DataError, match="cannot be read as a trace"):
        read_trace(tmp_path / "no.json", twin_llada)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "A is", "--known", "f.json"], "two sources"),
        (["--prompt", "A is"], "no subject"),
        (["--subject", "A"], "give --prompt"),
        (["--limit", "0"], "--limit 0"),
        (["--compare", "twin-llada", "twin-llama", "--prompt", "A is", "--subject", "A"], "give --target"),
        (["--corrupt", "mask", "--model", "twin-llama", "--limit", "1"], "needs a mask token"),
        (["--prompt", "A is", "--subject", "B", "--target", "x"], "not in prompt"),
        (["--known", "there-is-none.json"], "cannot be read"),
    ],
)
def test_wrong_calls(arguments, says, tmp_path, capsys):
    """One message on stderr and status 2; nothing is written."""
    assert main(["trace", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- the sweep ---------------------------------------------------------------------------------------------


def hparams(alg: str, **changes):
    """A twin's hyperparameters of a method."""
    own = {"mom2_dataset": "twins", "mom2_adjustment": True}
    return METHODS[alg].hparams.from_dict(
        {"alg_name": alg, "model_name": "m", "layers": [0], **own, **changes}
    )


def test_layer_choices():
    """Every layer; for batched methods windows too; only contiguous ones, of layers that exist."""
    assert layer_choices(3, hparams("ROME_MDM")) == [[0], [1], [2]]
    assert layer_choices(5, hparams("MEMIT_MDM")) == [[0], [1], [2], [3], [4], [0, 1, 2, 3], [1, 2, 3, 4]]
    assert layer_choices(8, hparams("MEMIT_MDM"), [1, 2, 5, 6], [2]) == [[1, 2], [5, 6]]
    for layers, windows, says in (
        ([9], None, "do not exist"),
        (None, [2], "ROME_MDM edits one layer"),
        ([0, 2], [1, 0], "windows of"),
    ):
        with pytest.raises(HyperParameterError, match=says):
            layer_choices(8, hparams("ROME_MDM"), layers, windows)
    with pytest.raises(HyperParameterError, match="no window"):
        layer_choices(8, hparams("MEMIT_MDM"), [0, 2], [2])


def setting(layers: list[int], success: float, paraphrase: float, locality: float) -> dict:
    """A setting of a sweep."""
    measures = {
        name: {"mean": value}
        for name, value in (("success", success), ("rephrase_exact", paraphrase), ("locality_kept", locality))
    }
    return {"layers": layers, "measures": measures, "score": score(measures)}


def test_ranking_and_prediction():
    """Harmonic mean first, then success, then fewer and lower layers; a trace that follows the score
    foretells it.
    """
    assert (
        score({"a": {"mean": 1.0}, "b": {"mean": 0.5}}) == pytest.approx(2 / 3, abs=1e-6)
        and score({"a": {"mean": 0.0}, "b": {"mean": 1.0}}) == 0
    )
    half = [setting(layers, 0.5, 0.5, 0.5) for layers in ([3], [0, 1], [0])]
    settings = [*half, setting([1], 1.0, 0.8, 0.9), setting([2], 1.0, 0.0, 1.0)]
    best = ranked(settings)
    assert [s["layers"] for s in best] == [[1], [0], [3], [0, 1], [2]] and [s["rank"] for s in best] == [
        1,
        2,
        3,
        4,
        5,
    ]
    table = {"probability": {"subject_last": {"mean": [0.3, 0.9, 0.1, 0.3]}}}
    rows = prediction(best, {"averages": {"none": {kind: table for kind in ("hidden", "mlp", "attention")}}})
    told = [
        (r["width"], r["traced_best"], r["its_rank"], r["with_score"]) for r in rows if r["kind"] == "mlp"
    ]
    assert told == [(1, [1], 1, 1.0), (2, [0, 1], 1, None)]


def test_ranking_where_no_case_was_scored():
    """A setting at which every case failed has no mean: it comes last, and stops nothing."""
    failed = setting([0], 0.5, 0.5, 0.5)
    failed["measures"] = {name: {"mean": None} for name in failed["measures"]}
    failed["score"] = score(failed["measures"])
    best = ranked([failed, setting([1], 0.5, 0.5, 0.5)])
    assert [s["layers"] for s in best] == [[1], [0]] and best[1]["score"] == 0


@pytest.fixture
def quick(tmp_path):
    """Hyperparameter files with few optimiser steps and small statistics."""

    def make(alg: str) -> str:
        """Path of the file."""
        text = (
            find_hparams(f"{alg}/twin-llama")
            .read_text()
            .replace("v_num_grad_steps: 50", "v_num_grad_steps: 3")
            .replace("10240", "2048")
        )
        (tmp_path / f"{alg}.yaml").write_text(text)
        return str(tmp_path / f"{alg}.yaml")

    return make


@pytest.mark.end_to_end
def test_sweep(quick, compared, tmp_path, capsys, monkeypatch):
    """Every layer ranked beside the trace, the YAML line printed; what is finished is not run again."""
    arguments = [
        "sweep",
        "--alg",
        "ROME_MDM",
        "--hparams",
        quick("ROME_MDM"),
        "--limit",
        "2",
        "--layers",
        "0-2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--trace", str(compared[0] / "trace.json")]) == 0
    report = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert sorted(s["layers"] for s in report["settings"]) == [[0], [1], [2]] and all(
        s["failed"] == 0 for s in report["settings"]
    )
    assert (
        report["chosen"] == f"layers: {report['settings'][0]['layers']}"
        and report["trace"]["name"] == "twin-llama"
    )
    assert "facts" not in report["trace"]  # averages: the texts belong to the data they came from
    assert [r["windows"] for r in report["prediction"]] == [3, 3, 3]
    assert report["chosen"] in capsys.readouterr().out.splitlines()
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert page.count("<svg") == 1 and report["chosen"] in page and "http" not in page and "#0a0b" not in page
    assert (tmp_path / "out" / "sweep.png").exists() and len(list((tmp_path / "out" / "runs").iterdir())) == 3
    monkeypatch.setattr(running, "run_case", lambda *a: pytest.fail("a finished setting was run again"))
    same = BenchConfig("ROME_MDM", quick("ROME_MDM"), "twins_validation", limit=2, light=True)
    again = sweep(SweepJob(same, [0, 1, 2], trace_limit=1), tmp_path / "out")
    assert again["settings"] == report["settings"] and len(again["trace"]["facts"]) == 1, (
        "traced anew, on the cases' own facts"
    )


def test_sweep_of_windows(quick, tmp_path, capsys):
    """MEMIT_MDM in windows of two layers, one panel a width; a file of cases without true answers has no
    trace, and says so.
    """
    cases = [
        {"prompt": "Danielle Darrieux was born in", "subject": "Danielle Darrieux", "target_new": "red river"}
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    config = BenchConfig(
        "MEMIT_MDM", quick("MEMIT_MDM"), "requests", data_file=str(tmp_path / "cases.json"), light=True
    )
    report = sweep(SweepJob(config, [3, 4], [1, 2]), tmp_path / "out")
    assert sorted(s["layers"] for s in report["settings"]) == [[3], [3, 4], [4]] and set(
        report["settings"][0]["measures"]
    ) == {"success"}
    assert (
        report["trace"] is None
        and report["prediction"] == []
        and "no trace beside it" in capsys.readouterr().out
    )
    assert {p.name for p in (tmp_path / "out" / "runs").iterdir()} == {
        "layers-3.jsonl",
        "layers-4.jsonl",
        "layers-3-4.jsonl",
    }
