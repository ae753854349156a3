"""benchmarks/every_way: README's tables are those of the committed runs, and a run goes on where it was
stopped.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from easyedit_mdm.twins.benchmark import cases

FOLDER = Path(__file__).parent.parent / "benchmarks" / "every_way"


@pytest.fixture(scope="module")
def study():
    """The script as a module."""
    sys.path.insert(0, str(FOLDER))
    others = sys.modules.pop("study", None)
    try:
        yield importlib.import_module("study")
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("study", None)
        if others is not None:
            sys.modules["study"] = others


def test_the_tables_are_those_of_the_runs(study):
    """README holds what `tables` writes."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    made = {
        "verdicts": study.verdicts(),
        "run": study.table("run"),
        "lengths": study.by_length(),
        "tries": study.table("tries"),
    }
    for name, rows in made.items():
        assert text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0] == rows, name


def test_the_facts(study, world):
    """One edit a subject, all lengths, none of them an edit of benchmarks/multi_token."""
    earlier = {
        (c.fact.subject, c.fact.relation.name) for s in ("test", "validation") for c in cases(world, s)
    }
    seen = set()
    for split, number in study.SUBJECTS.values():
        some = study.chosen_facts(world, split, number)
        assert len(some) == number == len({c.fact.subject for c in some})
        assert {c.length for c in some} == set(range(1, 9))
        pairs = {(c.fact.subject, c.fact.relation.name) for c in some}
        assert not pairs & earlier and not pairs & seen
        assert all(c.target != c.fact.object for c in some)
        seen |= pairs


@pytest.mark.parametrize("name", ["twin-llada", "twin-llama"])
def test_a_run_goes_on(study, name, tmp_path, monkeypatch, capsys):
    """Cut off within a line it makes what is missing, and the same as without the interruption."""
    monkeypatch.setitem(study.SUBJECTS, "run", ("test", 2))
    arguments = ["study.py", "run", "--model", name, "--methods", "MEMIT_MDM", "--arms", "shipped", "open"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path)])
    study.main()
    file = tmp_path / f"run-{name}.jsonl"
    whole = file.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert len(lines) == 1 + 2 * 2
    ways = study.WAYS if name == "twin-llada" else ("n_steps", "canvas")
    assert all(set(ways) <= set(line) for line in lines[1:])
    if name == "twin-llada":
        assert all(line["every_way"] == min(line[way] for way in ways) for line in lines[1:])
    file.write_text(whole[: int(len(whole) * 0.7)])
    study.main()

    def timeless(text: str) -> list[dict]:
        """Lines without what the clock says."""
        return [{k: v for k, v in json.loads(x).items() if k != "cpu_seconds"} for x in text.splitlines()]

    assert timeless(file.read_text()) == timeless(whole)
    file.write_text(json.dumps({"command": "run", "model": "another"}) + "\n")
    with pytest.raises(SystemExit, match="is a run of something else"):
        study.main()
