"""Files of earlier versions stay readable: one edit and one run file of each are kept in tests/data."""

from __future__ import annotations

from pathlib import Path

import pytest

from easyedit_mdm import Edit, score_prompts
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.closing import summary_lines
from easyedit_mdm.report.compare import compare

VERSIONS = ["0.1"]
DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("version", VERSIONS)
def test_an_edit_of_an_earlier_version(twin_llada, version):
    """It loads, goes onto the model that it was made for, writes its fact, and comes off again."""
    edit = Edit.load(DATA / version / "edit")
    (fact,) = edit.card["facts"]
    edit.apply(twin_llada)
    try:
        (score,) = score_prompts(twin_llada, [fact["prompt"]], [fact["target_new"]])
        assert score["exact"] and edit.is_applied(twin_llada)
    finally:
        edit.revert(twin_llada)
    assert edit.card["versions"]["easyedit_mdm"].startswith(version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_file_of_an_earlier_version(version, tmp_path):
    """Its cases are read, summed up and compared."""
    path = DATA / version / "run.jsonl"
    run = read_run(path)
    assert run.header["version"].startswith(version) and len(run.cases) == 2
    for case in run.cases:
        assert case["post"]["multi_step"]["rewrite"]["exact"] in (True, False)
        assert "any_order" in case["post"]["ladder"], "its name in 0.1 was teacher_forced"
    assert summary_lines(path, 20)[0].startswith("2 cases")
    compare([str(path)], str(tmp_path / "report"))
    assert (tmp_path / "report" / "report.html").exists()
