"""Families: who sees whom as data, and each family against the published code's own numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file

from easyedit_mdm import DecodeConfig, decode, load_model, make_edit
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.solve.rank_one import site_values
from easyedit_mdm.editing.solve.sites import settled
from easyedit_mdm.errors import CheckpointError, IncompatibleVersionError, ModelError
from easyedit_mdm.models import FAMILIES, Adapter, adapt, geometry, native
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.hooks import reading_input
from easyedit_mdm.models.prompts import encode, span, target_ids
from easyedit_mdm.models.tables import with_table

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
RUNNER = Path(__file__).parent.parent / "benchmarks" / "families_easyedit.json"
ENCODERS = ["bert", "modernbert"]
REFERENCES = {
    "a2d_qwen3": {"mask_id": 190},
    "sdar": {},
    "illada": {},
    "mmada": {},
    "fast_dllm_v2": {"mask_id": 190},
}
REFERENCES |= {"llada_moe": {"mask_id": 190}, "llada2_moe": {"mask_id": 190, "block": 4}, "rnd1": {}}
REFERENCES |= {name: {} for name in ENCODERS}


def seen(attention: Attention, length: int, canvas: int, padding: int = 0) -> list[list[bool]]:
    """Which columns each column sees, by the mask that the native class is given; padding stands on the
    left.
    """
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
    """Every kind of attention, against the rule spelled out; padding on the left moves nothing and is seen by
    nobody.
    """
    attention, length = Attention(block, edges, context), 11
    found = seen(attention, length + padding, prompt + padding, padding)
    for i in range(length):
        assert found[i + padding] == [False] * padding + [
            by_hand(attention, prompt, i, j) for j in range(length)
        ], i
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
        (Attention(4, first_alone=True), 5, (3, 1, 3)),
        (Attention(4, first_alone=True), 8, (1, 3, 1, 2)),
    ],
)
def test_blocks_of_a_canvas(attention, prompt, sizes):
    """Seven slots fall into the blocks that the mask gives them."""
    assert attention.blocks(prompt, 7) == sizes
    ranks = geometry.ranks(torch.ones(1, prompt + 7).long(), attention, torch.tensor([prompt]))[0, prompt:]
    if not attention.first_alone:
        assert tuple(torch.unique_consecutive(ranks, return_counts=True)[1].tolist()) == sizes
    assert attention.block is None or attention.blocks(prompt, 7, within=1) == (1,) * 7


def test_causal_ranks_are_the_causal_models_own(tiny):
    """A masked family with blocks of one token computes what its autoregressive relative does."""
    causal = tiny("qwen3")
    masked = tiny("a2d-qwen3", block=1)
    masked.native.load_state_dict(causal.native.state_dict())
    ids = torch.arange(20, 32)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        one, other = (
            causal(ids, attention_mask=mask, position_ids=geometry.positions(mask)).logits,
            masked(ids, mask).logits,
        )
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
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "masked_diffusion": {**config["masked_diffusion"], **changes}})
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "masked_diffusion"})
    )
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
    with pytest.raises(ModelError, match="neither blocks nor a context"):
        Attention(4, masks_last=True)


@pytest.mark.parametrize(
    ("family", "entry"),
    [("fast-dllm-v2", "bd_size"), ("llada2", "block_size"), ("sdar-moe", "block_size")],
)
def test_a_block_of_no_tokens(tmp_path, family, entry):
    """Named with its family, whatever the configuration calls it."""
    write_checkpoint(tmp_path, family)
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config(family, 192), entry: 0}))
    with pytest.raises(CheckpointError, match=f"{family}: a block of 0 tokens"):
        load_model(tmp_path)


# ---- against the published code ----------------------------------------------------------------------------
references = pytest.mark.parametrize("folder", list(REFERENCES))


def reference(folder: Path, **options: Any) -> Adapter:
    """A reference checkpoint; skipped where transformers is older than its native class."""
    try:
        return load_model(folder, **options)
    except IncompatibleVersionError as error:
        pytest.skip(str(error))


@pytest.mark.data
@references
@torch.no_grad()
def test_logits_are_the_published_ones(data_dir, folder):
    """Raw logits within 1e-4, of whole rows and of rows that start late, padded on the left."""
    path = data_dir / "reference" / folder
    model, known = reference(path, **REFERENCES[folder]), load_file(path / "reference.safetensors")
    ids = known["input_ids"]
    assert (model(ids).logits - known["logits"]).abs().max() < 1e-4
    late = {name: re.fullmatch(r"row(\d)_from(\d+)_logits", name) for name in known}
    assert sum(map(bool, late.values())) == 2
    for name, found in late.items():
        if found:
            row, start = int(found[1]), int(found[2])
            mask = torch.ones_like(ids)
            mask[row, :start] = 0
            assert (model(ids, mask).logits[row, start:] - known[name]).abs().max() < 1e-4


@pytest.mark.data
@torch.no_grad()
def test_logits_with_other_blocks(data_dir):
    """dLLM's bd3lm mask on the same checkpoint, told where the canvas begins or not; SDAR with a block as
    long as the row.
    """
    path = data_dir / "reference" / "a2d_qwen3"
    model, known = reference(path, mask_id=190, block=4), load_file(path / "reference.safetensors")
    canvas = torch.full((3,), 12)
    for options in ({}, {"canvas": canvas}):
        assert (
            model(known["input_ids"], **options).logits - known["logits_block4_causal"]
        ).abs().max() < 1e-4
    path = data_dir / "reference" / "fast_dllm_v2"
    model, known = reference(path, mask_id=190, block=32), load_file(path / "reference.safetensors")
    assert (model(known["input_ids"]).logits - known["logits_block32_default"]).abs().max() < 1e-4
    path = data_dir / "reference" / "sdar"
    model, known = reference(path, block=20), load_file(path / "reference.safetensors")
    assert (model(known["input_ids"]).logits - known["logits_block20_full"]).abs().max() < 1e-4


def llada_cases(known: dict[str, torch.Tensor]) -> Iterator[tuple[dict, torch.Tensor, dict, torch.Tensor]]:
    """LLaDA's generate.py: options of the model, prompt, settings, result."""
    for name, result in known.items():
        if found := re.fullmatch(r"generated_low_confidence_len8_steps(\d)_block(\d)", name):
            yield {}, known["prompt_ids"], {"steps": int(found[1]), "block_length": int(found[2])}, result


def a2d_cases(known: dict[str, torch.Tensor]) -> Iterator[tuple[dict, torch.Tensor, dict, torch.Tensor]]:
    """dLLM's MDLMSampler and BD3LMSampler; of the padded batch each row alone, without what pads it."""
    for name, result in known.items():
        found = re.fullmatch(r"generated_(mdlm|bd3lm)_(\w+)_len8_steps(\d)_block(\d)", name)
        if not found:
            continue
        steps, block = int(found[3]), int(found[4])
        settings = {"steps": steps, "pace": "linear"} | (
            {"block_length": block} if found[1] == "mdlm" else {}
        )
        options = {"block": block} if found[1] == "bd3lm" else {}
        if found[2] == "batch_12_and_9":
            for row, length in enumerate((12, 9)):
                yield (
                    options,
                    known["input_ids"][row : row + 1, :length],
                    settings,
                    result[row : row + 1, : length + 8],
                )
        elif found[2] == "prompt10":
            yield (
                options,
                known["prompt_ids"][:, :10],
                settings,
                result[:, 2:],
            )  # padded on the left to whole blocks
        else:
            yield options, known["prompt_ids"], settings, result


def sdar_cases(known: dict[str, torch.Tensor]) -> Iterator[tuple[dict, torch.Tensor, dict, torch.Tensor]]:
    """SDAR's block_diffusion_generate."""
    pattern = r"generated_(argmax|topk1)_(\w+?)(?:_t(\d+))?(?:_prompt(\d+))?_gen(\d+)_steps(\d)"
    for name, result in known.items():
        if found := re.fullmatch(pattern, name):
            prompt = known["prompt12_ids" if found[4] == "12" else "prompt_ids"]
            blocks = -(-result.shape[1] // 4) - prompt.shape[1] // 4
            settings: dict[str, Any] = {"steps": int(found[6]) * blocks}
            settings |= {"order": "left_to_right"} if found[2] == "sequential" else {}
            settings |= {"threshold": int(found[3]) / 100} if found[3] else {}
            settings |= {"top_k": 1} if found[1] == "topk1" else {}
            yield {}, prompt, settings, result


def fast_dllm_cases(
    known: dict[str, torch.Tensor],
) -> Iterator[tuple[dict, torch.Tensor, dict, torch.Tensor]]:
    """Fast-dLLM v2's generate; its output ends with the first token of the next block."""
    for name, result in known.items():
        if found := re.fullmatch(r"generated_prompt(\d+)_new16_block8_small(\d)_t(\d+)", name):
            settings = {"block_length": int(found[2]), "threshold": int(found[3]) / 100}
            yield {}, known[f"prompt{found[1]}_ids"], settings, result


def llada2_cases(known: dict[str, torch.Tensor]) -> Iterator[tuple[dict, torch.Tensor, dict, torch.Tensor]]:
    """LLaDA2.0's generate."""
    for name, result in known.items():
        if found := re.fullmatch(r"generated_llada20_prompt(\d+)_gen(\d+)_block4_steps(\d)_t(\d+)", name):
            prompt = known["prompt12_ids" if found[1] == "12" else "prompt_ids"]
            blocks = -(-result.shape[1] // 4) - prompt.shape[1] // 4
            yield {}, prompt, {"steps": int(found[3]) * blocks, "threshold": int(found[4]) / 100}, result


def encoder_cases(known: dict[str, torch.Tensor]) -> Iterator[tuple[dict, torch.Tensor, dict, torch.Tensor]]:
    """dLLM's MDLMSampler on BERT-type models."""
    for name, result in known.items():
        if found := re.fullmatch(r"generated_mdlm_low_confidence_prompt5_len8_steps(\d)_block(\d)", name):
            settings = {"steps": int(found[1]), "block_length": int(found[2]), "pace": "linear"}
            yield {}, known["prompt5_ids"], settings, result


SAMPLERS = {
    "a2d_qwen3": (a2d_cases, 8),
    "sdar": (sdar_cases, 10),
    "illada": (llada_cases, 3),
    "mmada": (llada_cases, 3),
    "fast_dllm_v2": (fast_dllm_cases, 12),
    "llada_moe": (llada_cases, 3),
    "llada2_moe": (llada2_cases, 6),
    "bert": (encoder_cases, 3),
    "modernbert": (encoder_cases, 3),
}


@pytest.mark.data
@references
def test_tokens_are_the_published_samplers(data_dir, folder):
    """Each family's own sampler, token for token, in every setting that is kept."""
    if folder not in SAMPLERS:
        pytest.skip("its sampler has a test of its own")
    path = data_dir / "reference" / folder
    known = load_file(path / "reference.safetensors")
    cases, count = SAMPLERS[folder]
    every = list(cases(known))
    assert len(every) == count
    for options, prompt, settings, result in every:
        model = reference(path, **{**REFERENCES[folder], **options})
        made = model.generate(prompt, max_new_tokens=result.shape[1] - prompt.shape[1], **settings)
        assert torch.equal(made, result), (options, settings)


@pytest.mark.data
def test_a_padded_batch_writes_what_its_rows_do(data_dir):
    """dLLM's batch of prompts of 12 and 9 tokens, padded on the left here: both rows as published."""
    path = data_dir / "reference" / "a2d_qwen3"
    model, known = reference(path, mask_id=190), load_file(path / "reference.safetensors")
    ids = known["input_ids"][:2, :12].clone()
    ids[1] = torch.cat([torch.zeros(3, dtype=torch.long), ids[1, :9]])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    made = model.generate(ids, attention_mask=mask, max_new_tokens=8, steps=8, block_length=8, pace="linear")
    wanted = known["generated_mdlm_batch_12_and_9_len8_steps8_block8"]
    assert torch.equal(made[0, 12:], wanted[0, 12:20]) and torch.equal(made[1, 12:], wanted[1, 9:17])


@pytest.mark.data
@pytest.mark.parametrize("folder", ENCODERS)
@torch.no_grad()
def test_masked_encoders(data_dir, folder):
    """Right-padded rows as the rows alone; masks inside a text filled one a pass, the most probable first."""
    path = data_dir / "reference" / folder
    model, known = reference(path), load_file(path / "reference.safetensors")
    logits = model.token_logits(known["right_padded_ids"], known["right_padded_attention_mask"])
    for name, length in (("row1_first14_logits", 14), ("row2_first10_logits", 10)):
        assert (logits[int(name[3]), :length] - known[name]).abs().max() < 1e-4
    text = known["prompt_ids"][0]
    start = int((text == model.ids.mask).nonzero()[0])
    given = torch.where(text == model.ids.mask, -1, text)[start:]
    filled = decode(model, [text[:start]], [len(given)], given=[given])[0]
    assert torch.equal(
        torch.cat([text[:start], filled.tokens]), known["generated_low_confidence_one_per_step"][0]
    )


def test_what_a_tokenizer_puts_behind_a_text(tiny, tokenizer):
    """[CLS] stays in front of a prompt, [SEP] behind it would stand before the target: it is left out."""
    import copy

    from tokenizers.processors import TemplateProcessing

    model = tiny("bert")
    plain = encode(model, "The river of Ann")
    model.tokenizer = copy.deepcopy(tokenizer)
    pieces = {name: model.tokenizer.convert_ids_to_tokens(i) for name, i in (("first", 2), ("last", 3))}
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{pieces['first']} $A {pieces['last']}",
        special_tokens=[(pieces["first"], 2), (pieces["last"], 3)],
    )
    assert model.tokenizer("The river of Ann")["input_ids"] == [2, *plain, 3]
    assert encode(model, "The river of Ann") == [2, *plain]
    ids, first, last = span(model, "The river of Ann", 13, 16)
    assert ids == [2, *plain] and model.tokenizer.decode(ids[first : last + 1]).strip() == "Ann"
    behind = target_ids(model, "The river of Ann", "is red")
    assert model.tokenizer.decode(behind.tolist()).strip() == "is red"


def test_older_bert_checkpoints(tmp_path):
    """gamma and beta for a norm's weight and bias, a pooler, a next-sentence head, stored positions: read, or
    left aside.
    """
    tensors = write_checkpoint(tmp_path, "bert")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {}
    for name, value in tensors.items():
        for new, before in names.items():
            name = name.removesuffix(new) + before if name.endswith(new) else name
        old[name] = value
    extra = {"bert.pooler.dense.weight": torch.zeros(32, 32), "cls.seq_relationship.bias": torch.zeros(2)}
    save_file(
        {**old, **extra, "bert.embeddings.position_ids": torch.zeros(1, 128)}, tmp_path / "model.safetensors"
    )
    model = load_model(tmp_path)
    assert all(
        torch.equal(value, tensors[name]) for name, value in model.named_parameters() if name in tensors
    )
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config("bert", 192), "is_decoder": True}))
    with pytest.raises(CheckpointError, match="is_decoder"):
        load_model(tmp_path)


@pytest.mark.data
@pytest.mark.parametrize("steps", [4, 8])
def test_rnd1_by_entropy(data_dir, steps):
    """RND1's greedy diffusion_sample: eight masks, and behind them the place that it reserves and leaves as
    padding.
    """
    path = data_dir / "reference" / "rnd1"
    model, known = reference(path), load_file(path / "reference.safetensors")
    settings = DecodeConfig(order="entropy", pace="floor", steps=steps, top_k=0)
    given = torch.tensor([-1] * 8 + [0])
    path_taken = decode(model, [known["prompt_ids"][0]], [9], settings, given=[given])[0]
    assert torch.equal(path_taken.tokens, known[f"generated_greedy_max_new9_steps{steps}"][0, 12:])


@pytest.mark.data
@torch.no_grad()
def test_wedlm_with_its_masks_last(data_dir):
    """Rows as they stand, a mask among known tokens read where the published decoder moves it, and its
    generate.
    """
    path = data_dir / "reference" / "wedlm"
    model, known = reference(path), load_file(path / "reference.safetensors")
    assert (model(known["input_ids"]).logits - known["logits"]).abs().max() < 1e-4
    moved = model(known["reordered_from_ids"][None]).logits[0, known["reordered_position_ids"][0]]
    assert (moved - known["reordered_logits"][0]).abs().max() < 1e-4
    for block, threshold in ((4, None), (8, None), (8, 0.3)):
        made = model.generate(known["prompt_ids"], max_new_tokens=8, block_length=block, threshold=threshold)
        assert torch.equal(made, known[f"generated_len8_block{block}_t{int((threshold or 0) * 100)}"])


# ---- mixtures of experts -----------------------------------------------------------------------------------
MIXTURES = [name for name in FAMILIES if FAMILIES[name].experts is not None]
FACT = {
    "prompt": "The river of Ann is",
    "subject": "Ann",
    "target_new": "the",
}  # one token: one state, one key


def rome(**changes: Any) -> Any:
    """ROME_MDM's settings with one context prefix, so that k* is the bare prompt's key."""
    base = {
        "layers": [1],
        "v_num_grad_steps": 6,
        "v_lr": 0.5,
        "v_weight_decay": 1e-3,
        "clamp_norm_factor": 10.0,
    }
    plain = {
        "alg_name": "ROME_MDM",
        "model_name": "tiny",
        "context_templates": ["{}"],
        "state_schedule": "full_mask",
    }
    return METHODS["ROME_MDM"].hparams(**{**plain, **base, **changes})


@pytest.mark.data
@torch.no_grad()
def test_routers_choose_as_published(data_dir):
    """LLaDA2's two mixtures: raw scores and chosen experts at every token."""
    path = data_dir / "reference" / "llada2_moe"
    model, known = reference(path, mask_id=190, block=4), load_file(path / "reference.safetensors")
    for number, layer in enumerate((1, 2)):
        weights, chosen = model.routes(layer, known["input_ids"])
        assert torch.equal(chosen.sort(-1).values, known[f"router_topk_{number}"])
        scores = known[f"router_logits_{number}"].sigmoid().gather(-1, chosen)
        assert (weights - 2.5 * scores / scores.sum(-1, keepdim=True)).abs().max() < 1e-5


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_a_mixture_is_its_experts_summed(tiny, family):
    """Spelled out token by token, and the same while a hook listens to some of the experts as one map."""
    model = tiny(family)
    mixture = model.module(model.spec.paths.mlp.format(1))
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    weights, chosen = mixture.gate(hidden.flatten(0, 1))
    wanted = torch.zeros(14, 32)
    for t, token in enumerate(hidden.flatten(0, 1)):
        for weight, number in zip(weights[t], chosen[t].tolist()):
            wanted[t] += weight * mixture.experts[number](token)
        if mixture.shared_experts is not None:
            wanted[t] += mixture.shared_experts(token)
    assert (mixture(hidden) - wanted.view(2, 7, 32)).abs().max() < 1e-5
    site = model.through(Site(1, "x", False, tuple(map(str, range(len(mixture.experts)))), True), (0, 3))
    with reading_input(model.module(site.name)) as keys:
        assert (mixture(hidden) - wanted.view(2, 7, 32)).abs().max() < 1e-5
    assert keys[0].shape == (2, 7, 24) and model.weight_of(site.name).shape == (32, 24)
    parts = torch.stack([(chosen == number).any(-1) for number in (0, 3)], dim=-1).view(2, 7, 2)
    assert torch.equal(keys[0].unflatten(-1, (2, 12)).abs().amax(-1) > 0, parts)
    assert set(dict(model.named_parameters())) == set(dict(tiny(family).named_parameters()))


@pytest.mark.parametrize("family", MIXTURES)
def test_an_edit_of_the_experts_moves_the_block_by_delta(tiny, family):
    """ROME through the experts that the subject's token goes through: the block's output there moves by
    delta, no expert else changes.
    """
    model = tiny(family)
    template = model.spec.paths.mlp + ".experts"
    settings = rome(rewrite_module_tmp=template)
    fact = tokenise(model, EditRequest.of(FACT), settings)
    site = settled(model, model.site(1, template), [fact])
    delta = site_values(model, [EditRequest.of(FACT)], settings)[0].delta
    edit = make_edit(model, FACT, settings)
    prompt = fact.contexts[0]
    slots = model.behind(fact.target, torch.zeros(1).bool())
    ids, canvas = torch.cat([prompt.ids, slots])[None], torch.tensor([len(prompt.ids)])
    weights, chosen = model.routes(1, ids, canvas=canvas)
    numbers = sorted(chosen[0, prompt.fact_at].tolist())
    names = [f"{template.format(1)}.{n}.down_proj.weight" for n in numbers]
    assert [change.name for change in edit.changes] == names == list(site.weights)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        plain = model.hidden_before(2, ids, canvas=canvas)[0, prompt.fact_at]
        edit.apply(model)
        moved = model.hidden_before(2, ids, canvas=canvas)[0, prompt.fact_at] - plain
        assert torch.equal(model.routes(1, ids, canvas=canvas)[1], chosen)
    assert (moved - delta).norm() < 1e-4 * delta.norm() and delta.norm() > 0
    edit.revert(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_sites_of_a_mixture(tiny):
    """The dense layer's map, the shared expert's, all experts; one expert by itself is refused, and so is a
    layer without any.
    """
    model = tiny("llada2")
    assert model.site(0).name == "model.layers.0.mlp.down_proj"
    assert model.site(1).name == "model.layers.1.mlp.shared_experts.down_proj"
    routed = model.site(1, "model.layers.{}.mlp.experts")
    assert routed.routed and len(routed.weights) == 8
    with pytest.raises(ModelError, match="one expert of several"):
        model.site(1, "model.layers.{}.mlp.experts.3.down_proj")
    with pytest.raises(ModelError, match="no mixture of experts"):
        model.routes(0, torch.arange(5, 9)[None])


@pytest.mark.parametrize("family", MIXTURES)
def test_a_missing_expert(tmp_path, family):
    """It is named."""
    tensors = write_checkpoint(tmp_path, family)
    lost = "model.layers.1.mlp.experts.4.down_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 parameters are missing, such as {re.escape(lost)}"):
        load_model(tmp_path)


def test_missing_experts_in_one_tensor(tmp_path):
    """DiffusionGemma's are one tensor a layer, and a buffer that is stored is missed, too."""
    tensors = write_checkpoint(tmp_path, "diffusion-gemma")
    for lost in (
        "model.decoder.layers.1.experts.down_proj",
        "model.encoder.language_model.layers.0.layer_scalar",
    ):
        save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"1 parameters are missing, such as {re.escape(lost)}"):
            load_model(tmp_path)


@torch.no_grad()
def test_qwen3_moe_is_transformers_own(tmp_path):
    """Our mixtures inside the dense class, against the class that transformers has for them."""
    import transformers

    if not hasattr(transformers, "Qwen3MoeForCausalLM"):
        pytest.skip("needs transformers 4.51")
    write_checkpoint(tmp_path, "qwen3-moe")
    ours, theirs = load_model(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20, 40)[None]
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    assert torch.equal(
        ours.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0),
        theirs.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0),
    )


# ---- which family, and which not ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"}},
            "auto_map names modeling_stable_diffcoder.StableDiffcoderForCausalLM",
        ),
        ({"mask_token_id": 5}, "mask_token_id=5"),
        ({"block_size": 32}, "block_size=32"),
        ({"masked_diffusion": {"attention": "full"}}, "masked_diffusion="),
        (
            {"architectures": ["LlamaForCausalLM", "LlamaForMaskedDiffusion"]},
            "architectures names LlamaForMaskedDiffusion",
        ),
    ],
)
def test_diffusion_under_an_autoregressive_name(tmp_path, changes, message):
    """Refused from a folder and in memory, with what gives it away; naming the family loads it."""
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path, "llama")
    config = {**tiny_config("llama", 192), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_model(tmp_path)
    assert "family='llama'" in str(caught.value) and "docs/extending.md" in str(caught.value)
    assert load_model(tmp_path, family="llama").spec.name == "llama"
    with pytest.raises(ModelError, match=re.escape(message)):
        adapt(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False))


def test_plain_folders_are_not_refused(tmp_path):
    """What transformers itself writes for an autoregressive model, and an auto_map of its own class or of a
    tokenizer.
    """
    write_checkpoint(tmp_path, "llama")
    remote = {
        "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",
        "AutoTokenizer": ["tokenization_own.Own", None],
    }
    for changes in ({}, {"auto_map": remote}, {"mask_token_id": None}):
        (tmp_path / "config.json").write_text(json.dumps({**tiny_config("llama", 192), **changes}))
        assert not load_model(tmp_path).masked


def test_a_class_of_ones_own_is_not_taken_for_its_base():
    """A model in memory whose class only derives from a native one, and whose model_type is the base's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class StableDiffcoderForCausalLM(LlamaForCausalLM):
        """As published: Llama with another way to write."""

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    with pytest.raises(ModelError, match="no adapter for a StableDiffcoderForCausalLM"):
        adapt(StableDiffcoderForCausalLM(LlamaConfig(**sizes)))
    assert adapt(LlamaForCausalLM(LlamaConfig(**sizes))).spec.name == "llama"


def test_what_an_unknown_family_has_in_common(tmp_path):
    """The error names families whose tensors or fields it shares, signs of diffusion and of experts, and
    where to go on.
    """
    write_checkpoint(tmp_path, "sdar")
    config = {
        **tiny_config("sdar", 192),
        "architectures": ["NovelDiffusionLM"],
        "model_type": "qwen3",
        "num_experts": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="architecture 'NovelDiffusionLM' is not known") as caught:
        load_model(tmp_path)
    told = str(caught.value)
    for part in (
        "its tensors are named as those of",
        "sdar",
        "model_type 'qwen3' is that of qwen3",
        "it has the fields that",
        "mask_token_id=1",
        "block_size=4",
        "num_experts=8",
        "docs/extending.md",
        "family=...",
    ):
        assert part in told, part
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaLM"]}))
    save_file({"mixer.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="MambaLM") as caught:
        load_model(tmp_path)
    assert "In common" not in str(caught.value)


def test_a_native_class_that_is_not_there(tmp_path, monkeypatch):
    """An older transformers has no Qwen3: which version has it is said."""
    import transformers

    write_checkpoint(tmp_path, "sdar")
    monkeypatch.setattr(transformers, "Qwen3ForCausalLM", None)
    with pytest.raises(
        IncompatibleVersionError, match="no Qwen3 language model: it came with transformers 4.51"
    ):
        load_model(tmp_path)
    assert native.class_names(FAMILIES["sdar"])


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].masked])
def test_a_wrong_mask_id(tmp_path, family):
    """Beyond the embedding, or the pad token's: refused for every masked family."""
    write_checkpoint(tmp_path, family)
    with pytest.raises(ModelError, match="outside the embedding"):
        load_model(tmp_path, mask_id=500)
    with pytest.raises(ModelError, match="also the pad or eos"):
        load_model(tmp_path, mask_id=0)


@pytest.mark.parametrize(
    "family", ["sdar", "mmada", "illada", "masked-llama", "llada2", "wedlm", "diffusion-gemma"]
)
def test_a_truncated_shard(tmp_path, family):
    """A shard that ends too soon is named, and nothing is loaded from it."""
    write_checkpoint(tmp_path, family, shards=2)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=re.escape(shard.name)):
        load_model(tmp_path)


def with_runner(page: str) -> str:
    """A page whose table of what EasyEdit's runner did is made anew."""
    rows = ["| family | records | likelier | written | log-likelihood, before | after |", "|" + " --- |" * 6]
    for found in sorted(json.loads(RUNNER.read_text()).values(), key=lambda one: one["family"]):
        before, after = found["log_likelihood_before"], found["log_likelihood_after"]
        rose = sum(b < a for b, a in zip(before, after))
        told = [", ".join(f"{x:.1f}" for x in values) for values in (before, after)]
        cells = [f"`{found['family']}`", found["records"], rose, found["written"], *told]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    made = "<!-- runner -->\n" + "\n".join(rows) + "\n<!-- /runner -->"
    assert page.count("<!-- runner -->") == 1
    return re.sub(r"<!-- runner -->.*<!-- /runner -->", lambda _: made, page, flags=re.DOTALL)


def test_the_page_has_the_tables():
    """docs/families.md holds the registry's table, and what benchmarks/families_easyedit.py found."""
    page = PAGE.read_text()
    assert with_table(page) == page, "the registry has changed: python tests/test_families.py"
    assert with_runner(page) == page, "the benchmark has been run anew: python tests/test_families.py"
    assert all(FAMILIES[name].releases and FAMILIES[name].verified for name in FAMILIES)


def test_what_the_runner_did():
    """Of each family with a reference checkpoint: three records, each likelier, at least one written."""
    found = json.loads(RUNNER.read_text())
    assert {*REFERENCES, "wedlm", "diffusion_gemma", "llada", "dream"} == set(found)
    for one in found.values():
        pairs = list(zip(one["log_likelihood_before"], one["log_likelihood_after"], strict=True))
        assert one["records"] == len(pairs) == 3 and all(before < after for before, after in pairs)
        assert one["written"] >= 1, one


if __name__ == "__main__":
    PAGE.write_text(with_runner(with_table(PAGE.read_text())))
