"""What `export` says about opening what it writes: its message, the README.md inside, and that these work."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import write_checkpoint
from test_edits import ids_for, quick_file, some_edit

from easyedit_mdm import load_model
from easyedit_mdm.cli import main
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.editing.edit.export import write_merged
from easyedit_mdm.models import FAMILIES

# the hub's way of shipping a model's code; the weight that is looked for is where LLaDA's own code has it
REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class TinyConfig(PretrainedConfig):
    model_type = "llada"


class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        blocks = []
        for _ in range(config.n_layers):
            block = torch.nn.Module()
            block.ff_out = torch.nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)
            blocks.append(block)
        self.model = torch.nn.Module()
        self.model.transformer = torch.nn.Module()
        self.model.transformer.blocks = torch.nn.ModuleList(blocks)
        self.post_init()

    def _init_weights(self, module):
        pass
"""
AUTO = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.Tiny"}


def blocks_of(folder) -> list[str]:
    """The Python blocks of a folder's README.md."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def written(tmp_path, tokenizer, family: str, **config):
    """A model folder, the model with an edit in it, and the merged folder with the ways to open it."""
    base = tmp_path / "base"
    write_checkpoint(base, family, len(tokenizer))
    tokenizer.save_pretrained(base)
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**told, **config}))
    (base / "README.md").write_text("# the base model's card\n")
    if "auto_map" in config:
        (base / "modeling_tiny.py").write_text(REMOTE)
    model = load_model(base)
    some_edit(model).apply(model)
    return model, write_merged(model, base, tmp_path / "out")


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "bert", "llama"])
def test_the_readme_of_a_merged_folder(tmp_path, tokenizer, family, monkeypatch):
    """Its first block opens it; transformers' block is there where transformers can, and opens it too; dLLM's
    where dLLM has the family.
    """
    model, ways = written(tmp_path, tokenizer, family)
    monkeypatch.chdir(tmp_path / "out")
    blocks = blocks_of(tmp_path / "out")
    names: dict = {}
    exec(blocks[0], names)
    assert parameter_hashes(names["model"]) == parameter_hashes(model)
    theirs = [block for block in blocks if block.startswith("from transformers")]
    assert len(theirs) == (family in ("bert", "llama"))
    for block in theirs:
        exec(block, names)
        key = next(iter(dict(model.native.named_parameters())))
        assert torch.equal(names["model"].state_dict()[key], model.native.state_dict()[key])
    assert any("import dllm" in block for block in blocks) == (family in ("llada", "dream", "bert"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert family in ("bert", "llama") or "names no code (auto_map)" in text
    assert "has no class for the family sdar" in text or family != "sdar"
    assert (tmp_path / "out" / "README-base.md").read_text() == "# the base model's card\n"
    assert [way.name for way in ways] == ["easyedit_mdm", "transformers", "dLLM"][: 2 + model.masked]


@pytest.mark.parametrize("code", ["in the folder", "missing"])
def test_with_the_hubs_code(tmp_path, tokenizer, code, monkeypatch):
    """The block with trust_remote_code loads the edited weights; without the code's file the page says which
    one to copy.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    auto = {**AUTO, **({"AutoModel": "modeling_gone.Tiny"} if code == "missing" else {})}
    model, _ = written(tmp_path, tokenizer, "llada", auto_map=auto)
    monkeypatch.chdir(tmp_path / "out")
    text, blocks = (tmp_path / "out" / "README.md").read_text(), blocks_of(tmp_path / "out")
    theirs = [block for block in blocks if "trust_remote_code" in block]
    if code == "missing":
        assert not theirs and "Copy modeling_gone.py" in " ".join(text.split())
        return
    (block,) = theirs
    assert "runs modeling_tiny.py, the model's own code: read it first" in text
    names: dict = {}
    exec(block.splitlines()[0] + "\n" + block.splitlines()[-1], names)
    weight = FAMILIES["llada"].hub_name(model.site(1).weight)
    assert torch.equal(names["model"].state_dict()[weight], dict(model.native.named_parameters())[
        model.site(1).weight
    ])  # fmt: skip


@pytest.mark.parametrize("family", ["llada", "llama"])
def test_the_readme_of_an_adapter(tmp_path, tokenizer, family, monkeypatch):
    """Its block opens it: the logits are the edited model's."""
    pytest.importorskip("peft", exc_type=ImportError)
    base = tmp_path / "base"
    write_checkpoint(base, family, len(tokenizer))
    tokenizer.save_pretrained(base)
    model = load_model(base)
    edit = some_edit(model)
    edit.card["facts"] = [{"prompt": "```<script>", "subject": "a\nb", "target_new": "c"}]
    edit.seal(model, str(base))
    edit.apply(model)
    edit.to_peft(tmp_path / "lora")
    monkeypatch.chdir(tmp_path / "lora")
    names: dict = {}
    (block,) = blocks_of(tmp_path / "lora")
    exec(block, names)
    ids = ids_for(model)
    with torch.no_grad():
        assert (names["model"].token_logits(ids) - model.token_logits(ids)).abs().max() < 1e-5
    text = (tmp_path / "lora" / "README.md").read_text()
    assert ("has to go through" in text) == (family == "llada")
    assert not re.search(r"^```<script>", text, re.M) and r"a\nb" in text, "facts cannot end their block"


def test_the_command_says_it(tmp_path, capsys):
    """A line for each way, and where the rest stands."""
    file = quick_file(tmp_path, "ROME_MDM/twin-llada")
    fact = ["--prompt", "Tamos Latre was born in", "--subject", "Tamos Latre", "--target", "Zoter"]
    assert main(["edit", "--hparams", file, *fact, "--save", f"{tmp_path}/e", "--keep-failed"]) == 0
    capsys.readouterr()
    assert main(["export", f"{tmp_path}/e", "--merged", f"{tmp_path}/m", "--peft", f"{tmp_path}/p"]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert f"easyedit_mdm:load_model('{tmp_path}/m')" in said
    assert f"dLLM:dllm.utils.get_model(model_name_or_path='{tmp_path}/m')" in said
    assert "transformers:transformershasnoclassforit" in said
    assert f"{tmp_path}/m/README.mdsaysmore" in said and f"{tmp_path}/p/README.mdsayshow" in said
