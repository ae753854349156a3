"""The leaderboard: equal search, one table, killed and shared by processes without a run made twice."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import harmonic_mean

import pytest
from children import needs_processes, start

from easyedit_mdm.cli import main
from easyedit_mdm.common.yaml_files import find_hparams, read_yaml
from easyedit_mdm.editing import METHODS
from easyedit_mdm.errors import DataError, HyperParameterError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.leaderboard import MEASURES
from easyedit_mdm.report.summaries import case_figures
from easyedit_mdm.runs import leaderboard as module
from easyedit_mdm.runs.leaderboard import Suite, leaderboard, shipped

# methods that take no time: nothing is optimised, or hardly
QUICK = {"mom2_adjustment": False, "context_templates": ["{}"]}
SUITE = {
    "models": ["twin-llada"],
    "datasets": ["twins"],
    "search": {"dataset": "twins_validation", "facts": 1},
    "modes": {
        "single": {"mode": "each", "facts": 1},
        "batch": {"mode": "batch", "facts": 2, "batch_size": 2},
    },
    "methods": {
        "IKE_MDM": [{}, {"lead": "Prompt: "}],
        "GRACE_MDM": [{"n_iter": 1}, {"n_iter": 15}],
        "R-ROME_MDM": [{"v_num_grad_steps": 2, **QUICK}, {"v_num_grad_steps": 1, **QUICK}],
    },
}


def written(folder: Path, **changes) -> str:
    """A suite's file."""
    file = folder / "suite.yaml"
    file.write_text(json.dumps({**SUITE, **changes}))  # which is YAML
    return str(file)


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> tuple[Path, dict]:
    """A finished leaderboard, and what leaderboard.json holds."""
    folder = tmp_path_factory.mktemp("board")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYEDIT_MDM_CACHE", str(folder / "cache"))
        leaderboard(written(folder), folder / "out")
    return folder / "out", json.loads((folder / "out" / "leaderboard.json").read_text())


@pytest.mark.end_to_end
def test_every_method_is_in_the_table(board):
    """Each model, mode and method once; what a method cannot do is listed with the reason."""
    _, told = board
    rows = {(e["model"], e["mode"], e["method"]) for e in told["entries"]}
    assert len(rows) == len(told["entries"]) == 2 * 3 - 1
    assert {(one["method"], one["what"], one["why"]) for one in told["left_out"]} == {
        ("R-ROME_MDM", "twins, batch", "it writes one fact at a time")
    }
    masked = [e for e in told["entries"] if e["model"] == "twin-llada" and e["mode"] == "single"]
    assert all({"success", "locality_kept", "every_decoding"} <= set(e["measures"]) for e in masked)
    assert all(e["cost"]["edit_seconds"]["median"] > 0 for e in told["entries"])
    grace = next(e for e in masked if e["method"] == "GRACE_MDM")
    assert grace["cost"]["stored_bytes"]["median"] > 4 * (512 + 128), "a key and a value at least"


@pytest.mark.end_to_end
def test_the_board_so_far(board, tmp_path, monkeypatch):
    """Nothing is run: what is finished is in the table, a run that is missing or cut off is listed."""
    folder, whole = board
    shutil.copytree(folder, tmp_path / "out")
    runs = tmp_path / "out" / "runs"
    (runs / "twin-llada--IKE_MDM--twins--single.jsonl").unlink()
    cut = runs / "twin-llada--GRACE_MDM--twins--batch.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(module, "bench", None)  # a run would fail
    leaderboard(written(tmp_path), tmp_path / "out", so_far=True)
    told = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert {(one["method"], one["what"], one["why"]) for one in told["left_out"]} == {
        ("R-ROME_MDM", "twins, batch", "it writes one fact at a time"),
        ("IKE_MDM", "twins, single", "not finished"),
        ("GRACE_MDM", "twins, batch", "not finished"),
    }
    rows = {(e["mode"], e["method"]): e for e in whole["entries"]}
    assert len(told["entries"]) == len(rows) - 2
    assert all(rows[e["mode"], e["method"]] == e for e in told["entries"])


@pytest.mark.end_to_end
def test_the_better_setting_is_taken(board):
    """By the harmonic mean of success, paraphrase and locality on the search cases, the earlier of equals."""
    folder, told = board
    for method, tries in SUITE["methods"].items():
        scores = []
        for number in range(2):
            run = read_run(folder / "runs" / f"search--twin-llada--{method}--{number}.jsonl")
            assert run.header["dataset"]["name"] == "twins_validation"
            (figures,) = map(case_figures, run.cases)
            found = [
                figures[k]
                for k in ("success", "rephrase_exact", "locality_kept")
                if figures.get(k) is not None
            ]
            scores.append(harmonic_mean(found))
        chosen = {json.dumps(e["setting"], sort_keys=True) for e in told["entries"] if e["method"] == method}
        assert chosen == {json.dumps(tries[scores.index(max(scores))], sort_keys=True)}


def test_one_setting_is_not_searched_and_the_suite_names_the_text(tmp_path, monkeypatch):
    """The file that ships, with the suite's text in place of its own; a twin keeps its own."""
    (tmp_path / "words.txt").write_text("One line.\n")
    one = {"MEMIT_MDM": [{}]}
    changes = {"methods": one, "search": {}, "models": ["smollm2"], "text": "words.txt"}
    suite = Suite.read(written(tmp_path, **changes))
    place = module.Place(tmp_path / "out", str(tmp_path))
    monkeypatch.setattr(module, "bench", None)  # a run would fail
    for model, text in (("smollm2", str(tmp_path / "words.txt")), ("twin-llada", "twins")):
        base = read_yaml(find_hparams(f"MEMIT_MDM/{model}"))
        file = module._chosen(suite, place, model, "MEMIT_MDM", base)
        assert read_yaml(file) == {**base, "mom2_dataset": text}
    for data_dir in (None, str(tmp_path / "empty")):
        with pytest.raises(DataError, match="needs words.txt below --data-dir"):
            leaderboard(written(tmp_path, **changes), tmp_path / "new", data_dir)
    with pytest.raises(HyperParameterError, match="leave it out"):
        Suite.read(written(tmp_path, methods=one))
    with pytest.raises(HyperParameterError, match="search"):
        Suite.read(written(tmp_path, search={}))


@pytest.mark.end_to_end
def test_table_page_and_picture(board):
    """The same figures in each form."""
    folder, told = board
    rows = list(csv.DictReader((folder / "leaderboard.csv").open()))
    means = {(e["model"], e["mode"], e["method"]): e["measures"]["success"]["mean"] for e in told["entries"]}
    found = {
        (r["model"], r["mode"], r["method"]): float(r["mean"]) for r in rows if r["measure"] == "success"
    }
    assert found == pytest.approx(means)
    page, text = ((folder / f"leaderboard.{kind}").read_text() for kind in ("html", "md"))
    for title in ("twin-llada, twins, single", "Success by target length", "Not run", *MEASURES.values()):
        assert title in page and title in text
    assert (folder / "leaderboard.png").stat().st_size > 10_000 and "<svg" in page


@pytest.mark.end_to_end
def test_what_is_finished_is_not_run_again(board, monkeypatch):
    """Called again it only writes the page; a run that is missing is made, and no other."""
    folder, _ = board
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(folder.parent / "cache"))
    gone = folder / "runs" / "twin-llada--IKE_MDM--twins--single.jsonl"
    before = {p: p.read_bytes() for p in (folder / "runs").glob("*.jsonl")}
    edited = []
    with pytest.MonkeyPatch.context() as patch:
        real = METHODS["IKE_MDM"].make
        object.__setattr__(METHODS["IKE_MDM"], "make", lambda *a, **k: edited.append(1) or real(*a, **k))
        try:
            leaderboard(str(folder.parent / "suite.yaml"), folder)
            assert not edited
            gone.unlink()
            leaderboard(str(folder.parent / "suite.yaml"), folder)
        finally:
            object.__setattr__(METHODS["IKE_MDM"], "make", real)
        patch.undo()
    assert len(edited) == 1
    assert all(p.read_bytes() == data for p, data in before.items() if p != gone)


@pytest.mark.end_to_end
@needs_processes
def test_two_processes_share_the_work(tmp_path):
    """Both end, nothing is run twice, and the page is whole."""
    small = {"modes": {"single": {"mode": "each", "facts": 1}}, "models": ["twin-llama"]}
    small["methods"] = {name: SUITE["methods"][name] for name in ("IKE_MDM", "GRACE_MDM")}
    named = written(tmp_path, **small)
    environment = {"EASYEDIT_MDM_CACHE": str(tmp_path / "cache")}
    children = [start(leaderboard, named, tmp_path / "out", environment=environment) for _ in range(2)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    told = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert len(told["entries"]) == 2 and not told["left_out"]
    for file in (tmp_path / "out" / "runs").glob("*.jsonl"):
        assert len(file.read_text().splitlines()) == 2, "a header and one case"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": {"ROME_MDN": [{}]}}, "'ROME_MDN' is no method of ours; did you mean 'ROME_MDM'"),
        ({"methods": {"IKE_MDM": [{}], "GRACE_MDM": [{}, {}]}}, "tried unequally often"),
        ({"methods": {"IKE_MDM": []}}, "tried unequally often"),
        ({"modes": {"x": {"mode": "all", "facts": 1}}}, "mode 'x' is none of each"),
        ({"modes": {"x": {"mode": "each", "fact": 1}}}, "did you mean 'facts'"),
        ({"search": {"dataset": "twins"}}, "facts is missing"),
        ({"model": []}, "did you mean 'models'"),
    ],
)
def test_a_wrong_suite(tmp_path, changes, says):
    """Before anything is run."""
    with pytest.raises(HyperParameterError) as caught:
        leaderboard(written(tmp_path, **changes), tmp_path / "out")
    assert says in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.end_to_end
def test_another_suite_in_the_folder(tmp_path, board):
    """Refused; a suite that does not exist too."""
    folder, _ = board
    with pytest.raises(DataError, match="is another suite"):
        leaderboard(written(tmp_path, seed=1), folder)
    with pytest.raises(HyperParameterError, match="did you mean 'small'"):
        leaderboard("smal", tmp_path / "out")
    assert main(["leaderboard", "--suite", "smal", "--out", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("named", shipped())
def test_the_suites_that_ship(named):
    """Every method of ours is in them, every setting is one of the method's, for every model with a file."""
    suite = Suite.read(named)
    assert set(suite.methods) == set(METHODS)
    for method, tries in suite.methods.items():
        for model in suite.models:
            base = module.read_yaml(module.find_hparams(f"{method}/{model}"))
            for change in tries:
                METHODS[method].hparams.from_dict({**base, **change})
