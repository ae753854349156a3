"""The demo and the command line, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser

from easyedit_mdm.cli import main


def test_demo(tmp_path):
    """Exit status 0, all claims hold, under the time; the report is complete and the page self-contained."""
    command = [sys.executable, "-m", "easyedit_mdm.cli", "demo", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert set(report["claims"]) == {"plain_single_token", "aware_multi_token", "paraphrase", "locality", "restored"}
    assert all(report["claims"].values())
    for name in ("before", "after"):
        frames = report["shown"]["denoising"][name]
        assert {c["state"] for c in frames[0]} == {"masked"} and "masked" not in {c["state"] for c in frames[-1]}
    assert " ".join(c["text"] for c in report["shown"]["denoising"]["after"][-1]) == report["shown"]["target"]
    page = (tmp_path / "out" / "demo.html").read_text()
    assert "http" not in page and report["shown"]["target"].split()[0] in page
    HTMLParser().feed(page)
    assert not (tmp_path / "logs").exists(), "EasyEdit's logs stay out of the user's folder"
    assert "step 0" in done.stdout and report["shown"]["target"].split()[0] in done.stdout


def test_command_line(capsys, tmp_path):
    """Errors of ours are one line on stderr and status 2; `hook` prints a folder; unknown arguments are refused."""
    assert main(["run", str(tmp_path / "none.py"), "--alg", "ROME_MDM"]) == 2
    assert "no script" in capsys.readouterr().err
    assert main(["hook"]) == 0
    assert "autoload" in capsys.readouterr().out
