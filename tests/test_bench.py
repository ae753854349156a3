"""The bench: one header and one line a case, the same after any interruption, and nothing spoiled by a case that fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from easyedit_mdm.editing.hparams import find_hparams
from easyedit_mdm.errors import DataError
from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.summaries import summary
from easyedit_mdm.runs import run as running
from easyedit_mdm.runs.run import BenchConfig, bench


def config(**changes) -> BenchConfig:
    """Three validation cases of the twins' world, without the ladder."""
    return BenchConfig(
        **{"alg_name": "ROME_MDM", "hparams": "ROME_MDM/twin-llama", "dataset": "twins_validation", "limit": 3, "light": True, **changes}
    )


@pytest.fixture
def quick(tmp_path) -> str:
    """The file with few optimiser steps: what is tested with it is the bench, not the edits."""
    text = find_hparams("ROME_MDM/twin-llama").read_text().replace("v_num_grad_steps: 50", "v_num_grad_steps: 3")
    (tmp_path / "quick.yaml").write_text(text)
    return str(tmp_path / "quick.yaml")


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


def test_a_run(tmp_path):
    """Header first, then a line a case in input order, with what docs/metrics.md promises."""
    bench(config(light=False, limit=2), tmp_path / "a.jsonl")
    header, *cases = lines(tmp_path / "a.jsonl")
    assert header["header"] and header["model"]["paradigm"] == "causal" and len(header["model"]["fingerprint"]) == 64
    assert header["dataset"]["cases"] == 2 and header["judge"]["held_out"] and len(cases) == 2
    for case in cases:
        assert set(case) >= {"case_id", "subject", "prompt", "target_new", "n_tokens", "pre", "post", "edit", "history"} and "error" not in case
        for phase in ("pre", "post"):
            assert {"rewrite_acc", "rephrase_acc", "multi_step", "ladder", "mirage_gap", "first_wrong", "fluency", "perplexity"} <= set(case[phase])
        assert set(case["post"]["locality_kept"]) == {"neighborhood"} and 0 <= case["post"]["same_subject_kept"] <= 1
        assert case["post"]["multi_step"]["with_statement"]["neighborhood"]
        assert len(case["history"]["post"]["tokens"]) == case["n_tokens"]
    assert sum(c["post"]["multi_step"]["rewrite"]["exact"] for c in cases) >= 1
    assert len({json.dumps(c["pre"]["perplexity"]) for c in cases}) == 1, "edits are taken back"
    with pytest.raises(DataError, match="exists"):
        bench(config(), tmp_path / "a.jsonl")


@pytest.mark.parametrize("cut", ["in the first case", "in the second case", "between cases", "in the header"])
def test_resuming_gives_the_same_file(tmp_path, quick, cut):
    """A run that was cut anywhere goes on to the same lines; the unedited model is not judged again."""
    bench(config(hparams=quick), tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    at = {"in the header": 30, "in the first case": ends[0] + 40, "between cases": ends[1] + 1, "in the second case": ends[2] - 5}[cut]
    part = tmp_path / "part.jsonl"
    part.write_bytes(whole[:at])
    with pytest.MonkeyPatch.context() as patch:
        count = []
        real = running.Judge.judge
        patch.setattr(running.Judge, "judge", lambda self, *args: (count.append(1), real(self, *args))[1])
        bench(config(hparams=quick), part, resume=True)
    assert lines(part) == lines(tmp_path / "whole.jsonl")
    assert len(count) == 3 - max(0, sum(end < at for end in ends) - 1), "one judgement for each edit that was missing"
    with pytest.raises(DataError, match="something else.*dataset"):
        bench(config(hparams=quick, limit=2), part, resume=True)


def test_resuming_the_run_of_an_earlier_version(tmp_path, quick):
    """A hyperparameter that has come since counts as its default; one that the run is not to have at its default is another run."""
    bench(config(hparams=quick, limit=1), tmp_path / "run.jsonl")
    header, case = (tmp_path / "run.jsonl").read_text().splitlines()
    for left_out, same in (("optimise_through", True), ("v_num_grad_steps", False)):  # `quick` sets the second
        older = json.loads(header)
        del older["hparams"][left_out]
        (tmp_path / "older.jsonl").write_text(json.dumps(older) + "\n" + case + "\n")
        if same:
            bench(config(hparams=quick, limit=1), tmp_path / "older.jsonl", resume=True)
            continue
        with pytest.raises(DataError, match="something else.*hparams"):
            bench(config(hparams=quick, limit=1), tmp_path / "older.jsonl", resume=True)


def test_a_case_that_fails(tmp_path, quick):
    """Its error is recorded, the other cases are as if it were not there."""
    records = [{"prompt": "Where was Zano born?", "subject": "Zano", "target_new": t} for t in ("Pute", "long " * 600, "Zoter")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    bench(config(hparams=quick, dataset="requests", data_file=str(tmp_path / "data.json"), limit=None), tmp_path / "a.jsonl")
    _, first, failed, last = lines(tmp_path / "a.jsonl")
    assert "positions" in failed["error"] and "post" not in failed and "post" in first and "post" in last


OF_THE_RUN = ("file", "path", "cost", "header")
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29555"],
    "accelerate launch": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"],
    "as MPI": [],
}


def launched(launcher: str, arguments: list[str], folder) -> None:
    """Run a script in two processes on CPUs (gloo)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = [{}]
    command = [sys.executable, *LAUNCHERS[launcher]]
    if launcher == "accelerate launch":
        if shutil.which("mpirun") is None:
            pytest.skip("no mpirun")
        (folder / "hosts").write_text("localhost slots=2\n")
        command += ["--mpirun_hostfile", str(folder / "hosts"), "--main_process_port=29556"]
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    if launcher == "as MPI":  # what Open MPI and accelerate's launcher tell the processes, where there is no MPI
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29557", "ACCELERATE_USE_CPU": "True"}
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
        told = [{**dict.fromkeys(names, rank), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"} for rank in "01"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, *arguments], env={**environment, **more}, **pipes) for more in told]
    printed = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, printed):
        assert process.returncode == 0, errors[-2000:]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_processes(tmp_path, quick, launcher):
    """Two processes on CPUs (gloo): the same cases with the same values as one. accelerate's launcher starts them through MPI."""
    bench(config(hparams=quick), tmp_path / "one.jsonl")
    code = (
        "import sys; from easyedit_mdm.runs.run import BenchConfig, _place, bench; "
        "open(sys.argv[2] + '.place-%s-of-%s' % _place(), 'w').close(); "
        "bench(BenchConfig('ROME_MDM', sys.argv[1], 'twins_validation', limit=3, light=True), sys.argv[2])"
    )
    (tmp_path / "script.py").write_text(code)
    launched(launcher, [str(tmp_path / "script.py"), quick, str(tmp_path / "two.jsonl")], tmp_path)
    assert sorted(path.suffix for path in tmp_path.glob("two.jsonl.*")) == [".place-0-of-2", ".place-1-of-2"]
    assert not list(tmp_path.glob("*.part-*"))
    ours, theirs = lines(tmp_path / "one.jsonl"), lines(tmp_path / "two.jsonl")
    assert theirs[1:] == alike(ours[1:])  # not the same process, perhaps not the same number of threads: sums differ in their last bits
    one, two = (
        {k: v for k, v in summary(read_run(tmp_path / f"{name}.jsonl"), resamples=50).items() if k not in OF_THE_RUN} for name in ("one", "two")
    )
    assert two == alike(one)
