"""benchmarks/llada_8b.sh on a tiny checkpoint in LLaDA's format: every line of it, and what it writes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.data
@pytest.mark.end_to_end
def test_the_script_for_8b_models(tiny, tokenizer, data_dir, tmp_path):
    """Four facts in three arms, then the same command again: nothing is edited twice."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.folder("llada").iterdir():
        (model / file.name).symlink_to(file)
    tokenizer.save_pretrained(model)
    settings = {
        "alg_name": "ROME_MDM", "model_name": str(model), "layers": [1], "v_num_grad_steps": 1,
        "context_templates": ["{}"], "mom2_adjustment": False,
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings))
    out = tmp_path / "out"
    environment = {
        **os.environ, "DATA_DIR": str(data_dir),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MASKED": str(tmp_path / "tiny.yaml"), "EACH": "1", "OUT": str(out), "DEVICE": "cpu",
        "EASYEDIT_MDM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for _ in range(2):
        done = subprocess.run(
            [ROOT / "benchmarks" / "llada_8b.sh"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (out / "lines.jsonl").read_text().splitlines()]
        assert sorted(line["n_tokens"] for line in lines) == sorted([1, 2, 3, 4] * 2)
    assert {line["arm"] for line in lines} == {"plain x4", "spread x4"}
    assert "| spread x4, model | plain x4, model, one step |" in done.stdout
    kept = json.loads((out / "results.json").read_text())
    assert kept["facts"] == 4
    assert not {"subject", "text"} & set(kept["lines"][0])


def script(name: str):
    """A script of benchmarks/real_facts as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "real_facts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
        for module in ("study", "search"):  # other folders have scripts of these names
            sys.modules.pop(module, None)


def test_the_search_keeps_the_better_tries():
    """Each round keeps the tries that score best on the facts so far, for each way of decoding by itself.
    Nothing is said before a round is finished.
    """
    search = script("search")
    ranked = {"N steps": [3, 1, 4, 0, 5, 2, 6, 7], "one step": [7, 6, 5, 4, 3, 2, 1, 0]}  # the best first

    def line(tried: int, fact: int) -> dict:
        tokens, once = (1 - ranked[way].index(tried) / 10 for way in ("N steps", "one step"))
        after = {"tokens": tokens, "one_step_tokens": once, "locality": 1.0 if fact else None}
        return {"try": tried, "fact": fact, "loss": 0.1, "after": after}

    first = [line(tried, fact) for tried in range(8) for fact in range(3)]
    assert search.left(first[:-1], "N steps") == [list(range(8))]
    assert search.left(first, "N steps") == [list(range(8)), [3, 1, 4, 0]]
    more = first + [line(tried, fact) for tried in (7, 6, 5, 4) for fact in range(3, 9)]
    assert search.left(more, "one step") == [list(range(8)), [7, 6, 5, 4], [7, 6]]
    worse = [{**one, "after": {**one["after"], "locality": 0.1}} if one["try"] == 3 else one for one in first]
    assert search.left(worse, "N steps")[1] == [1, 4, 0, 5], "what is right counts by what is kept"
    alike = [{**one, "after": line(0, 1)["after"], "loss": 1 - one["try"] / 10} for one in first]
    assert search.left(alike, "N steps")[1] == [7, 6, 5, 4], "of two alike, the lower loss"


def test_a_run_goes_on_with_its_own_settings_alone(tmp_path):
    """A line that was not finished is cut off; other settings, and lines without settings, are refused."""
    study, out = script("study"), tmp_path / "run"
    out.mkdir()
    file = study.begun(out, {"seed": 3, "arms": {"plain": {"layers": [5]}}})
    file.write_text('{"arm": "plain", "after": {"a": 1}}\n{"arm": "aware", "after": {"a": 1}')
    assert study.read(file) == [{"arm": "plain", "after": {"a": 1}}]
    assert study.begun(out, {"seed": 3, "arms": {"plain": {"layers": [5]}}}) == file
    assert file.read_text() == '{"arm": "plain", "after": {"a": 1}}\n'
    for settings in ({"seed": 1, "arms": {"plain": {"layers": [5]}}}, {"seed": 3, "arms": {}}):
        with pytest.raises(SystemExit, match="other settings"):
            study.begun(out, settings)
    (out / "settings.json").unlink()
    with pytest.raises(SystemExit, match="not their settings"):
        study.begun(out, {"seed": 3})


def test_the_tables_of_real_facts_come_from_their_files(tmp_path):
    """results.md of every run, and the table in README, from results.json; no fact of a pilot came again."""
    folder = ROOT / "benchmarks" / "real_facts"
    study = script("study")
    seen: dict[Path, set] = {}
    for place in (p.parent for p in sorted(folder.rglob("results.json")) if p.parent.name != "search"):
        lines = study.lines_of(place / "results.json")
        seen[place] = {line["case_id"] for line in lines}
        text = (place / "results.md").read_text()
        assert text == study.page(rows := study.finished(lines), place)
        assert (place / re.search(r"What was run\]\(([^)]+)\)", text)[1]).exists()
        if place.name == study.IN_README:
            table = f"<!-- real-facts -->\n{study.short(rows)}<!-- /real-facts -->"
            assert table in (ROOT / "README.md").read_text()
    pilots = seen[folder / "pilots/first"] | seen[folder / "pilots/second"]
    assert not pilots & seen[folder / "third"]
    search = {line["case_id"] for line in study.lines_of(folder / "search" / "results.json")}
    assert search and not seen[folder / "fourth"] & (search | pilots | seen[folder / "third"])
    kept = [(folder / "search" / name).read_text() for name in ("chosen.json", "results.md")]
    script("search").choose(SimpleNamespace(committed=True, out=[], folder=tmp_path))
    assert [(tmp_path / name).read_text() for name in ("chosen.json", "results.md")] == kept
