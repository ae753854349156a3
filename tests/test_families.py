"""Families: who sees whom as data, and each family against the published code's own numbers."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_config, write_checkpoint

from easyedit_mdm import load_model
from easyedit_mdm.errors import CheckpointError, ModelError
from easyedit_mdm.models import geometry
from easyedit_mdm.models.attention import Attention


def seen(attention: Attention, length: int, canvas: int, padding: int = 0) -> list[list[bool]]:
    """Which columns each column sees, by the mask that the native class is given; padding stands on the left."""
    mask = (torch.arange(length) >= padding).long()[None]
    ranks = geometry.ranks(mask, attention, torch.tensor([canvas]))
    return (geometry.see_ranked(mask, ranks, torch.float32)[0, 0] == 0).tolist()


def by_hand(attention: Attention, prompt: int, i: int, j: int) -> bool:
    """Whether token i sees token j, spelled out case by case."""
    if attention.context == "causal" and i < prompt:
        return j <= i
    if attention.block is None:
        return True
    if attention.context == "causal" and j < prompt:
        return True
    edge = prompt if attention.edges == "canvas" else 0
    return (j - edge) // attention.block <= (i - edge) // attention.block


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("prompt", [1, 5, 8])
@pytest.mark.parametrize("block", [None, 1, 3, 4])
@pytest.mark.parametrize("edges", ["start", "canvas"])
@pytest.mark.parametrize("context", ["blocks", "causal"])
def test_who_sees_whom_is_what_it_says(context, edges, block, prompt, padding):
    """Every kind of attention, against the rule spelled out; padding on the left moves nothing and is seen by nobody."""
    attention, length = Attention(block, edges, context), 11
    found = seen(attention, length + padding, prompt + padding, padding)
    for i in range(length):
        assert found[i + padding] == [False] * padding + [by_hand(attention, prompt, i, j) for j in range(length)], i
    if not attention.asks_for_canvas:
        assert found == seen(attention, length + padding, padding + 1, padding)


@pytest.mark.parametrize(
    ("attention", "prompt", "sizes"),
    [
        (Attention(), 5, (7,)),
        (Attention(1), 5, (1,) * 7),
        (Attention(4), 5, (3, 4)),
        (Attention(4), 8, (4, 3)),
        (Attention(4, "canvas"), 5, (4, 3)),
        (Attention(4, "canvas", "causal"), 5, (4, 3)),
        (Attention(32), 3, (7,)),
    ],
)
def test_blocks_of_a_canvas(attention, prompt, sizes):
    """Seven slots fall into the blocks that the mask gives them."""
    assert attention.blocks(prompt, 7) == sizes
    ranks = geometry.ranks(torch.ones(1, prompt + 7).long(), attention, torch.tensor([prompt]))[0, prompt:]
    assert tuple(torch.unique_consecutive(ranks, return_counts=True)[1].tolist()) == sizes


def test_causal_ranks_are_the_causal_models_own(tiny):
    """A masked family with blocks of one token computes what its autoregressive relative does."""
    causal = tiny("qwen3")
    masked = tiny("a2d-qwen3", block=1)
    masked.native.load_state_dict(causal.native.state_dict())
    ids = torch.arange(20, 32)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        one, other = causal(ids, attention_mask=mask, position_ids=geometry.positions(mask)).logits, masked(ids, mask).logits
    assert (one - other)[mask.bool()].abs().max() < 1e-5


def test_where_the_canvas_begins(tiny):
    """Told, or found at the first mask; a row without one is context to its end."""
    model = tiny("masked-qwen3")
    ids = torch.arange(20, 32)[None]
    ids[0, 7:] = model.ids.mask
    with torch.no_grad():
        found = model.token_logits(ids)
        assert torch.equal(found, model.token_logits(ids, canvas=torch.tensor([7])))
        assert not torch.equal(found, model.token_logits(ids, canvas=torch.tensor([6])))
        plain = torch.arange(20, 32)[None]
        assert torch.equal(model.token_logits(plain), model.token_logits(plain, canvas=torch.tensor([12])))
        half = model.hidden_before(1, ids, canvas=torch.tensor([6]))
        above = model.token_logits(ids, layer=1, hidden=half, canvas=torch.tensor([6]))
        assert torch.equal(above, model.token_logits(ids, canvas=torch.tensor([6])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block of 0 tokens"),
        ({"block_size": None}, "attention='block' with block_size=None"),
        ({"attention": "full"}, "attention='full' with block_size=4"),
        ({"edges": "middle"}, "edges='middle'"),
        ({"context": "none"}, "context='none'"),
        ({"logit_shift": "yes"}, "logit_shift='yes'"),
    ],
)
def test_adapted_configurations_are_checked(tmp_path, changes, message):
    """Each wrong entry of the section is named, and so is a missing section."""
    write_checkpoint(tmp_path, "masked-qwen2")
    config = tiny_config("masked-qwen2", 192)
    (tmp_path / "config.json").write_text(json.dumps({**config, "masked_diffusion": {**config["masked_diffusion"], **changes}}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "masked_diffusion"}))
    with pytest.raises(CheckpointError, match="needs a section 'masked_diffusion'"):
        load_model(tmp_path)


def test_blocks_that_no_model_has(tmp_path):
    """Block size 0, in the configuration or given; a block for a causal family; none where one is needed."""
    write_checkpoint(tmp_path / "sdar", "sdar")
    with pytest.raises(CheckpointError, match="block of 0 tokens"):
        load_model(tmp_path / "sdar", block=0)
    config = tiny_config("sdar", 192)
    (tmp_path / "sdar" / "config.json").write_text(json.dumps({**config, "block_size": 0}))
    with pytest.raises(CheckpointError, match="sdar: a block of 0 tokens"):
        load_model(tmp_path / "sdar")
    (tmp_path / "sdar" / "config.json").write_text(json.dumps({**config, "block_size": None}))
    with pytest.raises(CheckpointError, match="lacks block_size"):
        load_model(tmp_path / "sdar")
    write_checkpoint(tmp_path / "llama", "llama")
    with pytest.raises(CheckpointError, match="is causal"):
        load_model(tmp_path / "llama", block=4)
    with pytest.raises(ModelError, match="edges"):
        Attention(4, "left")
