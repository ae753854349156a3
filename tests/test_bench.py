"""The bench: one header and one line a case, the same after any interruption, and nothing spoiled by a case
that fails.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from children import needs_processes, start

from easyedit_mdm.editing.hparams import find_hparams
from easyedit_mdm.errors import DataError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.summaries import summary
from easyedit_mdm.runs import judge as judging
from easyedit_mdm.runs import run as running
from easyedit_mdm.runs.run import BenchConfig, bench


def config(**changes) -> BenchConfig:
    """Three validation cases of the twins' world, without the ladder."""
    return BenchConfig(
        **{
            "alg_name": "ROME_MDM",
            "hparams": "ROME_MDM/twin-llama",
            "dataset": "twins_validation",
            "limit": 3,
            "light": True,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> str:
    """The file with few optimiser steps: what is tested with it is the bench, not the edits."""
    text = (
        find_hparams("ROME_MDM/twin-llama").read_text().replace("v_num_grad_steps: 50", "v_num_grad_steps: 3")
    )
    file = tmp_path_factory.mktemp("quick") / "quick.yaml"
    file.write_text(text)
    return str(file)


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory) -> Path:
    """A run of three cases that nothing interrupted; beside it the evaluations that it kept."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYEDIT_MDM_CACHE", str(folder / "cache"))
        bench(config(hparams=quick), folder / "run.jsonl")
    return folder / "run.jsonl"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Kept evaluations stay in the test's folder."""
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))


def lines(path) -> list[dict]:
    """A run file without what varies between runs."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if "time" not in k and "seconds" not in k}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return [strip(json.loads(line)) for line in path.read_text().splitlines()]


def alike(value):
    """To compare with: the same, but for the last digits of numbers."""
    if isinstance(value, dict):
        return {k: alike(v) for k, v in value.items()}
    if isinstance(value, list):
        return [alike(v) for v in value]
    return pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True) if isinstance(value, float) else value


@pytest.mark.end_to_end
def test_a_run(tmp_path, monkeypatch):
    """Header first, then a line a case in input order, with what docs/metrics.md promises."""
    monkeypatch.setattr(judging, "fluency", partial(judging.fluency, length=20))
    bench(config(light=False, limit=2), tmp_path / "a.jsonl")
    header, *cases = lines(tmp_path / "a.jsonl")
    assert (
        header["header"]
        and header["model"]["paradigm"] == "causal"
        and len(header["model"]["fingerprint"]) == 64
    )
    assert header["dataset"]["cases"] == 2 and header["judge"]["held_out"] and len(cases) == 2
    for case in cases:
        assert (
            set(case)
            >= {"case_id", "subject", "prompt", "target_new", "n_tokens", "pre", "post", "edit", "history"}
            and "error" not in case
        )
        for phase in ("pre", "post"):
            assert {
                "rewrite_acc",
                "rephrase_acc",
                "multi_step",
                "ladder",
                "mirage_gap",
                "first_wrong",
                "fluency",
                "perplexity",
            } <= set(case[phase])
        assert (
            set(case["post"]["locality_kept"]) == {"neighborhood"}
            and 0 < case["post"]["same_subject_kept"] <= 1
        )
        assert case["post"]["multi_step"]["with_statement"]["neighborhood"]
        assert len(case["history"]["post"]["tokens"]) == case["n_tokens"]
    assert sum(c["post"]["multi_step"]["rewrite"]["exact"] for c in cases) >= 1
    assert len({json.dumps(c["pre"]["perplexity"]) for c in cases}) == 1, "edits are taken back"
    with pytest.raises(DataError, match="exists"):
        bench(config(), tmp_path / "a.jsonl")


@pytest.mark.parametrize("cut", ["in the first case", "in the second case", "between cases", "in the header"])
def test_resuming_gives_the_same_file(tmp_path, quick, whole, cut):
    """A run that was cut anywhere goes on to the same lines; the unedited model is not judged again."""
    shutil.copytree(whole.parent / "cache", tmp_path / "cache")
    written = whole.read_bytes()
    ends = [i for i, byte in enumerate(written) if byte == 10]
    at = {
        "in the header": 30,
        "in the first case": ends[0] + 40,
        "between cases": ends[1] + 1,
        "in the second case": ends[2] - 5,
    }[cut]
    part = tmp_path / "part.jsonl"
    part.write_bytes(written[:at])
    with pytest.MonkeyPatch.context() as patch:
        count = []
        real = running.Judge.judge
        patch.setattr(running.Judge, "judge", lambda self, *args: (count.append(1), real(self, *args))[1])
        bench(config(hparams=quick), part, resume=True)
    assert lines(part) == lines(whole)
    assert len(count) == 3 - max(0, sum(end < at for end in ends) - 1), (
        "one judgement for each edit that was missing"
    )
    with pytest.raises(DataError, match="something else.*dataset"):
        bench(config(hparams=quick, limit=2), part, resume=True)


def test_resuming_the_run_of_an_earlier_version(tmp_path, quick, whole):
    """A hyperparameter that has come since counts as its default; one that the run is not to have at its
    default is another run.
    """
    header, *cases = whole.read_text().splitlines()
    for left_out, same in (
        ("optimise_through", True),
        ("v_num_grad_steps", False),
    ):  # `quick` sets the second
        older = json.loads(header)
        del older["hparams"][left_out]
        (tmp_path / "older.jsonl").write_text("\n".join([json.dumps(older), *cases]) + "\n")
        before = (tmp_path / "older.jsonl").read_bytes()
        if same:
            assert bench(config(hparams=quick), tmp_path / "older.jsonl", resume=True) == 3
        else:
            with pytest.raises(DataError, match="something else.*hparams"):
                bench(config(hparams=quick), tmp_path / "older.jsonl", resume=True)
        assert (tmp_path / "older.jsonl").read_bytes() == before


def test_a_case_that_fails(tmp_path, quick):
    """Its error is recorded, the other cases are as if it were not there."""
    records = [
        {"prompt": "Where was Zano born?", "subject": "Zano", "target_new": t}
        for t in ("Pute", "long " * 600, "Zoter")
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    bench(
        config(hparams=quick, dataset="requests", data_file=str(tmp_path / "data.json"), limit=None),
        tmp_path / "a.jsonl",
    )
    _, first, failed, last = lines(tmp_path / "a.jsonl")
    assert "positions" in failed["error"] and "post" not in failed and "post" in first and "post" in last


OF_THE_RUN = ("file", "path", "cost", "header")
TOLD_BY_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
SCRIPT = (
    "import sys; sys.path.insert(0, {tests!r}); from test_bench import in_one_of_several;"
    " in_one_of_several(*sys.argv[1:])"
)


def in_one_of_several(quick: str, out: str) -> None:
    """What each process of a launcher does: it notes which one it is, and takes its share of the cases."""
    open("{}.place-{}-of-{}".format(out, *running._place()), "w").close()
    bench(config(hparams=quick), out)


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def same_as_one_process(whole: Path, several: Path) -> None:
    """The same cases with the same values, from two processes that shared them."""
    assert sorted(path.suffix for path in several.parent.glob("two.jsonl.*")) == [
        ".place-0-of-2",
        ".place-1-of-2",
    ]
    assert not list(several.parent.glob("*.part-*"))
    ours, theirs = lines(whole), lines(several)
    assert theirs[1:] == alike(
        ours[1:]
    )  # not the same process, perhaps not the same number of threads: sums differ in their last bits
    one, two = (
        {k: v for k, v in summary(read_run(path), resamples=50).items() if k not in OF_THE_RUN}
        for path in (whole, several)
    )
    assert two == alike(one)


@pytest.mark.end_to_end
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_launchers(tmp_path, quick, whole, launcher):
    """Two processes on CPUs (gloo) write what one does. accelerate's launcher starts them through MPI."""
    (tmp_path / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    environment, options = (
        dict(os.environ),
        ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"],
    )
    if launcher == "accelerate launch":
        if shutil.which("mpirun") is None:
            pytest.skip("no mpirun")
        (tmp_path / "hosts").write_text("localhost slots=2\n")
        options = [
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes=2",
            "--num_machines=1",
            "--mixed_precision=no",
        ]
        options += ["--mpirun_hostfile", str(tmp_path / "hosts"), f"--main_process_port={free_port()}"]
        environment |= {
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
        }
    command = [sys.executable, *options, str(tmp_path / "script.py"), quick, str(tmp_path / "two.jsonl")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    same_as_one_process(whole, tmp_path / "two.jsonl")


@needs_processes
@pytest.mark.end_to_end
def test_as_mpi_tells_it(tmp_path, quick, whole):
    """The same with what Open MPI and accelerate's launcher tell the processes, where there is no MPI."""
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "ACCELERATE_USE_CPU": "True",
        "EASYEDIT_MDM_CACHE": str(tmp_path / "cache"),
    }
    told |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    children = [
        start(
            in_one_of_several,
            quick,
            str(tmp_path / "two.jsonl"),
            environment={**told, **dict.fromkeys(TOLD_BY_MPI, n)},
            errors=tmp_path / n,
        )
        for n in "01"
    ]
    for child, number in zip(children, "01"):
        child.join(300)
        assert child.exitcode == 0, (tmp_path / number).read_text()[-2000:]
    same_as_one_process(whole, tmp_path / "two.jsonl")


def test_resuming_a_file_of_empty_lines(tmp_path):
    """A run that was cut off before its header begins anew."""
    path = tmp_path / "run.jsonl"
    for held in (b"\n", b" \n\n", b'\n{"header": tr'):
        path.write_bytes(held)
        assert running._prepare(path, {"header": True, "mode": "each"}, resume=True) == 0
        assert json.loads(path.read_text()) == {"header": True, "mode": "each"}
