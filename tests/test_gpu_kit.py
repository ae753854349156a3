"""benchmarks/gpu: the kit for a GPU, on a tiny shape; and the tables of benchmarks/floor.py."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
OWN = (
    "kit", "measures", "shapes", "page", "floor", "edit_speed", "growth", "large", "many_facts", "speed_page",
)  # fmt: skip
PARTS = ["statistics", "edits", "decoding", "profile", "error"]


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/ or benchmarks/gpu/ as a module, by name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    for name in OWN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in OWN:
        sys.modules.pop(name, None)


def run(kit: ModuleType, out: Path, *more: str) -> dict:
    given = ["--device", "cpu", "--shape", "tiny-llada", "--facts", "1", "2", "--steps", "3"]
    folder = kit.main([*given, "--out", str(out), *more])
    return json.loads((folder / "kit.json").read_text())


def test_the_committed_page_of_a_gpu_comes_from_its_figures(script):
    """kit.md from kit.json, and the run was whole."""
    folder = ROOT / "benchmarks" / "gpu" / "h100"
    found = json.loads((folder / "kit.json").read_text())
    assert (folder / "kit.md").read_text() == script("page").page(found).rstrip("\n") + "\n"
    assert found["finished"] and "H100" in found["device"] and found["edits"]


@pytest.mark.end_to_end
def test_every_part_of_the_kit(script, tmp_path):
    """A tiny shape, every arm: what is measured, and the page."""
    found = run(script("kit"), tmp_path, "--minutes", "60", "--parts", *PARTS)
    assert found["finished"]
    assert found["left_out"] == []
    assert set(PARTS) | {"models"} <= set(found)
    arms = {(r["method"], r["states"], r["stop"], r["facts"]) for r in found["edits"]}
    assert arms == {
        (method, states, stop, facts)
        for method, aware in (("ROME_MDM", "enumerate"), ("MEMIT_MDM", "spread"))
        for states in ("full_mask", aware)
        for stop in ("fixed", "early")
        for facts in (1, 2)
    }
    assert all(r["steps"] == 2 for r in found["edits"] if r["stop"] == "fixed")
    assert all(r["seconds"] > 0 and r["peak_bytes"] > r["predicted_bytes"] > 0 for r in found["edits"])
    (statistics,), (error,), (profile,) = found["statistics"], found["error"], found["profile"]
    assert statistics["layers"] == [0, 1, 2, 3]
    per_million = 1e6 / statistics["tokens_per_second"] + statistics["fixed_seconds"]
    assert statistics["seconds_per_million"] == pytest.approx(per_million)
    assert [r["prompts"] for r in found["decoding"]] == [1, 16]
    assert 0 < error["update"] < 0.3
    assert error["reverted"]
    assert profile["flops"] > 0
    assert any("mm" in o["name"] for o in profile["operations"])
    page = (tmp_path / "kit.md").read_text()
    assert "A rehearsal on a CPU" in page
    for title in ("Edits", "Second moments", "Decoding", "Memory", "bfloat16 against float32", "Where the"):
        assert f"## {title}" in page
    assert "## Left out" not in page


def test_what_does_not_fit_is_listed_and_what_fails_stops_nothing(script, tmp_path, monkeypatch):
    kit = script("kit")
    found = run(kit, tmp_path / "late", "--minutes", "0", "--parts", "edits", "error")
    assert [row["what"] for row in found["left_out"]] == [
        f"tiny-llada, {p}" for p in ("load", "edits", "error")
    ]
    assert "| tiny-llada, edits | the 0 minutes are over |" in (tmp_path / "late" / "kit.md").read_text()

    def broken(run, model):
        raise RuntimeError("no memory | left")

    def endless(run, model):
        with kit.stopped_at(kit.time.perf_counter() + 0.05, 9):
            while True:
                pass

    monkeypatch.setattr(kit, "PARTS", {**kit.PARTS, "decoding": broken, "profile": endless})
    found = run(kit, tmp_path / "broken", "--minutes", "60", "--parts", "decoding", "profile", "error")
    assert found["left_out"] == [
        {"what": "tiny-llada, decoding", "why": "failed: RuntimeError: no memory | left"},
        {
            "what": "tiny-llada, profile",
            "why": "failed: TimeoutError: the 9 minutes were over in the middle of it",
        },
    ]
    assert found["finished"]
    assert len(found["error"]) == 1


def test_fewer_facts_where_all_would_take_too_long(script, tmp_path):
    """256 facts of 0.5 s each have 60 s of nine minutes: 112 of them; of 5 s each, none."""
    script("kit")
    measures, left = script("measures"), []
    given = measures.Run(None, lambda what, why: left.append(what), "cpu", 9.0, [], 25, tmp_path, tmp_path)
    model = measures.Loaded(measures.SHAPES["tiny-llada"], None, None)

    def fit(each: float) -> int:
        given.ends = measures.time.perf_counter() + 500
        before = {"seconds_per_fact": each, "facts": 16, "states": "spread"}
        return measures._that_fit(given, model, ("MEMIT_MDM", False), 256, before)

    assert len({r["subject"] for r in script("shapes").requests_of(256)}) == 256
    assert [fit(each) for each in (0.1, 0.5, 5.0)] == [256, 112, 0]
    assert left == ["tiny-llada, MEMIT_MDM, spread, 256 facts"] * 2


def test_many_facts_are_not_taken_for_so_many_single_ones(script, tmp_path, monkeypatch):
    """One fact takes 2 s, sixteen at once hardly more: three steps of sixteen say so, and 256 are edited."""
    script("kit")
    measures, left, tried = script("measures"), [], []
    given = measures.Run(None, lambda what, why: left.append(what), "cpu", 9.0, [], 25, tmp_path, tmp_path)
    given.ends = measures.time.perf_counter() + 500
    model = measures.Loaded(measures.SHAPES["tiny-llada"], None, None)
    monkeypatch.setattr(measures, "edited", lambda adapter, requests, hparams: tried.append(len(requests)))
    before = {"seconds_per_fact": 2.0, "seconds": 2.0, "facts": 1, "states": "spread"}
    assert measures._that_fit(given, model, ("MEMIT_MDM", False), 256, before) == 256
    assert tried == [16] and not left


def test_the_committed_rehearsal_is_whole(script):
    """Its page comes from its JSON, and no part is absent."""
    folder = ROOT / "benchmarks" / "gpu" / "rehearsal-cpu-tiny"
    found = json.loads((folder / "kit.json").read_text())
    assert script("page").page(found) == (folder / "kit.md").read_text()
    assert found["finished"]
    assert set(found["parts"]) <= {*found, "easyedit"}
    assert any(row["method"] == "EasyEdit ROME" for row in found["edits"])
    assert found["left_out"] == []


def test_the_tables_of_the_floor_come_from_its_files(script):
    """docs/speed.md, and a floor that is a floor."""
    floor = script("floor")
    reports, page = floor.reports(), floor.PAGE.read_text()
    assert reports
    assert floor.written(page, floor.tables(reports)) == page
    for row in (row for report in reports for row in report["rows"]):
        assert 1 < row["optimisation_ratio"] < row["ratio"]
        assert row["padded"] >= 1
        assert sum(row["profile"]["groups"].values()) == pytest.approx(1)


def test_the_other_tables_of_the_page_come_from_their_files(script):
    """Growth, a model larger than the memory, thousands of facts; and what the page says of them."""
    made, text = script("speed_page"), script("speed_page").PAGE.read_text()
    assert made.page(text) == text
    for varied, rows in json.loads((made.ROOT / "benchmarks" / "growth.json").read_text()).items():
        assert script("growth").exponent(rows, varied, "seconds") < {"width": 2.0}.get(varied, 1.0) + 0.1
    assert made.large.table(large := json.loads((made.ROOT / "benchmarks" / "large.json").read_text()))
    for row in large:
        assert abs(row["peak_mb"] / (row["weights_mb"] + row["read_mb"] + row["activations_mb"]) - 1) < 0.15
    assert len({row["sha256"] for row in large}) == 2, "one edit for each layer, however the model is spread"
    many = json.loads((made.ROOT / "benchmarks" / "many_facts.json").read_text())
    flat = [row["peak_mb"] for row in many if row["facts"] >= 4000]
    assert len(flat) >= 2 and max(flat) < 1.05 * min(flat), "memory does not grow with the facts"
    assert len({row["sha256"] for row in many}) == len({row["facts"] for row in many}), "killed or not"
