"""The comparison of run files: reading, numbers, and the report as a reader opens it."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from read_pages import read_page

from easyedit_mdm.cli import main
from easyedit_mdm.errors import DataError, HyperParameterError, MissingPackageError
from easyedit_mdm.evaluation.records import RUNGS, VERSION, read_run
from easyedit_mdm.report.closing import summary_lines
from easyedit_mdm.report.compare import compare
from easyedit_mdm.report.summaries import all_pairs, bootstrap_mean, case_figures, names_of, paired, summary

FILES = ("report.csv", "report.html", "report.json", "report.md")


def header(schedule: str = "enumerate", **more) -> dict:
    """A header as the bench writes it."""
    skipped = [{"record": 7, "reason": "target too long"}, {"record": 9, "reason": "target too long"}]
    return {
        "header": True, "version": "0.1", "alg_name": "ROME_MDM", "hparams": {"state_schedule": schedule,
            "layers": [0]},
        "model": {"name": "twin-llada", "fingerprint": "ab" * 32, "paradigm": "masked", "family": "llada"},
        "dataset": {"name": "twins", "files": {"twins.json": "cd" * 32}, "limit": 100, "seed": 0,
            "skipped": skipped},
        "decode": {"order": "low_confidence"}, "versions": {"torch": "2.13"}, "seed": 0,
        "judge": {"version": VERSION}, **more,
    }  # fmt: skip


def score(right: bool, n: int = 2, text: str = "a b") -> dict:
    """One score of the multi-step metric."""
    once = {"one_step": 0.5, "one_step_exact": not right}
    return {
        "token_acc": 1.0 if right else 0.5,
        "exact": right,
        "first_commit": True,
        **once,
        "text": text,
        "n_tokens": n,
    }


def case(i: int, right: bool = True, n: int = 2, **more) -> dict:
    """One case with everything in it; two cases in a row share a subject."""
    tokens = [f"t{k}" for k in range(n)]
    history = {"tokens": tokens, "step": list(range(n))[::-1], "confidence": [0.9] * n}
    ladder = {name: {"token_acc": 1.0, "exact": right or name == "teacher_forced"} for name in RUNGS}
    multi_step = {
        "rewrite": score(right, n),
        "rephrase": [score(right, n), score(False, n)],
        "locality": {"near": [score(True)]},
    }
    return {
        "case_id": i, "subject": f"S{i // 2}", "prompt": f"The city of S{i // 2} is",
        "target_new": " ".join(tokens), "n_tokens": n,
        "pre": {"multi_step": {"rewrite": score(False, n, "old words")}},
        "post": {
            "rewrite_acc": [1.0], "multi_step": multi_step, "locality_kept": {"near": 0.75}, "ladder": ladder,
            "mirage_gap": 0.0 if right else 1.0,
        },
        "edit": {"steps": 31, "forwards": 1240, "schedule": "enumerate"}, "history": {"pre": history,
            "post": history},
        "time": {"edit_seconds": 0.4, "evaluation_seconds": 0.2}, **more,
    }  # fmt: skip


def write(path: Path, *records: dict) -> Path:
    """A run file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


EXTRA = {
    "counterfact": {"sum": {"ES": 1.0, "PS": 0.5, "NS": 0.75, "EM": 0.4, "PM": 0.1, "NM": 0.2},
        "likelihood": "llada"}, "given_k": [False, True],
    "first_wrong": {"step": 1, "slot": 0}, "fluency": {"ngram_entropy": 3.0}, "perplexity": {"value": 30.0,
        "n": 9},
}  # fmt: skip


def with_extras(i: int) -> dict:
    """A case with everything that a full evaluation adds."""
    whole = case(i)
    whole["pre"] |= {"fluency": {"ngram_entropy": 4.0}, "perplexity": {"value": 10.0, "n": 9}}
    whole["pre"]["multi_step"]["with_statement"] = {"near": [score(True)]}
    whole["post"] |= EXTRA
    whole["post"]["multi_step"]["with_statement"] = {"near": [score(i % 2 == 0)]}
    return whole


def test_extras_reach_every_form_of_the_report(tmp_path):
    """Likelihoods, success given k, first wrong token, fluency and perplexity: as figures, and named in all
    files but for the run without them.
    """
    full = write(tmp_path / "full.jsonl", header(), *(with_extras(i) for i in range(4)))
    report = compare(
        [full, write(tmp_path / "bare.jsonl", header("full_mask"), *(case(i) for i in range(4)))],
        tmp_path / "out",
    )
    measures = report["runs"][0]["measures"]
    wanted = {
        "bound.sum.ES": 1,
        "bound.sum.NS": 0.75,
        "bound.sum.EM": 0.4,
        "given_k.0": 0,
        "given_k.1": 1,
        "first_wrong_step": 1,
        "with_statement_acc": 0.75,
        "with_statement_acc_before": 1,
    }
    assert {name: measures[name]["mean"] for name in wanted} == wanted
    assert (measures["fluency_ratio"]["mean"], measures["perplexity_ratio"]["mean"]) == (0.75, 3.0)
    assert "bound.sum.ES" not in report["runs"][1]["measures"] and "sum.ES" not in measures
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert (
            "ES (any-order bound, summed)" in text
            and "exact, given 1 right token" in text
            and "perplexity of held-out text" in text
        )
    assert ",bound.sum.PM," in (tmp_path / "out" / "report.csv").read_text()


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two runs of 24 cases: the first is right on all but the longest targets, the second on one case of
    three.
    """
    first = write(tmp_path / "a.jsonl", header(), *[case(i, i % 4 < 3, 1 + i % 4) for i in range(24)])
    second = write(
        tmp_path / "b.jsonl", header("full_mask"), *[case(i, i % 3 == 0, 1 + i % 4) for i in range(24)]
    )
    return [first, second]


def test_bootstrap_of_a_known_case():
    """Independent cases: the interval is the binomial one; clustered: wider by the root of the cluster's
    size; always about the mean.
    """
    values = [1.0] * 60 + [0.0] * 40
    alone = bootstrap_mean(values, range(100), resamples=4000)
    assert alone["mean"] == 0.6 and alone["n"] == alone["subjects"] == 100
    width = 2 * 1.96 * np.sqrt(0.6 * 0.4 / 100)
    assert alone["high"] - alone["low"] == pytest.approx(width, rel=0.1)
    clustered = bootstrap_mean(values, [i // 4 for i in range(100)], resamples=4000)
    assert clustered["mean"] == 0.6 and clustered["subjects"] == 25
    assert clustered["high"] - clustered["low"] == pytest.approx(2 * width, rel=0.1)
    assert alone["low"] < 0.6 < alone["high"]


def test_bootstrap_equals_a_plain_loop():
    """Clusters of different sizes: the same as drawing subjects one resample after the other and averaging
    their cases.
    """
    clusters = ["a", "b", "b", "c", "c", "c", "d"]
    values = [1, 0, 1, 0, 0, 1, None]
    counts = np.random.default_rng(5).multinomial(3, np.full(3, 1 / 3), size=50)
    groups = ([1], [0, 1], [0, 0, 1])
    means = [
        np.mean(sum((group * times for group, times in zip(groups, row)), [])) for row in counts.tolist()
    ]
    found = bootstrap_mean(values, clusters, seed=5, resamples=50)
    assert (found["n"], found["subjects"]) == (6, 3)
    assert [found["low"], found["high"]] == pytest.approx(
        np.quantile(means, [0.025, 0.975]).tolist(), abs=1e-6
    )


def test_bootstrap_of_little():
    """No values: no mean; one subject: no interval."""
    assert bootstrap_mean([None], ["a"]) == {"mean": None, "low": None, "high": None, "n": 0, "subjects": 0}
    assert bootstrap_mean([1, 0], ["a", "a"]) == {
        "mean": 0.5,
        "low": None,
        "high": None,
        "n": 2,
        "subjects": 1,
    }


def test_numbers_of_a_run(two):
    """Every figure by hand."""
    found = summary(read_run(two[0]), resamples=200)
    assert (found["cases"], found["subjects"], found["failed"]) == (24, 12, 0)
    wanted = {
        "success": 0.75, "success_one_step": 0.25, "token_acc": 0.875, "rephrase_exact": 0.375,
        "locality_kept": 0.75, "mirage_gap": 0.25,
    }  # fmt: skip
    assert {name: found["measures"][name]["mean"] for name in wanted} == wanted
    assert (
        found["measures"]["ladder.teacher_forced"]["mean"] == 1
        and found["measures"]["ladder.canvas16"]["mean"] == 0.75
    )
    assert {length: (e["mean"], e["n"]) for length, e in found["success_by_length"].items()} == {
        "1": (1, 6),
        "2": (1, 6),
        "3": (1, 6),
        "4": (0, 6),
    }
    assert found["cost"]["forwards"] == {"median": 1240, "q25": 1240, "q75": 1240, "n": 24}
    assert found["skipped"] == {"target too long": 2}


COMMITTED = Path(__file__).parents[1] / "benchmarks" / "side_by_side"
# what files of version 1 called otherwise, on a masked model; `mirage_gap` was another one in both paradigms
SINCE = {
    "ladder.teacher_forced": "ladder.any_order",
    "ladder_token_acc.teacher_forced": "ladder_token_acc.any_order",
}


def test_figures_of_committed_run_files_stay():
    """Every figure of the report that stands beside the run files comes out of them again, under today's
    names.
    """
    report = json.loads((COMMITTED / "twins" / "report.json").read_text())
    runs = [read_run(COMMITTED / "runs" / run["file"]) for run in report["runs"]]
    for run, then in zip(runs, report["runs"]):
        now = {"name": run.name, **summary(run)}
        new = {"mirage_gap": "mirage_gap_exact"} | (
            SINCE if run.header["model"]["paradigm"] == "masked" else {}
        )
        assert {name: now["measures"][new.get(name, name)] for name in then["measures"]} == then.pop(
            "measures"
        )
        assert {key: now[key] for key in then} == then
        masked = run.header["model"]["paradigm"] == "masked"
        assert ("success_one_step" in now["measures"], "mirage_gap" in now["measures"]) == (
            masked,
            not masked,
        )
    for pair, then in zip(all_pairs(runs, names_of(runs)), report["pairs"], strict=True):
        named = {"mirage_gap": "mirage_gap_exact"}
        assert {name: pair["measures"][named.get(name, name)] for name in then["measures"]} == then.pop(
            "measures"
        )
        assert {key: pair[key] for key in then} == then


@pytest.mark.parametrize("paradigm", ["masked", "causal"])
def test_names_of_version_1(tmp_path, paradigm):
    """`one_step` and `teacher_forced` had two meanings each; the old mirage gap is not mistaken for
    today's.
    """
    rungs = {
        "teacher_forced": {"token_acc": 0.75, "exact": False},
        "multi_step": {"token_acc": 0.5, "exact": False},
    }
    post = {
        "multi_step": {"rewrite": {"exact": False, "token_acc": 0.5, "one_step": 1.0},
            "rephrase": [{"one_step": 0.5, "exact": False}]},
        "ladder": rungs, "mirage_gap": 1.0, "counterfact": {"sum": {"ES": 1.0}},
    }  # fmt: skip
    lead = {"header": True, "model": {"paradigm": paradigm}, "judge": {"version": 1}}
    (found,) = read_run(write(tmp_path / "r.jsonl", lead, {"case_id": 1, "post": post})).cases
    after, measures = found["post"], case_figures(found)
    assert after["mirage_gap_exact"] == measures["mirage_gap_exact"] == 1
    if paradigm == "masked":
        assert (
            after["multi_step"]["rewrite"]["one_step_exact"]
            and not after["multi_step"]["rephrase"][0]["one_step_exact"]
        )
        assert set(after["ladder"]) == {"any_order", "multi_step"} and "mirage_gap" not in after
        assert (measures["success_one_step"], measures["bound.sum.ES"]) == (1, 1)
    else:
        assert (
            after["multi_step"]["rewrite"]["teacher_forced"] == 1
            and "one_step" not in after["multi_step"]["rewrite"]
        )
        assert set(after["ladder"]) == set(rungs) and after["mirage_gap"] == 0.25
        assert (measures["success_one_step"], measures["sum.ES"]) == (None, 1)


def test_values_of_another_type_count_as_absent(tmp_path):
    """What a file says in another type than its record has is dropped; places in lists stay; other keys
    stay.
    """
    post = {
        "multi_step": {"rewrite": {"exact": "yes", "token_acc": 10**400, "first_commit": 1, "mine": [1]},
            "rephrase": 3},
        "given_k": [True, "x", 0], "same_subject_kept": float("nan"), "locality_kept": {"a": 0.5, "b": "c"},
        "perplexity": [],
    }  # fmt: skip
    lead = {"header": True, "label": 3, "dataset": [], "mine": {"a": 1}}
    run = read_run(
        write(tmp_path / "r.jsonl", lead, {"case_id": 1, "post": post, "time": 4, "subject": ["x"]})
    )
    assert run.header == {"header": True, "mine": {"a": 1}} and run.name == "r"
    (found,) = run.cases
    assert found == {"case_id": 1, "post": {
        "multi_step": {"rewrite": {"first_commit": True, "mine": [1]}}, "given_k": [True, None, False],
        "locality_kept": {"a": 0.5},
    }}  # fmt: skip


def test_against_one_run(two, tmp_path):
    """Every other run minus the one that is named, by its name, its file, or a file that is not among the
    runs.
    """
    third = write(tmp_path / "c.jsonl", header(label="third"), *[case(i) for i in range(24)])
    for against, reference in (
        (third, "third"),
        ("third", "third"),
        ("c", "third"),
        (two[1], "twin-llada ROME_MDM full_mask"),
    ):
        report = compare([*two, third], tmp_path / "out", resamples=20, against=against)
        assert [pair["second"] for pair in report["pairs"]] == [reference] * 2
        assert reference not in {pair["first"] for pair in report["pairs"]}
    last = compare([*two, third], tmp_path / "out", resamples=20, against="third")["pairs"][1]
    assert last["measures"]["success"]["mean"] == pytest.approx(-2 / 3, abs=1e-6), (
        "the named one is subtracted"
    )
    assert len(compare(two, tmp_path / "added", resamples=20, against=third)["runs"]) == 3
    arguments = [
        "compare",
        *map(str, [*two, third]),
        "--out",
        str(tmp_path / "command"),
        "--against",
        "third",
    ]
    assert main(arguments) == 0
    pairs = json.loads((tmp_path / "command" / "report.json").read_text(encoding="utf-8"))["pairs"]
    assert [pair["second"] for pair in pairs] == ["third"] * 2
    with pytest.raises(DataError, match="0 runs are called 'none'.*third"):
        compare([*two, third], tmp_path / "nothing", resamples=20, against="none")


def test_what_a_run_says_when_it_ends(tmp_path):
    """Figures with intervals, what failed and was left out with its reason, the file, and a command that
    works.
    """
    path = write(
        tmp_path / "my runs.jsonl",
        header(),
        *(case(i, i < 6) for i in range(8)),
        {"case_id": 9, "error": "CollapseError: x"},
    )
    lines = summary_lines(path, resamples=50)
    assert lines[0] == "9 cases, 5 subjects, 1 failed"
    assert re.fullmatch(r"success: 0\.67 \[0\.\d\d, 1\.00\], n 9", lines[1]) and lines[2].startswith(
        "success, one step: 0.22 ["
    )
    assert (
        lines[3].startswith("paraphrase exact: 0.33 [")
        and lines[4] == "locality kept: 0.75 [0.75, 0.75], n 8"
    )
    assert lines[5:7] == [
        "failed, 1 times: CollapseError: x",
        "left out of the data set, 2 times: target too long",
    ]
    assert lines[7] == f"written: {path}"
    next_, program, command, *arguments = shlex.split(lines[8])
    assert (next_, program, command) == ("next:", "easyedit-mdm", "compare") and arguments[0] == str(path)
    compare([arguments[0]], arguments[2], resamples=20)
    assert (tmp_path / "my runs-report" / "report.html").exists()


def test_failed_cases_count_as_zero(tmp_path):
    """They stand in n, are counted with their reason, and leave locality and cost alone."""
    failure = {
        "case_id": 1,
        "subject": "S9",
        "prompt": "p",
        "target_new": "t",
        "n_tokens": 2,
        "error": "OptimisationError: not finite",
    }
    path = write(tmp_path / "r.jsonl", header(), case(0), failure, {"case_id": 2})
    found = summary(read_run(path), resamples=100)
    assert found["failed"] == 2 and found["errors"] == {"OptimisationError: not finite": 1, "no result": 1}
    assert (
        found["measures"]["success"]["mean"] == pytest.approx(1 / 3, abs=1e-6)
        and found["measures"]["ladder.one_step"]["n"] == 3
    )
    assert found["success_by_length"]["2"]["mean"] == 0.5
    assert (
        found["measures"]["locality_kept"]["n"]
        == found["measures"]["mirage_gap"]["n"]
        == found["cost"]["edit_seconds"]["n"]
        == 1
    )
    long = summary(
        read_run(write(tmp_path / "l.jsonl", header(), case(0), {**failure, "n_tokens": 9})), resamples=10
    )["measures"]
    assert (long["ladder.canvas8"]["n"], long["ladder.canvas16"]["n"]) == (
        1,
        2,
    ), "nine tokens do not fit on a canvas of eight"
    alone = summary(read_run(write(tmp_path / "s.jsonl", header(), failure)))
    assert alone["measures"] == {"success": {"mean": 0, "low": None, "high": None, "n": 1, "subjects": 1}}


def test_paired_difference(tmp_path, two):
    """Only shared cases count; the interval follows the subjects; its meaning stands in words."""
    first, second = map(read_run, two)
    found = paired(first, second)
    assert found["shared"] == 24 and found["measures"]["success"]["mean"] == pytest.approx(
        0.75 - 8 / 24, abs=1e-6
    )
    assert (
        found["measures"]["success"]["verdict"] == "first higher" and found["measures"]["success"]["low"] > 0
    )
    assert paired(second, first)["measures"]["success"]["verdict"] == "second higher"
    assert found["measures"]["locality_kept"]["verdict"] == "no difference seen"
    assert found["success_by_length"]["4"]["n"] == 6
    other = write(
        tmp_path / "c.jsonl", header(), case(0, n=1), case(1, n=3), case(2, target_new="another"), case(99)
    )
    part = paired(first, read_run(other))
    assert part["shared"] == 1 and part["measures"]["success"]["verdict"] == "too few subjects"
    nothing = paired(read_run(write(tmp_path / "d.jsonl", header(), case(77))), first)
    assert nothing == {"shared": 0, "measures": {}, "success_by_length": {}}


@pytest.mark.parametrize(
    ("text", "line", "cure"),
    [
        ("", 1, "start the run again"),
        ('{"header": tr', 1, "start the run again"),
        ('{"case_id": 0}\n', 1, "header"),
        ('{"header": true}\n{"case_id": 0}\n{"case_id": 1, "po', 3, "--resume"),
        ('{"header": true}\n{"case_id": 0, "sub\n{"case_id": 1}\n', 2, "delete this line"),
        ('{"header": true}\n{"case_id": 0}\n{"header": true}\n', 3, "split it"),
        ('{"header": true}\n{"case_id": 4}\n{"case_id": 4}\n', 3, "line 2"),
        ('{"header": true}\n{"subject": "x"}\n', 2, "no case_id"),
        ('{"header": true}\n[1]\n', 2, "not a JSON object"),
    ],
)
def test_broken_files(tmp_path, text, line, cure):
    """Each error names the file, the line and what to do; nothing is written."""
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"run\.jsonl, line {line}\b.*{re.escape(cure)}"):
        compare([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path, two, monkeypatch):
    """No paths, no file, no resamples, no matplotlib, no jinja2."""
    with pytest.raises(DataError, match="no run files"):
        compare([], tmp_path)
    with pytest.raises(DataError, match="none.jsonl cannot be read"):
        read_run(tmp_path / "none.jsonl")
    with pytest.raises(HyperParameterError, match="resamples 0"):
        compare(two, tmp_path, resamples=0)
    for package in ("matplotlib", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingPackageError, match=f"pip install {package}"):
                compare(two, tmp_path / "out", resamples=10)
    assert not (tmp_path / "out").exists()


def test_names_are_told_apart(tmp_path):
    """The label first; then model, method and schedule; the file where these are alike."""
    paths = [
        write(tmp_path / f"{name}.jsonl", header(**more))
        for name, more in (("a", {}), ("b", {}), ("c", {"label": "mine"}))
    ]
    paths.append(write(tmp_path / "bare.jsonl", {"header": True}))
    plain = "twin-llada ROME_MDM enumerate"
    assert names_of([read_run(path) for path in paths]) == [f"{plain} (a)", f"{plain} (b)", "mine", "bare"]
    assert names_of([read_run(paths[2])] * 2) == ["mine (c) #1", "mine (c) #2"]


def test_report_files(two, tmp_path, capsys):
    """All four files say the same, name no other document, and the page shows figures, tables and
    settings.
    """
    report = compare(two, tmp_path / "out", resamples=200)
    assert tuple(sorted(p.name for p in (tmp_path / "out").iterdir())) == FILES
    texts = {name: (tmp_path / "out" / name).read_text(encoding="utf-8") for name in FILES}
    assert json.loads(texts["report.json"]) == report
    rows = list(csv.DictReader(texts["report.csv"].splitlines()))
    (row,) = [
        r
        for r in rows
        if r["run"].endswith("enumerate")
        and not r["against"]
        and r["measure"] == "success"
        and not r["length"]
    ]
    assert (row["value"], row["n"], row["subjects"]) == ("0.75", "24", "12")
    assert any(r["statistic"] == "mean difference" for r in rows)
    assert "twin-llada ROME_MDM enumerate higher" in texts["report.md"] and "0.75 \\[" in texts["report.md"]
    page = texts["report.html"]
    assert (
        page.count("<svg") == 2
        and "currentColor" in page
        and "var(--series-1)" in page
        and "#0a0b" not in page
        and "#0102" not in page
    )
    assert "http" not in page and read_page(page).fetched == []
    assert "hparams.state_schedule" in page and "target too long" in page and "no difference seen" in page
    told = capsys.readouterr().out
    assert "report.html" in told and "0.75" in told


def test_same_seed_same_bytes(two, tmp_path):
    """Twice the same, byte for byte; another seed moves the intervals and not the means."""
    for name in ("one", "again"):
        compare(two, tmp_path / name, seed=3, resamples=100)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    together = json.loads((tmp_path / "one" / "report.json").read_text())["runs"][0]
    alone, other = (summary(read_run(two[0]), seed, resamples=100) for seed in (3, 4))
    assert {"name": together["name"], **alone} == together, "a run's numbers do not depend on its company"
    found, moved = alone["measures"]["success"], other["measures"]["success"]
    assert found["mean"] == moved["mean"] and found != moved


def test_missing_parts(tmp_path):
    """Files that lack nearly everything, or hold odd values, still give a report."""
    bare = write(tmp_path / "bare.jsonl", {"header": True})
    thin = write(
        tmp_path / "thin.jsonl", {"header": True, "label": "$x$ and $", "model": None, "dataset": []},
        {"case_id": "q", "post": {}},
        {"case_id": 1, "post": {"multi_step": {"rewrite": {"exact": True, "text": "漢\ud800"},
            "rephrase": score(True)},
        "ladder": {"mine": {"exact": 1}}}},
        {"case_id": 2, "post": {"multi_step": {"rewrite": {"exact": None, "token_acc": float("nan")}},
            "locality_kept": {"a": 1, "b": None}}},
        {"case_id": 3, "post": {"ladder": {"one_step": None}}, "history": {"pre": {"tokens": ["a", "b"],
            "step": [0]}, "post": 3}, "time": 4},
    )  # fmt: skip
    gone = write(tmp_path / "gone.jsonl", {"header": True, "label": "_gone"}, {"case_id": 1, "error": "x"})
    report = compare([bare, thin, gone, bare], tmp_path / "out", resamples=20)
    assert report["runs"][1]["measures"]["ladder.mine"]["mean"] == 1
    assert report["runs"][1]["measures"]["success"]["n"] == 1
    assert [run["cases"] for run in report["runs"]] == [0, 4, 1, 0]
    assert report["runs"][1]["measures"]["rephrase_exact"]["mean"] == 1
    compare([bare], tmp_path / "empty", resamples=20)
    assert "No run has a ladder" in (tmp_path / "empty" / "report.html").read_text()


def test_escaping(tmp_path):
    """Markup in data stays text in every file, also in figures and in the embedded data."""
    evil = '</script><script>document.body.id="pwned"</script><img src=x onerror=alert(1)>|'
    one = case(0, target_new=evil, prompt=evil, subject=evil, error=None)
    one["post"]["multi_step"]["rewrite"]["text"] = evil
    one["post"]["locality_kept"] = {evil: 1.0, "b": 0.5}
    one["post"]["ladder"][evil] = {"exact": True}
    lead = header(label=evil, alg_name=evil)
    lead["dataset"]["skipped"] = [{"record": 1, "reason": evil}]
    compare(
        [write(tmp_path / "r.jsonl", lead, one, {"case_id": 5, "error": evil})],
        tmp_path / "out",
        resamples=20,
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>document" not in page and "<img" not in page and page.count("</script>") == 2
    assert read_page(page).count["script"] == 2 and "img" not in read_page(page).count
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<script>" not in text and "<img" not in text and "\\|" in text


def rendered(page: Path, folder: Path, *options: str) -> str:
    """The page's DOM after its scripts, by headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("neither chromium nor chromium-browser is on the PATH")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("width", [1200, 420])
def test_page_does_not_scroll_sideways(tmp_path, width):
    """Not the page, whatever its width and its tokens; nor, where there is room, the grids of canvases that
    end early.
    """
    words = ["<|endoftext|>"] * 8, ["unbroken" * 12] * 3
    cases = []
    for i, tokens in enumerate(words):
        path = {"tokens": tokens, "step": list(range(len(tokens))), "confidence": [0.5] * len(tokens)}
        cases.append(case(i, history={"pre": path, "post": path}, target_new=tokens[0] * 4, prompt="x" * 300))
    compare(
        [
            write(tmp_path / "a.jsonl", header(label="y" * 90), *cases),
            write(tmp_path / "b.jsonl", header(), *cases),
        ],
        tmp_path / "out",
    )
    page = tmp_path / "out" / "report.html"
    script = """<script>
    for (const box of document.querySelectorAll("details")) box.open = true;
    boxes.forEach((box, i) => box.childElementCount === 1 && fill(box, data.cases[i]));
    const wide = node => node.scrollWidth - node.clientWidth;
    document.body.dataset.page = wide(document.documentElement);
    document.body.dataset.grids = Math.max(...[...boxes[0].querySelectorAll(".pair > section")].map(wide));
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", script))
    dom = rendered(page, tmp_path / "browser", f"--window-size={width},900")
    assert int(re.search('data-page="(-?[0-9]+)"', dom)[1]) <= 0
    assert width < 1000 or int(re.search('data-grids="(-?[0-9]+)"', dom)[1]) <= 0


def test_page_in_a_browser(two, tmp_path):
    """The DOM holds tables, figures and every case, and no script has failed or was smuggled in."""
    evil = (
        '</script><script>document.body.id="pwned"</script><img src=x onerror="document.body.id=\'pwned\'">'
    )
    tokens = {"tokens": [evil], "step": [0], "confidence": [0.5]}
    one = case(0, target_new=evil, subject=evil, prompt=evil, history={"pre": tokens, "post": tokens})
    one["post"]["multi_step"]["rewrite"]["text"] = evil
    failure = {"case_id": 1, "subject": evil, "target_new": evil, "error": f"not finite {evil}"}
    three = write(tmp_path / "c.jsonl", header(label=evil), one, failure)
    compare([*two, three], tmp_path / "out", resamples=50)
    page = tmp_path / "out" / "report.html"
    # a second script opens every case, so that all of them are drawn
    opened = "<script>boxes.forEach((box, i) => fill(box, data.cases[i]))</script></body>"
    page.write_text(page.read_text().replace("</body>", opened))
    dom = rendered(page, tmp_path / "browser")
    assert dom.count("<svg") == 2 and "<table" in dom
    assert '<details id="case-23"' in dom and '<table class="grid">' in dom and "26 of 26 cases" in dom
    assert re.search(r'<p id="trouble" class="bad" hidden="">\s*</p>', dom), "a script failed"
    assert '<body id="pwned"' not in dom and "&lt;script&gt;document.body.id" in dom and "<img" not in dom
    assert "✓ exact" in dom and "✗ failed" in dom and "not finite" in dom
