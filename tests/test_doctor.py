"""`easyedit-mdm doctor`: what it finds, what it says will not work, its exit status, and that it loads and
fetches nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_checkpoint

from easyedit_mdm import load_model
from easyedit_mdm.cli import doctor, main
from easyedit_mdm.common import versions
from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.host import importing
from easyedit_mdm.models import FAMILIES, sizes

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
GIB = 2**30


def found(report: dict, subject: str) -> dict:
    """The finding about one subject."""
    (finding,) = [f for f in report["findings"] if f["subject"] == subject]
    return finding


@pytest.fixture
def offline(monkeypatch):
    """No connection to anywhere."""

    def refused(*_: object) -> None:
        raise AssertionError("the doctor asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def test_a_whole_installation(tmp_path, capsys, monkeypatch, offline, twin_llama):
    """Exit status 0; the file holds what is shown; no weights are read."""
    from easyedit_mdm.models import loading

    monkeypatch.setattr(loading, "_tensors", lambda table: pytest.fail("weights were read"))
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--model", "twin-llada", "--json", str(file)]) == 0
    report, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert report["can_edit_a_twin"] and "can edit a twin" in shown
    assert (
        found(report, "torch")["found"] == importlib.metadata.version("torch")
        and found(report, "torch")["found"] in shown
    )
    assert all(found(report, name)["state"] == "ok" for name in ("transformers", "twin-llada", "twin-qwen"))
    assert (
        report["devices"][0]["device"] == "cpu"
        and 0 < report["devices"][0]["free"] <= report["devices"][0]["total"]
    )
    assert report["model"]["parameters"] == sum(p.numel() for p in twin_llama.parameters()), (
        "twin-llama has the same sizes"
    )
    assert (
        report["model"]["bytes"]["float32"]["weights"] == 4 * report["model"]["parameters"]
        and "cpu" in report["model"]["fits"]["float32"]
    )


def test_easyedit_is_told_or_missed(monkeypatch, tmp_path):
    """Where it is and which form; without it a twin can still be edited, and the cure is told."""
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)
    broken = doctor.examine(easyedit_home=str(tmp_path))
    if "easyeditor" not in sys.modules:
        told = found(broken, "EasyEdit")
        assert (
            told["state"] == "limited"
            and str(tmp_path) in told["found"]
            and "BaseEditor" in told["cure"]
            and broken["can_edit_a_twin"]
        )
    monkeypatch.setattr("easyedit_mdm.host.doctor.import_easyedit", _raise(RuntimeError("a broken clone")))
    told = found(doctor.examine(), "EasyEdit")
    assert told["state"] == "limited" and "a broken clone" in told["found"]
    monkeypatch.setattr(
        "easyedit_mdm.host.doctor.import_easyedit", lambda home: importing.Host(tmp_path, "head", "home")
    )
    told = found(doctor.examine(), "EasyEdit")
    assert told["state"] == "ok" and str(tmp_path) in told["found"] and not told["cure"]


def _raise(error: Exception):
    def raising(*_: object) -> None:
        raise error

    return raising


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("transformers", "4.30.1", "older than 4.46.3"),
        ("torch", None, "not installed"),
        ("safetensors", "import", "importing it fails"),
    ],
)
def test_a_broken_package(monkeypatch, tmp_path, capsys, name, version, said):
    """Exit status 1, the package and its cure are named, and nothing that needs it is tried."""
    real = importlib.metadata.version
    if version == "import":
        real_import = importlib.import_module
        broken = _raise(ImportError("undefined symbol"))
        monkeypatch.setattr(
            doctor.importlib, "import_module", lambda n, *a: broken() if n == name else real_import(n, *a)
        )
    else:

        def fake(asked: str) -> str:
            if asked == name and version is None:
                raise importlib.metadata.PackageNotFoundError(asked)
            return version if asked == name else real(asked)

        monkeypatch.setattr(doctor.importlib.metadata, "version", fake)
    monkeypatch.setattr(doctor, "_beyond_packages", _raise(AssertionError("tried all the same")))
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 1
    told = found(json.loads((tmp_path / "d.json").read_text()), name)
    assert told["state"] == "fails" and said in told["found"] and f'pip install "{name}' in told["cure"]
    assert "cannot edit a twin" in capsys.readouterr().out


def test_it_runs_where_torch_is_missing(tmp_path):
    """In a process in which `import torch` fails: status 1 and a report, not a traceback."""
    code = (
        "import sys; sys.modules['torch'] = None; from easyedit_mdm.cli import main;"
        " sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json", str(tmp_path / "d.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert found(json.loads((tmp_path / "d.json").read_text()), "torch")["state"] == "fails"


def test_a_twin_without_files(monkeypatch):
    """A twin that is not installed is one that cannot be edited."""
    from easyedit_mdm import twins

    monkeypatch.setattr(
        twins, "twin_folder", _raise(CheckpointError("the files of twin-dream are not there"))
    )
    report = doctor.examine()
    assert not report["can_edit_a_twin"] and found(report, "twin-dream")["state"] == "fails"


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.13.0+cpu", "ok"), ("2.4.0", "ok"), ("2.3.9", "fails"), ("2.14.0", "limited"), ("3.0", "limited")],
)
def test_versions(monkeypatch, version, state):
    """Within the range: ok, whatever build. Older: it fails. Newer than tested: said, with the cure, and
    tried.
    """
    real = importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: version if name == "torch" else real(name)
    )
    finding = doctor._package("torch")
    assert finding.state == state
    assert state == "ok" or ('pip install "torch' in finding.cure and version in finding.found)


def test_what_is_needed_is_what_pyproject_asks_for():
    """The ranges that doctor compares with are pyproject's; each has a lower and an upper end."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in project["dependencies"]]
    assert [r.name for r in asked] == versions.needed()
    assert all(versions.tested_range(r.name) == r.specifier for r in asked)
    assert all({"<", "<="} & {s.operator for s in r.specifier} for r in asked if r.name != "packaging")


def test_every_pin_is_within_its_range():
    """constraints.txt: plain `name==version` lines, no address, each within the range of pyproject.toml."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len(pins) > 50
    assert not [line for line in lines if "://" in line or "@" in line]
    for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        wanted = Requirement(line)
        pinned = [p for p in pins if p.name == wanted.name]
        assert pinned or wanted.name in ("torch", "tomli"), f"{wanted.name} is not pinned: make lock"
        for pin in pinned:
            (exact,) = pin.specifier
            assert wanted.specifier.contains(exact.version), f"{pin} is outside {wanted}: make lock"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_sizes_are_those_of_the_loaded_model(tmp_path, family):
    """Of every family: parameters, layers and widths as after loading."""
    write_checkpoint(tmp_path, family)
    size, model = sizes.model_size(tmp_path), load_model(tmp_path)
    assert (size.family, size.layers, size.dtype) == (family, model.layers, "float32")
    assert size.parameters == sum(p.numel() for p in model.parameters())
    site = model.site(model.layers - 1 if model.spec.experts is None else 1)
    if site.routed:
        site = model.through(site, (0, 1))  # as many as a token goes through
    assert {size.inner, size.hidden} == set(model.weight_of(site.name).shape)
    assert size.hidden == model.weight_of(model.spec.paths.embedding).shape[1]
    (tmp_path / "model.safetensors").unlink()
    if family != "gpt2":  # without weights, the family is the one that the architecture names
        assert sizes.model_size(tmp_path).parameters == size.parameters


def test_published_models_are_known_without_a_network(offline):
    """LLaDA has 8.0 billion parameters, Dream 7.6; every hub id that a hyperparameter file names is known."""
    assert round(sizes.model_size("GSAI-ML/LLaDA-8B-Instruct").parameters / 1e9, 2) == 8.02
    assert round(sizes.model_size("Dream-org/Dream-v0-Base-7B").parameters / 1e9, 2) == 7.62
    named = {
        m
        for f in (ROOT / "hparams").rglob("*.yaml")
        for m in re.findall(r"^model_name: ([\w.-]+/[\w.-]+)", f.read_text(), re.M)
    }
    assert named and named <= set(sizes.PUBLISHED)
    with pytest.raises(CheckpointError, match="config.json first"):
        sizes.model_size("nobody/nothing-at-all")


@pytest.mark.parametrize(
    ("main_memory", "gpu", "fits"),
    [(12, 200, ["cuda:0"]), (8, 200, []), (12, 20, []), (200, 8, ["cpu"])],
)
def test_memory_against_size(monkeypatch, main_memory, gpu, fits):
    """Weights and activations must fit the device, statistics the main memory (GiB); what does not fit is
    told with a cure.
    """
    free = {"cpu": main_memory * GIB, "cuda:0": gpu * GIB}
    monkeypatch.setattr(
        doctor, "devices", lambda: [{"device": d, "name": d, "total": f, "free": f} for d, f in free.items()]
    )
    report = doctor.examine("GSAI-ML/LLaDA-8B-Instruct")
    told = found(report, "model GSAI-ML/LLaDA-8B-Instruct")
    assert report["model"]["fits"]["bfloat16"] == fits and report["can_edit_a_twin"]
    assert ("spread it over several GPUs" in told["cure"]) is not bool(fits) and told["state"] == (
        "ok" if fits else "limited"
    )


def test_a_smaller_dtype_is_the_cure(monkeypatch, tmp_path):
    """A float32 checkpoint that has room in half precision only."""
    write_checkpoint(tmp_path, "llama")
    needs = doctor.need(sizes.model_size(tmp_path), "bfloat16")
    monkeypatch.setattr(
        doctor, "devices", lambda: [{"device": "cpu", "name": "x", "total": 1, "free": sum(needs.values())}]
    )
    assert "bfloat16, on cpu" in found(doctor.examine(str(tmp_path)), f"model {tmp_path}")["cure"]


def test_an_unknown_model_is_told_and_does_not_stop_it(offline):
    """A name that is nothing here: limited, with what to do."""
    report = doctor.examine("nobody/nothing-at-all")
    assert report["model"] is None and report["can_edit_a_twin"]
    assert found(report, "model nobody/nothing-at-all")["state"] == "limited"
