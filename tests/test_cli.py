"""The command line as a user types it: statistics, two runs, a report of them."""

from __future__ import annotations

import json

import pytest
from test_edits import quick_file

from easyedit_mdm.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, so that nothing is found ready."""
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_statistics_are_made_once_and_told(tmp_path, cache, capsys):
    """`stats` writes one file a layer and its figures; asked again, it finds them."""
    asked = ["stats", "--model", "twin-llada", "--dataset", "twins", "--layers", "0-1", "--tokens", "1500", "--json", str(tmp_path / "s.json")]
    assert main(asked) == 0
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    assert len(files) == 2
    figures = json.loads((tmp_path / "s.json").read_text())
    assert {layer: figures["layers"][layer]["tokens"] for layer in figures["layers"]} == {"0": 1500, "1": 1500}
    assert main(asked) == 0
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")} == files
    assert "effective rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--layers", "9-3"], "layers '9-3': give numbers"),
        (["--layers", "77"], "layer 77 does not exist"),
        (["--dataset", "/no/such.txt"], "/no/such.txt"),
        (["--mask-ratio", "half"], "mask ratio 'half'"),
    ],
)
def test_statistics_bad_input(changed, message, capsys):
    """Exit status 2 and a message that holds the value."""
    given = {"--model": "twin-llada", "--dataset": "twins", "--layers": "0", changed[0]: changed[1]}
    assert main(["stats", *(word for pair in given.items() for word in pair)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("easyedit-mdm: ") and message in told.err and told.out == ""


def test_bench_and_compare(tmp_path, capsys):
    """Two methods on the same cases; each line is a case, in order; the report names both; a finished file is not overwritten."""
    for alg, more in (("ROME_MDM", {}), ("MEMIT_MDM", {"mom2_adjustment": True, "mom2_n_tokens": 1500})):
        (tmp_path / alg).mkdir()
        file = quick_file(tmp_path / alg, f"{alg}/twin-llada", **{"v_num_grad_steps": 3, **more})
        asked = ["bench", "--alg", alg, "--hparams", file, "--dataset", "twins", "--limit", "2", "--light"]
        asked += ["--out", str(tmp_path / f"{alg}.jsonl")]
        assert main(asked) == 0
    lines = [json.loads(line) for line in (tmp_path / "ROME_MDM.jsonl").read_text().splitlines()]
    assert lines[0]["header"] and len(lines) == 3 and all("multi_step" in line["post"] for line in lines[1:])
    assert main(asked) == 2 and "exists" in capsys.readouterr().err
    whole = (tmp_path / "MEMIT_MDM.jsonl").read_bytes()
    assert main([*asked, "--resume"]) == 0 and (tmp_path / "MEMIT_MDM.jsonl").read_bytes() == whole
    assert main(["compare", str(tmp_path / "ROME_MDM.jsonl"), str(tmp_path / "MEMIT_MDM.jsonl"), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [run["cases"] for run in report["runs"]] == [2, 2] and report["pairs"][0]["shared"] == 2
    assert "twin-llada MEMIT_MDM" in (tmp_path / "report" / "report.html").read_text()
