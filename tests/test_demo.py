"""The demo and the command line, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from read_pages import read_page

from easyedit_mdm.cli import main
from easyedit_mdm.demo.real import installed


@pytest.mark.end_to_end
def test_demo(tmp_path):
    """Exit status 0 and all claims hold; the report is complete and the page whole and self-contained."""
    command = [sys.executable, "-m", "easyedit_mdm.cli", "demo", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    twin = {"plain_single_token", "aware_multi_token", "paraphrase", "locality", "restored"}
    world = {"real_fact", "real_restored"} if installed() else set()
    assert set(report["claims"]) == twin | world
    assert all(claim["holds"] and claim["figures"] for claim in report["claims"].values())
    assert (report["real"] is not None) == installed() and ("make smollm2" in done.stdout) != installed()
    for name in ("before", "after"):
        frames = report["shown"]["denoising"][name]
        assert {c["state"] for c in frames[0]} == {"masked"} and "masked" not in {
            c["state"] for c in frames[-1]
        }
    written = [c["text"] for c in report["shown"]["denoising"]["after"][-1]]
    assert " ".join(written) == report["shown"]["target"]
    text = (tmp_path / "out" / "demo.html").read_text()
    page = read_page(text)
    assert page.fetched == [] and "http" not in text
    assert page.texts["target"] == [report["shown"]["target"]] and page.texts["old"] == [
        report["shown"]["was"]
    ]
    assert len(page.texts["yes"]) == len(twin | world) and "no" not in page.texts
    assert "tokens in 4 steps" in " ".join(page.texts["yes"])
    if installed():
        assert page.texts["becomes"] == ["New York City"] and report["real"]["wrote"] == "New York City"
        assert len(report["real"]["near"]) == 3
        assert all(near["before"] and near["after"] for near in report["real"]["near"])
    assert set(written) <= set(page.texts["cell kept"] + page.texts["cell new"])
    assert {p.name for p in tmp_path.iterdir()} == {"out"}, "EasyEdit's logs stay out of the user's folder"
    assert "step 0" in done.stdout and report["shown"]["target"].split()[0] in done.stdout


def test_command_line(capsys, tmp_path):
    """Errors of ours are one message on stderr and status 2; `hook` prints a folder."""
    assert main(["run", str(tmp_path / "none.py"), "--alg", "ROME_MDM"]) == 2
    told = capsys.readouterr()
    assert (
        told.out == ""
        and told.err.startswith("easyedit-mdm: ")
        and "none.py cannot be read" in told.err
        and "Traceback" not in told.err
    )
    assert main(["hook"]) == 0
    assert "autoload" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "demo --out {}",
        "doctor --json {}",
        "hook",
        "stats --model twin-llada --dataset twins --layers 0 --out {}",
    ],
)
def test_unknown_arguments_are_refused(capsys, tmp_path, command):
    """Whatever the command: status 2, one line that names it, and nothing is done."""
    out = tmp_path / "out"
    assert main([*command.format(out).split(), "--nonsense", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--nonsense" in line
    assert list(tmp_path.iterdir()) == []
