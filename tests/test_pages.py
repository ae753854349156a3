"""The code on the pages: all of it is read as what it says it is, and what takes no minutes is run.

A block that is not run has a line `<!-- not run: why -->` or `<!-- long: why -->` above it; long ones run
with EASYEDIT_MDM_LONG=1. The examples of docs/python.md are run by test_package.py, those of
docs/extending.md by test_extending.py.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest
import typer
import yaml
from page_code import ROOT, Line, blocks_of, pages, shell_lines

from easyedit_mdm.cli import main
from easyedit_mdm.cli.commands import app
from easyedit_mdm.editing.hparams import find_hparams

ELSEWHERE = {"docs/python.md", "docs/extending.md"}
OUTSIDE = {"git", "pip", "export", "cd", "PYTHONPATH", "accelerate"}  # commands of others
FOLLOWED = ["README.md", "docs/easyedit.md", "docs/edits.md", "docs/hyperparameters.md"]
FOLLOWED += sorted(f"docs/how-to/{path.name}" for path in (ROOT / "docs" / "how-to").glob("*.md"))


def parsed(words: list[str]) -> None:
    """Arguments of easyedit-mdm, as the command line reads them; nothing is called."""
    command = typer.main.get_command(app)
    with command.make_context("easyedit-mdm", list(words)) as context:
        name, inner, rest = command.resolve_command(context, words)
        with inner.make_context(name, list(rest), parent=context) as found:
            file = found.params.get("hparams")
    if isinstance(file, str) and "/" in file and file.endswith(("twin-llada", "twin-llama")):
        assert find_hparams(file).is_file(), file


def looked_at(line: Line, makefile: str) -> None:
    """A command that there is."""
    first, *rest = line.words
    if first == "easyedit-mdm":
        parsed(rest)
    elif "easyedit_mdm.cli" in rest:
        parsed(rest[rest.index("easyedit_mdm.cli") + 1 :])
    elif first == "make":
        (target,) = [word for word in rest if "=" not in word]
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    elif first.endswith(("python", "bash", "sh")):
        script = next((word for word in [first, *rest] if re.search(r"\.(py|sh)$", word)), None)
        assert "-m" in rest or (script and (ROOT / script).is_file()) or "run_zsre" in str(script), line
    else:
        assert first in OUTSIDE, f"{first}: what is it?"


@pytest.mark.parametrize("page", pages())
def test_every_block_is_what_it_says(page):
    """Python compiles, JSON and YAML are read, every command and its arguments exist."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks_of((ROOT / page).read_text(encoding="utf-8")):
        where = f"{page}, line {block.line}"
        assert block.language in ("bash", "python", "json", "yaml", "text"), f"{where}: {block.language!r}"
        if block.language == "python" and ">>>" not in block.body:
            ast.parse(block.body, where)
        elif block.language == "json":
            json.loads(block.body if block.body.lstrip()[0] in "[{" else f"{{{block.body}}}")
        elif block.language == "yaml":
            yaml.safe_load(block.body)
        elif block.language == "bash":
            for line in shell_lines(block.body):
                try:
                    looked_at(line, makefile)
                except (typer.Exit, SystemExit):
                    pass
                except Exception as error:
                    raise AssertionError(f"{where}: {' '.join(line.words)}: {error}") from error


def test_a_wrong_argument_on_a_page_is_seen():
    """The check above is one."""
    for wrong in (["bench", "--algo", "ROME_MDM"], ["edti"], ["trace", "--out", "x", "--limit", "many"]):
        with pytest.raises(Exception, match="(?i)no such|valid integer|missing"):
            parsed(wrong)


def test_pages_with_code_are_followed():
    """Every page whose Python or commands are meant to be run is in a test that runs it."""
    left = set()
    for page in pages():
        for block in blocks_of((ROOT / page).read_text(encoding="utf-8")):
            if block.language in ("python", "bash") and not block.mark and page not in ELSEWHERE:
                left.add(page)
    assert left <= set(FOLLOWED), "mark the block as not run, with the reason, or follow the page"


@pytest.mark.end_to_end
@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_followed(tmp_path, monkeypatch, capsys, page):
    """From top to bottom, in an empty folder: files written, Python and commands run as they stand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    for block in blocks_of((ROOT / page).read_text(encoding="utf-8")):
        where = f"{page}, line {block.line}"
        if block.title:
            Path(block.title).write_text(block.body, encoding="utf-8")
        elif block.mark == "not run" or (block.mark and not os.environ.get("EASYEDIT_MDM_LONG")):
            continue
        elif block.language == "python":
            exec(compile(block.body, where, "exec"), names)
        elif block.language == "bash":
            for line in shell_lines(block.body):
                if line.words[0] == "easyedit-mdm":
                    found = main(line.words[1:])
                    told = capsys.readouterr()
                    assert found == line.status, f"{where}: {line.words}: {told.out}{told.err}"
