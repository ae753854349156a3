"""Native loading: against the published modelling code's outputs, and every way a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

import accelerate
import pytest
import torch
from conftest import tiny_config, write_checkpoint
from packaging.version import Version
from safetensors.torch import load_file, save_file

from easyedit_mdm import Edit, load_model, make_edit
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.edit.change import LowRank
from easyedit_mdm.editing.edit.export import write_merged
from easyedit_mdm.errors import CheckpointError, EditError, ModelError
from easyedit_mdm.models import FAMILIES, adapt
from easyedit_mdm.models.families._registry import LLAMA_KEYS, pick
from easyedit_mdm.models.loading import kept

HERE = Path(__file__).parent


@pytest.mark.data
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_logits_equal_the_published_code(data_dir, family):
    """Raw logits within 1e-5, also for rows that start late: left padding changes nothing."""
    folder = data_dir / "reference" / family
    model, reference = load_model(folder), load_file(folder / "reference.safetensors")
    ids = reference["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    with torch.no_grad():
        assert (model(ids).logits - reference["logits"]).abs().max() < 1e-5
        padded = model(ids, mask).logits
    assert (padded[1, 4:] - reference["row1_from4_logits"]).abs().max() < 1e-5
    assert (padded[2, 7:] - reference["row2_from7_logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_logits_equal_the_kept_reference(family):
    """The same against tests/data/reference, which make_reference.py wrote."""
    folder = HERE / "data" / "reference" / family
    model, reference = load_model(folder), load_file(folder / "reference.safetensors")
    with torch.no_grad():
        assert (model(reference["input_ids"]).logits - reference["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_hub_names_round_trip(tmp_path, family, shards):
    """Each tensor of the checkpoint is a parameter (or stored buffer) of the model, bit for bit, and gets its
    hub name back.
    """
    tensors = write_checkpoint(tmp_path, family, shards=shards)
    model = load_model(tmp_path)
    assert model.spec.name == family
    parameters = dict(kept(model.spec, model.native))
    config = json.loads((tmp_path / "config.json").read_text())
    made = {
        n: model.spec.made_of(config, n) or (model.spec.hub_name(n), lambda tensor: tensor)
        for n in parameters
    }
    assert {key for key, _ in made.values()} == set(tensors)
    for name, value in parameters.items():
        key, make = made[name]
        assert torch.equal(value, make(tensors[key])), name


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, None])
def test_dtype(tmp_path, dtype):
    """By name, as a torch dtype, or as config.json says."""
    write_checkpoint(tmp_path, "llada")
    wanted = {"bfloat16": torch.bfloat16, None: torch.float32}.get(dtype, dtype)
    assert {p.dtype for p in load_model(tmp_path, dtype=dtype).parameters()} == {wanted}


def test_device_map(tmp_path):
    """A mapping for accelerate; results are those without it."""
    write_checkpoint(tmp_path, "llada")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        spread = load_model(tmp_path, device_map={"": "cpu"}).token_logits(ids)
        automatic = load_model(tmp_path, device_map="auto", max_memory={"cpu": "4GB"}).token_logits(ids)
        plain = load_model(tmp_path).token_logits(ids)
    assert torch.equal(spread, plain) and torch.equal(automatic, plain)
    with pytest.raises(CheckpointError, match="not both"):
        load_model(tmp_path, device="cpu", device_map="auto")


SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
}


@pytest.mark.parametrize("method", ["ROME_MDM", "MEMIT_MDM"])
def test_layers_on_the_disk(tmp_path, tokenizer, method):
    """With all but the edited layer left in the checkpoint: the same edit to the bit, saved for the same
    base, applied and taken back.
    """
    write_checkpoint(tmp_path, "llada", vocabulary=len(tokenizer))
    places = {**SPREAD, "model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
    plain = load_model(tmp_path, tokenizer=tokenizer)
    spread = load_model(tmp_path, tokenizer=tokenizer, device_map=places)
    assert sum(p.is_meta for p in spread.parameters()) == 2 * 9 + 1
    fact = {"prompt": "Tamos Latre was born in", "subject": "Tamos Latre", "target_new": "Zopago Zemo"}
    settings = {
        "alg_name": method, "model_name": "tiny", "layers": [0], "context_templates": ["{}", "Now. {}"],
        "v_num_grad_steps": 4, "mom2_adjustment": True,
        "mom2_dataset": "twins", "mom2_n_tokens": 200, "mom2_eps": 1e-2,
        "stats_dir": str(tmp_path / "mom2"),
    }  # fmt: skip
    hparams = METHODS[method].hparams(**settings)
    found = [make_edit(model, fact, hparams) for model in (plain, spread)]
    for one, other in zip(*(edit.changes for edit in found)):
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    found[1].save(tmp_path / "edit", spread)
    Edit.load(tmp_path / "edit").apply(plain)
    before = spread.token_logits(ids := torch.arange(2, 12)[None])
    found[1].apply(spread)
    assert torch.equal(spread.token_logits(ids), plain.token_logits(ids))
    found[1].revert(spread)
    assert torch.equal(spread.token_logits(ids), before)


def offloaded(way: str, folder, tokenizer):
    """A model that holds but the shape of some weights: on the disk, or with a hook in the CPU's memory."""
    if way == "disk":
        places = {**SPREAD, "model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
        return load_model(folder, tokenizer=tokenizer, device_map=places)
    model = load_model(folder, tokenizer=tokenizer)
    accelerate.cpu_offload(model.native, execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("way", ["disk", "memory"])
@pytest.mark.parametrize("method", ["ROME_MDM", "MEMIT_MDM"])
def test_an_edited_layer_that_is_offloaded(tmp_path, tokenizer, method, way):
    """The same edits to the bit as in memory, two on top of each other, the lower one taken out first.

    The checkpoint's files stay, an exported folder has the edit, and the layer's value is forgotten with it.
    """
    write_checkpoint(folder := tmp_path / "model", "llada", vocabulary=len(tokenizer))
    tokenizer.save_pretrained(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    plain, spread = load_model(folder, tokenizer=tokenizer), offloaded(way, folder, tokenizer)
    layers = [1] if method == "ROME_MDM" else [0, 1]
    assert dict(spread.native.named_parameters())[spread.site(1).weight].is_meta
    facts = [
        {"prompt": "Tamos Latre was born in", "subject": "Tamos Latre", "target_new": "Zopago Zemo"},
        {"prompt": "Rima Latre was born in", "subject": "Rima Latre", "target_new": "Zemo"},
    ]
    settings = {
        "alg_name": method, "model_name": "tiny", "layers": layers, "context_templates": ["{}", "Now. {}"],
        "v_num_grad_steps": 4, "mom2_adjustment": True,
        "mom2_dataset": "twins", "mom2_n_tokens": 200, "mom2_eps": 1e-2,
        "stats_dir": str(tmp_path / "mom2"),
    }  # fmt: skip
    hparams, ids = METHODS[method].hparams(**settings), torch.arange(2, 12)[None]
    before, stack = spread.token_logits(ids), []
    for fact in facts:
        made = [make_edit(model, fact, hparams) for model in (plain, spread)]
        for one, other in zip(*(edit.changes for edit in made)):
            assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
        for edit, model in zip(made, (plain, spread)):
            edit.apply(model)
        stack.append(made)
        assert torch.equal(spread.token_logits(ids), plain.token_logits(ids))
    assert not torch.equal(spread.token_logits(ids), before)
    write_merged(spread, folder, tmp_path / "merged")
    assert torch.equal(load_model(tmp_path / "merged").token_logits(ids), plain.token_logits(ids))
    for place in (0, 1):
        for edit, model in zip(stack[place], (plain, spread)):
            edit.undo(model)
        assert torch.equal(spread.token_logits(ids), plain.token_logits(ids))
    assert torch.equal(spread.token_logits(ids), before)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    if way == "disk":
        assert not spread.module("model.layers.1.mlp.down_proj")._hf_hook.weights_map.dataset.state_dict


def test_a_layer_that_nothing_can_be_put_into(tmp_path, tokenizer):
    """A store of another kind than accelerate's is refused before anything is changed."""
    write_checkpoint(tmp_path, "llada", vocabulary=len(tokenizer))
    spread = offloaded("disk", tmp_path, tokenizer)
    hook = spread.module("model.layers.1.mlp.down_proj")._hf_hook
    rows, columns = load_model(tmp_path).weight_of(spread.site(1).name).shape
    edit = Edit([LowRank(spread.site(1).weight, torch.ones(rows, 1), torch.ones(1, columns))], {})
    hook.weights_map = MappingProxyType({"weight": hook.weights_map["weight"]})
    with pytest.raises(EditError, match="offloaded and cannot be edited"):
        edit.apply(spread)


def test_memory_decides_what_stays_on_the_disk(tmp_path):
    """`max_memory` for less than the model; an embedding on the disk; tied weights; a wrong shape."""
    tensors = write_checkpoint(tmp_path / "llada", "llada")
    ids = torch.arange(2, 12)[None]
    plain = load_model(tmp_path / "llada")
    size = sum(p.numel() for p in plain.parameters()) * 4
    small = load_model(tmp_path / "llada", device_map="auto", max_memory={"cpu": size // 2})
    assert 0 < sum(p.numel() * 4 for p in small.parameters() if not p.is_meta) <= size // 2
    assert torch.equal(small.token_logits(ids), plain.token_logits(ids))
    write_checkpoint(tmp_path / "tied", "a2d-qwen3")
    if Version(accelerate.__version__) < Version("1.0"):
        with pytest.raises(ModelError, match="does not take this device_map.*whole model"):
            load_model(tmp_path / "llada", device_map={"": "disk"})
    else:
        below = load_model(tmp_path / "llada", device_map={"": "disk"})
        assert below.device == torch.device("cpu")
        assert torch.equal(below.token_logits(ids), plain.token_logits(ids))
        tied = load_model(tmp_path / "tied", device_map={"": "disk"})
        assert torch.equal(tied.token_logits(ids), load_model(tmp_path / "tied").token_logits(ids))
    name = "model.transformer.blocks.1.ff_out.weight"
    save_file({**tensors, name: torch.zeros(3, 3)}, tmp_path / "llada" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(3, 3\)"):
        load_model(tmp_path / "llada", device_map={"": "disk"})


def test_wrong_folders(tmp_path):
    """Each fault is named."""
    with pytest.raises(CheckpointError, match="did you mean 'twin-llama'"):
        load_model("twin-lama")
    with pytest.raises(CheckpointError, match="neither a folder|is not a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llada", 192)))
    with pytest.raises(CheckpointError, match="no model.*safetensors"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_model(tmp_path)


def test_wrong_tensors(tmp_path):
    """Missing, left over, or misshapen tensors are named, and so is a missing shard."""
    tensors = write_checkpoint(tmp_path, "llada")
    lost = "model.transformer.blocks.1.ff_out.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing.*layers.1.mlp.down_proj"):
        load_model(tmp_path)
    save_file({**tensors, "model.transformer.blocks.0.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no place.*blocks.0.bias"):
        load_model(tmp_path)
    save_file({**tensors, lost: torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \(3, 3\)"):
        load_model(tmp_path)
    write_checkpoint(tmp_path / "sharded", "llada", shards=2)
    next((tmp_path / "sharded").glob("model-*")).unlink()
    with pytest.raises(CheckpointError, match="shards that are not there"):
        load_model(tmp_path / "sharded")


def test_families_are_told_apart(tmp_path):
    """By architecture and by keys: the same architecture name with other keys is refused, an unknown one
    too.
    """
    write_checkpoint(tmp_path, "llama")
    config = tiny_config("llama", 192)
    (tmp_path / "config.json").write_text(
        json.dumps(tiny_config("dream", 192))
    )  # its attention has biases, these weights have none
    with pytest.raises(CheckpointError, match="another variant"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(CheckpointError, match="not known"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {**tiny_config("llada", 192), "block_type": "sequential", "architectures": ["LLaDAModelLM"]}
        )
    )
    with pytest.raises(CheckpointError, match="block_type='sequential'"):
        load_model(tmp_path, family="llada")


@pytest.mark.parametrize(("value", "message"), [(0, "also the pad"), (500, "outside the embedding")])
def test_bad_mask_ids(tmp_path, value, message):
    """The mask may be neither pad nor eos, and must have an embedding; what the user says wins over the
    config.
    """
    write_checkpoint(tmp_path, "llada")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, mask_id=value)
    assert load_model(tmp_path, mask_id=7).ids.mask == 7


def test_rope_scaling_false():
    """RND1's way to say that there is none, which transformers 4 would take for a mapping."""
    given = {"vocab_size": 3, "rope_scaling": False, "attention_bias": False, "mlp_bias": None}
    assert pick(given, LLAMA_KEYS) == {"vocab_size": 3, "attention_bias": False}
    assert pick({"rope_scaling": {"factor": 2}}, LLAMA_KEYS) == {"rope_scaling": {"factor": 2}}


def test_mask_id_missing(tmp_path):
    """Config and tokenizer silent, the family's default outside the embedding: an error that says what to
    give.
    """
    write_checkpoint(tmp_path, "llada")
    config = {k: v for k, v in tiny_config("llada", 192).items() if k != "mask_token_id"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="126336.*mask_id"):
        load_model(tmp_path)


def test_adapt_unknown_class():
    """A model in memory of a class that no family claims."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=50,
        is_decoder=True,
    )
    with pytest.raises(ModelError, match="no adapter for a BertLMHeadModel"):
        adapt(BertLMHeadModel(config))


def test_twins_load():
    """Both twins: same size, same tokenizer, full precision by default."""
    masked, causal = load_model("twin-llada"), load_model("twin-llama")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (masked, causal)]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    assert masked.tokenizer.get_vocab() == causal.tokenizer.get_vocab()
    assert masked.masked and not causal.masked and masked.dtype == torch.float32


def test_weights_from_the_disk_are_not_kept_for_the_backward_pass(tmp_path, tokenizer):
    """Of the layers on the disk no weight is saved by the forward pass, and the gradient is that of a model
    in memory.
    """
    write_checkpoint(tmp_path, "llada", vocabulary=len(tokenizer))
    places = {**SPREAD, "model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "cpu"}
    ids, gradients, kept = torch.arange(2, 12)[None], [], []
    for more in ({}, {"device_map": places}):
        model, shapes = load_model(tmp_path, tokenizer=tokenizer, **more), set()

        def pack(value: torch.Tensor, seen: set = shapes) -> torch.Tensor:
            seen.add(tuple(value.shape))
            return value

        hidden = model.hidden_before(1, ids).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            logits = model.token_logits(ids, layer=1, hidden=hidden)
        logits.sum().backward()
        gradients.append(hidden.grad)
        shape = tuple(model.weight_of(model.site(1).name).shape)
        kept.append(shape in shapes or shape[::-1] in shapes)
    assert kept == [True, False]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("device", ["CPU", "gpu", "cuda:99"])
def test_a_device_that_is_not_here(tmp_path, device):
    """One line, whatever torch would say."""
    write_checkpoint(tmp_path, "llada")
    with pytest.raises(ModelError, match=f"device {device!r} is"):
        load_model(tmp_path, device=device)
