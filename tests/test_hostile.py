"""Hostile files and bad luck that have names: bombs, claims of size, full and closed disks, clocks.

What is drawn at random is in test_fuzz.py, processes that are killed in test_crash.py, two writers in
test_two_writers.py, markup in reports in test_compare.py and test_trace_report.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from bounds import bounded
from test_edits import quick_file
from test_two_writers import FACT, told

from easyedit_mdm import Edit
from easyedit_mdm.cli import main
from easyedit_mdm.editing import LowRank
from easyedit_mdm.editing.edit.files import CARD, TENSORS
from easyedit_mdm.editing.hparams import read_yaml
from easyedit_mdm.errors import EditError, HyperParameterError, StatisticsError
from easyedit_mdm.statistics import read
from easyedit_mdm.statistics.collecting import _load

TARGET = ["--target", "Zopago Zemo"]


@pytest.mark.parametrize("kind", ["lists", "mappings", "merges"])
def test_a_bomb_of_anchors(tmp_path, kind):
    """A YAML of some hundred bytes that stands for 10^12 entries: refused at the first alias."""
    one = {"lists": "[{}]", "mappings": "{{k: [{}]}}", "merges": "{{<<: [{}]}}"}[kind]
    first = "{x: y}" if kind == "merges" else "[x, x, x, x, x, x, x, x, x, x]"
    lines = [f"a0: &a0 {first}"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} {one.format(', '.join([f'*a{i - 1}'] * 10))}")
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with bounded(), pytest.raises(HyperParameterError, match="alias"):
        read_yaml(tmp_path / "bomb.yaml")


def test_ten_thousand_brackets(tmp_path):
    """Refused at the 33rd, where PyYAML alone takes time that grows with the square of their number."""
    (tmp_path / "deep.yaml").write_text("layers: " + "[" * 10_000)
    with bounded(), pytest.raises(HyperParameterError, match="nested more than 32 deep"):
        read_yaml(tmp_path / "deep.yaml")


def claimed(file: Path, name: str, size: int, holes: bool) -> None:
    """A safetensors file that claims a float32 matrix of size x size; its bytes are a hole, or missing."""
    head = {name: {"dtype": "F32", "shape": [size, size], "data_offsets": [0, 4 * size * size]}}
    text = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    if holes:
        os.truncate(file, 8 + len(text) + 4 * size * size)


def saved(folder: Path, *changes: LowRank) -> Path:
    """An edit of no particular model."""
    base = {"name": "m", "fingerprint": "0" * 64, "dtype": "float32", "weights": {}}
    Edit(list(changes), {"base": base, "facts": [], "guard": {"on": False}}).save(folder)
    return folder


@pytest.mark.parametrize("holes", [False, True])
def test_a_file_that_claims_ten_to_the_twelve_elements(tmp_path, holes):
    """Of an edit, of second moments and of a checkpoint of them: one line, at once, whether the bytes are
    missing or the file is all holes.
    """
    folder = saved(tmp_path / "e", LowRank("a.weight", torch.ones(4, 1), torch.ones(1, 3)))
    for name, place, reader, error in (
        ("a.weight|delta", folder / TENSORS, lambda: Edit.load(folder), EditError),
        ("moment", tmp_path / "m", lambda: read(tmp_path / "m"), StatisticsError),
        ("s|0", tmp_path / "c", lambda: _load(tmp_path / "c", []), StatisticsError),
    ):
        try:
            claimed(place, name, 10**6, holes)
        except OSError:
            pytest.skip("no files of that size here")
        with bounded(), pytest.raises(error) as caught:
            reader()
        assert not holes or "bytes of memory" in str(caught.value) or "of memory" in str(caught.value)
        place.unlink()


def test_factors_of_a_huge_matrix(tmp_path):
    """An edit whose factors are real and small, and whose product would have 10^12 elements: what is told of
    it never makes that product.
    """
    size = 10**6
    folder = saved(tmp_path / "e", LowRank("a.weight", torch.ones(size, 1), torch.ones(1, size)))
    with bounded(seconds=5):
        edit = Edit.load(folder)
        (row,) = edit.diff()
        assert row["shape"] == [size, size] and row["norm"] == pytest.approx(size, rel=1e-3)
        Edit.compose([edit, edit], force=True)


def test_an_edit_that_lies_about_its_hash(tmp_path):
    """A card that fits a claimed file all the same."""
    folder = saved(tmp_path / "e", LowRank("a.weight", torch.ones(4, 1), torch.ones(1, 3)))
    claimed(folder / TENSORS, "a.weight|delta", 10**6, holes=False)
    card = json.loads((folder / CARD).read_text())
    card["tensors"]["sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / CARD).write_text(json.dumps(card))
    with bounded(), pytest.raises(EditError, match="the tensors of an edit"):
        Edit.load(folder)


# ---- disks and clocks --------------------------------------------------------------------------------------


def commands(hparams: str, out: Path) -> dict[str, list[str]]:
    """Every command that writes more than a page, quick ones, into `out`."""
    cases = ["--dataset", "twins_validation", "--limit", "1"]
    return {
        "edit": ["--hparams", hparams, *FACT, *TARGET, "--save", str(out), "--keep-failed"],
        "bench": ["--alg", "ROME_MDM", "--hparams", hparams, *cases, "--light", "--out", f"{out}/r.jsonl"],
        "sweep": ["--alg", "ROME_MDM", "--hparams", hparams, *cases, "--layers", "1", "--out", str(out)],
        "trace": ["--model", "twin-llama", *FACT, "--samples", "1", "--out", str(out)],
        "stats": ["--model", "twin-llama", "--dataset", "twins", "--layers", "1", "--tokens", "1500"]
        + ["--out", str(out)],
    }


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of so many KiB."""
    place = tmp_path / "small"
    place.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(place)]
    try:
        done = subprocess.run(asked, capture_output=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("command", "small_disk"),
    [("edit", 4), ("bench", 12), ("sweep", 12), ("trace", 12), ("stats", 12)],
    indirect=["small_disk"],
)
def test_a_full_disk(tmp_path, small_disk, capsys, monkeypatch, command):
    """A real one: one line that says so, and nothing half-written is left."""
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))
    assert main([command, *commands(quick_file(tmp_path), small_disk / "out")[command]]) == 2
    assert "the disk is full" in told(capsys)
    left = [path.name for path in small_disk.rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith((".part", ".lock"))], left
    whole = {"bench": {"r.jsonl"}, "sweep": {"layers-1.jsonl"}, "trace": {"trace.json"}}.get(command, set())
    assert set(left) <= whole


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder that may not be written: by its permissions, for root one in which nobody may."""
    if os.geteuid() == 0:
        if not Path("/sys/kernel").is_dir():
            pytest.skip("root may write everywhere")
        return Path("/sys/kernel")
    place = tmp_path / "closed"
    place.mkdir()
    place.chmod(0o555)
    return place


@pytest.mark.parametrize("command", ["edit", "bench", "sweep", "trace", "stats"])
def test_a_closed_folder(tmp_path, closed, capsys, command):
    """One line, before the work."""
    began = time.process_time()
    assert main([command, *commands(quick_file(tmp_path), closed / "easyedit_mdm")[command]]) == 2
    assert "cannot be written" in told(capsys)
    assert time.process_time() - began < 20


def test_a_clock_that_jumps(tmp_path, monkeypatch):
    """Back by a day, forth by a year, at every look: the same results, no negative times, no stale lock."""
    asked = commands(quick_file(tmp_path), tmp_path)["bench"][:-1]
    outs = [tmp_path / "still" / "r.jsonl", tmp_path / "jumps" / "r.jsonl"]
    draw, now = random.Random(0), time.time()
    for out in outs:
        monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(out.parent / "cache"))
        assert main(["bench", *asked, str(out)]) == 0
        monkeypatch.setattr(time, "time", lambda: now + draw.choice([-86_400, 0, 31_536_000]))
    (_, still), (_, jumps) = [list(map(json.loads, out.read_text().splitlines())) for out in outs]
    assert all(value >= 0 for value in jumps["time"].values())
    assert jumps["post"]["multi_step"] == still["post"]["multi_step"]
