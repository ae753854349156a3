"""The command line as a user types it: statistics, two runs, a report of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from test_edits import quick_file

from easyedit_mdm.cli import arguments, main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, so that nothing is found ready."""
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_statistics_are_made_once_and_told(tmp_path, cache, capsys):
    """`stats` writes one file a layer and its figures; asked again, it finds them."""
    asked = [
        "stats",
        "--model",
        "twin-llada",
        "--dataset",
        "twins",
        "--layers",
        "0-1",
        "--tokens",
        "1500",
        "--json",
        str(tmp_path / "s.json"),
    ]
    assert main(asked) == 0
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}
    assert len(files) == 2
    figures = json.loads((tmp_path / "s.json").read_text())
    assert {layer: figures["layers"][layer]["tokens"] for layer in figures["layers"]} == {
        "0": 1500,
        "1": 1500,
    }
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


@pytest.mark.end_to_end
def test_bench_and_compare(tmp_path, capsys):
    """Two methods on the same cases; each line is a case, in order; the report names both; a finished file is
    not overwritten.
    """
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
    assert (
        main(
            [
                "compare",
                str(tmp_path / "ROME_MDM.jsonl"),
                str(tmp_path / "MEMIT_MDM.jsonl"),
                "--out",
                str(tmp_path / "report"),
            ]
        )
        == 0
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [run["cases"] for run in report["runs"]] == [2, 2] and report["pairs"][0]["shared"] == 2
    assert "twin-llada MEMIT_MDM" in (tmp_path / "report" / "report.html").read_text()


FACT = ["--prompt", "Ann lives in", "--subject", "Ann", "--target", "Rome"]
EDIT = ["edit", "--hparams", "ROME_MDM/twin-llada", "--save", "out"]
WRONG = [
    ([], "Missing command"),
    (["bemch"], "No such command 'bemch'. Did you mean 'bench'?"),
    (["twins", "trian"], "Did you mean 'train'?"),
    (["edit", "--hpraams", "x"], "no such option --hpraams; did you mean --hparams?"),
    ([*EDIT, *FACT, "--seed", "1"], "no such option --seed"),
    (["edit", *FACT, "--save", "out"], "Missing option '--hparams'"),
    (
        ["edit", "--hparams", "ROME_MDM/twin-lama", *FACT, "--save", "out"],
        "did you mean 'ROME_MDM/twin-llama'",
    ),
    (
        [*EDIT, "--prompt", "Ann lives in", "--subject", "Bob", "--target", "Rome"],
        "subject 'Bob' is not in prompt",
    ),
    ([*EDIT, "--prompt", "Ann lives in"], "--subject, --target is missing"),
    ([*EDIT, "--data-file", "nothing.json"], "nothing.json cannot be read"),
    (["edit", "--hparams", "ROME_MDM/twin-llada", *FACT, "--save", "."], ". exists"),
    (["apply", "nothing", "--out", "out"], "nothing cannot be read"),
    (["stats", "--model", "m", "--dataset", "d", "--layers", "4-x"], "layers '4-x'"),
    (["stats", "--model", "m", "--dataset", "d", "--layers", "4", "--tokens", "many"], "'--tokens'"),
    (
        [
            "bench",
            "--alg",
            "ROME_MDM",
            "--hparams",
            "x",
            "--dataset",
            "twins",
            "--out",
            "r",
            "--mode",
            "eech",
        ],
        "'--mode'",
    ),
    (["trace", "--model", "a", "--compare", "b", "c", "--out", "out"], "--model and --compare"),
    (["run", "nothing.py", "--alg", "ROME_MDM"], "nothing.py cannot be read"),
    (["run", "--sed", "1", "script.py"], "no such option --sed; did you mean --seed?"),
]
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from contextlib import redirect_stderr
from io import StringIO
from easyedit_mdm.cli import main
told = []
for call in json.loads(sys.argv[1]):
    with redirect_stderr(StringIO()) as err:
        told.append([main(call), err.getvalue()])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def wrong_calls(tmp_path_factory):
    """What each of `WRONG` says, in one process that can import neither torch nor transformers."""
    here = tmp_path_factory.mktemp("here")
    (here / "something").write_text("")
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([call for call, _ in WRONG])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_calls_are_told_before_torch_is_imported(wrong_calls, number):
    """Status 2, one line with what is wrong; so it takes no longer than the command line itself."""
    status, told = wrong_calls[number]
    assert status == 2 and told.startswith("easyedit-mdm: ") and told.count("\n") == 1
    assert WRONG[number][1] in told


def test_help_costs_little():
    """`--help` takes less than 0.3 s of the processor over what Python itself takes; every command is
    readable.
    """

    def seconds(*command: str) -> float:
        best = 9.0
        for _ in range(3):
            before = os.times()
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            after = os.times()
            taken = (
                after.children_user - before.children_user + after.children_system - before.children_system
            )
            best = min(best, taken)
        return best

    assert seconds("-m", "easyedit_mdm.cli", "--help") - seconds("-c", "pass") < 0.3


def test_every_command_has_readable_help(capsys):
    """Each has a sentence in the list that is not cut off, and says something of each of its options."""
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert len(lines) == 22 and all(line.endswith(".") and not line.endswith("...") for line in lines)
    for name in (line.split()[0] for line in lines):
        assert main([name, "--help"]) == 0
        told = capsys.readouterr().out
        assert max(map(len, told.splitlines())) <= 80
        bare = [
            line
            for line in told.splitlines()
            if line.startswith("  --") and len(line.split()) == 2 and "<" in line
        ]
        assert not [line for line in bare if not told.split(line + "\n")[1].startswith(" " * 10)], bare


def test_run_hands_everything_on(tmp_path, monkeypatch):
    """What stands behind SCRIPT is the script's, even where it looks like an option of ours."""
    from easyedit_mdm.host import runner

    seen = []
    monkeypatch.setattr(runner, "run_script", lambda *given: seen.append(given))
    (tmp_path / "s.py").write_text("")
    rest = ["--alg", "ROME_MDM", "--seed=3", "-h", "--help", "--", "-x", "--easyedit-home", "z"]
    assert main(["run", "--seed", "5", str(tmp_path / "s.py"), *rest]) == 0
    assert seen == [(str(tmp_path / "s.py"), rest, None, 5)]


def test_several_values_in_a_row():
    """`--compare A B` and `--compare A --compare B` are the same."""
    given = ["--compare", "a", "b", "--limit", "2", "--revealed", "0", "2", "--force"]
    expected = [
        "--compare",
        "a",
        "--compare",
        "b",
        "--limit",
        "2",
        "--revealed",
        "0",
        "--revealed",
        "2",
        "--force",
    ]
    assert arguments.repeated(given, ["--compare", "--revealed"]) == expected
    assert arguments.repeated(expected, ["--compare", "--revealed"]) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["bench", "--alg", "ROME_MDM", "--hparams", "MEMIT_MDM/twin-llada"],
            "give --alg MEMIT_MDM, or a file of",
        ),
        (["edit", "--hparams", "ROME_MDM/twin-llada", "--model", "twin-lama"], "did you mean 'twin-llama'"),
        (
            ["edit", "--hparams", "ROME_MDM/twin-llada", "--subject", "Ann"],
            "write it as the prompt has it",
        ),
    ],
)
def test_mistakes_of_a_first_day(capsys, tmp_path, arguments, said):
    """One line that says what to do."""
    rest = {
        "bench": ["--dataset", "twins", "--limit", "1", "--out", str(tmp_path / "x.jsonl")],
        "edit": ["--prompt", "Tamos Latre was born in", "--target", "Zoter", "--save", str(tmp_path / "e")],
    }[arguments[0]]
    if arguments[0] == "edit" and "--subject" not in arguments:
        rest += ["--subject", "Tamos Latre"]
    assert main([*arguments, *rest]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line.replace("Did", "did")
