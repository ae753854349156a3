"""An edited folder in dLLM's own classes and samplers (github.com/ZHZisZZ/dllm), as the unedited one: needs a
clone in DLLM_HOME, what it imports, EASYEDIT_MDM_DATA, and transformers 4.57.

dLLM has no SDAR, and SDAR's own modelling code is on the hub only: neither can be run here. Its edited folder
is held against the unedited one tensor by tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from easyedit_mdm import Edit, load_model
from easyedit_mdm.denoising import DecodeConfig, decode
from easyedit_mdm.editing.edit.change import LowRank
from easyedit_mdm.editing.edit.export import write_model

TOKENIZER = SimpleNamespace(mask_token_id=190, bos_token_id=0, eos_token_id=1)


def edited(data_dir: Any, family: str, folder: Any) -> Any:
    """Our model of a reference folder with an edit in it, written to `folder`."""
    base = data_dir / "reference" / family
    model = load_model(base, mask_id=190, tokenizer=None)
    site = model.site(1)
    weight = dict(model.native.named_parameters())[site.weight]
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(n, 2, generator=generator) * 0.4 for n in weight.shape]
    edit = Edit([LowRank(site.weight, sides[0], sides[1].T.contiguous(), site.transposed)])
    edit.apply(model)
    write_model(model, base, folder)
    return model


@pytest.mark.data
@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "a2d_qwen3"])
def test_an_edited_folder_is_the_unedited_one_but_for_the_weight(data_dir, family, tmp_path):
    """Same files, same configuration, same tensors, one of them changed; so what opens one opens the
    other.
    """
    base = data_dir / "reference" / family
    edited(data_dir, family, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    assert sum(not torch.equal(before[name], after[name]) for name in before) == 1
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out")]
    for config in configs:  # the one that is written names its dtype
        config.pop("dtype", None), config.pop("torch_dtype", None)
    assert configs[0] == configs[1]


@pytest.mark.data
@pytest.mark.parametrize("family", ["llada", "dream", "a2d_qwen3"])
def test_dllm_writes_what_the_edited_model_writes(data_dir, family, tmp_path, monkeypatch):
    """Its class opens the edited folder; its sampler writes what ours writes, and other than before."""
    home = os.environ.get("DLLM_HOME")
    if not home:
        pytest.skip("DLLM_HOME names no clone of dLLM")
    monkeypatch.setattr(sys, "path", [home, *sys.path])
    model = edited(data_dir, family, tmp_path / "out")
    base = data_dir / "reference" / family
    if family == "dream":  # its class asks for a file that the tiny checkpoint lacks
        base = Path(shutil.copytree(base, tmp_path / "base"))
        for folder in (base, tmp_path / "out"):
            (folder / "generation_config.json").write_text("{}")
    prompt = load_file(base / "reference.safetensors")["prompt_ids"].flatten()[:12].long()
    written = [_written(family, folder, prompt) for folder in (base, tmp_path / "out")]
    (ours,) = decode(model, [prompt], [8], DecodeConfig(steps=8, pace="linear"))
    assert written[1] == ours.tokens.tolist() and written[0] != written[1]


def _written(family: str, folder: Any, prompt: torch.Tensor) -> list[int]:
    import dllm

    if family == "dream":
        net = dllm.pipelines.dream.DreamModel.from_pretrained(folder).eval()
        sampler = dllm.pipelines.dream.DreamSampler(model=net, tokenizer=TOKENIZER)
        options = {"alg": "maskgit_plus", "temperature": 0.0, "top_k": None}
    else:
        pipelines = dllm.pipelines
        if family == "llada":
            net = _llada(folder)
        else:
            net = pipelines.a2d.A2DQwen3LMHeadModel.from_pretrained(folder).eval()
        sampler = dllm.core.samplers.MDLMSampler(model=net, tokenizer=TOKENIZER)
        options = {"temperature": 0.0, "block_size": 8}
    out = sampler.sample([prompt.tolist()], steps=8, max_new_tokens=8, **options)
    return out[0, len(prompt) : len(prompt) + 8].tolist()


def _llada(folder: Any) -> Any:
    """dLLM's LLaDA; its `from_pretrained` makes the weights on CUDA whatever there is."""
    from dllm.pipelines.llada.models import modeling_llada as theirs

    config = theirs.LLaDAConfig.from_pretrained(folder)
    sizes = theirs.create_model_config_from_pretrained_config(config)
    sizes.init_device = "cpu"
    net = theirs.LLaDAModelLM(config, model=theirs.LLaDAModel(sizes, init_params=False)).eval()
    net.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return net
