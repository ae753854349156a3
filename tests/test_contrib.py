"""contrib/easyedit: the patches apply to a clone of EasyEdit, and its runner then works without our hook."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.hparams import packaged_hparams
from easyedit_mdm.host.masks import causal_attention_mask

ROOT = Path(__file__).parent.parent
PATCHES = [ROOT / "contrib" / "easyedit" / f"{n}.patch" for n in ("masked-diffusion", "transformers-5.24")]

# Runs a script of the clone with the packages that this environment lacks answered for, and nothing else of
# ours in EasyEdit; prints which names of packages that are there had to be answered for.
WITHOUT_THE_HOOK = """
import importlib, importlib.util, json, runpy, sys
from pathlib import Path
from easyedit_mdm.host import standins

asked, tell = [], standins._gone
def gone(name, error):
    if importlib.util.find_spec(name.split(".")[0]) is not None:
        asked.append(name)
    return tell(name, error)
standins._gone = gone
sys.argv = sys.argv[1:]
with standins.standins(Path(sys.argv[0]).resolve()):
    runpy.run_path(sys.argv[0], run_name="__main__")
import torch
from easyedit_mdm.host.masks import causal_attention_mask
hidden, mask = torch.zeros(2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
for name in ("unke", "unke_ARE"):
    module = importlib.import_module(f"easyeditor.models.{name}.{name}_main")
    got, positions = module.get_qwen2_causal_mask(hidden, mask)
    assert torch.equal(got, causal_attention_mask(mask, (2, 5), hidden, 0)), name
    assert positions.tolist() == [[0, 1, 2, 3, 4]]
editor = sys.modules["easyeditor.editors.editor"]
joined = hasattr(editor.BaseEditor, "_easyedit_mdm")
print("TOLD", json.dumps({"asked": asked, "joined": joined, "file": editor.__file__}))
"""


def patched(home: Path, folder: Path) -> Path:
    """A copy of the clone with both patches; its README, which a copy may lack, is left out then."""
    shutil.copytree(home, folder, ignore=shutil.ignore_patterns(".git", "logs", "data"))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)
    for patch in PATCHES:
        out = [] if (folder / "README.md").exists() else ["--exclude=README.md"]
        command = ["git", "apply", "--whitespace=nowarn", *out, str(patch)]
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{patch.name}: {done.stderr}"
    return folder


def added(patch: Path) -> dict[str, str]:
    """The files that a patch adds, with their text."""
    files = {}
    for part in re.split(r"^diff --git ", patch.read_text(), flags=re.M)[1:]:
        if "new file mode" in part:
            name = re.search(r"^\+\+\+ b/(.*)$", part, re.M)
            assert name is not None
            lines = part.split("\n@@", 1)[1].split("\n")[1:]
            files[name.group(1)] = "".join(line[1:] + "\n" for line in lines if line.startswith("+"))
    return files


def test_the_patch_carries_the_files_that_ship():
    """Hyperparameters in the patch are those of the package, for all methods; two files mend UnKE."""
    files = {name: text for name, text in added(PATCHES[0]).items() if name.endswith(".yaml")}
    assert len(files) == 15
    for name, text in files.items():
        assert text == (packaged_hparams() / Path(name).relative_to("hparams")).read_text(), name
    changed = re.findall(r"^\+\+\+ b/(.*)$", PATCHES[1].read_text(), re.M)
    assert [Path(name).name for name in changed] == ["unke_main.py", "unke_ARE_main.py"]


def test_the_mask_that_the_second_patch_puts_in_its_place():
    """What UnKE asked transformers for, where transformers still has it."""
    theirs = pytest.importorskip("transformers.modeling_attn_mask_utils", reason="gone since 5.24")
    mask, hidden = torch.tensor([[1, 1, 1, 0]]), torch.zeros(1, 4, 2)
    wanted = theirs._prepare_4d_causal_attention_mask(mask, (1, 4), hidden, 0)
    assert torch.equal(wanted, causal_attention_mask(mask, (1, 4), hidden, 0))


@pytest.mark.easyedit_head
@pytest.mark.data
@pytest.mark.end_to_end
def test_the_patched_clone_edits_without_our_hook(easyedit_home, data_dir, tmp_path):
    """Its own runner on two zsRE records: a masked twin is loaded, edited, and scored by denoising."""
    clone = patched(easyedit_home, tmp_path / "EasyEdit")
    command = [
        sys.executable, "-c", WITHOUT_THE_HOOK, "run_zsre_mdm.py", "--editing_method", "ROME_MDM",
        "--hparams_dir", "../hparams/ROME_MDM/twin-llada.yaml", "--data_dir", str(data_dir / "zsre"),
        "--ds_size", "2", "--metrics_save_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(clone)}  # before an installed wheel
    done = subprocess.run(command, cwd=clone / "examples", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.split("TOLD ")[1])
    assert told["asked"] == [], "names of installed packages that only our stand-ins have"
    assert not told["joined"] and Path(told["file"]).is_relative_to(clone)
    records = json.loads((tmp_path / "out" / "ROME_MDM_results.json").read_text())
    assert len(records) == 2
    for record in records:
        assert record["post"]["rewrite_acc"][0] > record["pre"]["rewrite_acc"][0]
        groups = {key: meta["comparable_group"] for key, meta in record["post"]["metric_meta"].items()}
        assert groups["rewrite"].startswith("mdm.") and groups["locality.neighborhood"].startswith(
            "locality.mdm."
        )
        assert set(record["post"]["locality"]) == {"neighborhood_acc", "neighborhood_output"}


def test_without_the_package_the_patch_says_what_to_install(monkeypatch):
    """The method folder imports nothing of ours until a method is used."""
    (text,) = [text for name, text in added(PATCHES[0]).items() if name.endswith("mdm_main.py")]
    module: dict = {"__name__": "mdm_main"}
    exec(text, module)
    assert set(METHODS) == set(module["MDM_ALG_DICT"])
    assert {name for name in METHODS if METHODS[name].batchable} == set(module["MDM_BATCHABLE"])

    def no_such(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(module["importlib"], "import_module", no_such)
    with pytest.raises(ModuleNotFoundError, match="needs the package easyedit_mdm: pip install"):
        module["MDM_ALG_DICT"]["ROME_MDM"](None, None, [], None)
