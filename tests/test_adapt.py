"""`easyedit-mdm adapt`: who sees whom, what is trained, going on after a kill, and the folders that come out."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from easyedit_mdm.cli import main
from easyedit_mdm.errors import CheckpointError, DataError, HyperParameterError, MissingPackageError, ModelError
from easyedit_mdm.models import load_adapter
from easyedit_mdm.training.adapting import CHECKPOINT, Recipe, Run, train
from easyedit_mdm.training.blocks import Block, Noised, Opening, noise, noise_opened, opening, pack, rows_of, visible
from easyedit_mdm.training.commands import AdaptJob, adapt_model
from easyedit_mdm.training.corpus import Corpus, Piece, corpus_of, sentences, text_of
from easyedit_mdm.training.heldout import HeldOut
from easyedit_mdm.training.loop import Log, cosine, load_checkpoint, save_checkpoint
from easyedit_mdm.training.lora import CONFIG, MASK_DELTA, WEIGHTS, load_lora, mask_token_of, student_of, write_adapter
from easyedit_mdm.training.merging import write_merged
from easyedit_mdm.training.objective import clean_part, losses
from easyedit_mdm.training.splits import HELD_OUT_FILES, Mentions, held_out_subjects, same_name

MASK = 5


def tiny(kind: str, tied: bool = False, seed: int = 0):
    """A causal model with random weights: 2 layers, width 32, the twins' vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config(
            vocab_size=1536, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )).eval()  # fmt: skip


@pytest.fixture(scope="module")
def toy_text(tmp_path_factory) -> Path:
    """Sixty lines out of six words, always in the same order: what stands in a block follows from any word of it."""
    words = "the red cat sees a dog".split()
    lines = [" ".join(words[(start + i) % 6] for i in range(40)) for start in range(60)]
    file = tmp_path_factory.mktemp("toy") / "toy.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Tiny base models as folders."""
    found = {}
    for kind, tied in (("llama", True), ("qwen2", False)):
        folder = tmp_path_factory.mktemp(kind)
        tiny(kind, tied).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[kind] = folder
    return found


def student(kind: str = "llama", tied: bool = False):
    """A tiny student whose LoRA layers do something."""
    made, tensors = student_of(tiny(kind, tied), MASK, rank=4)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, value in tensors.items():
            if "lora_B" in name:
                value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    return made, tensors


# ---- who sees whom ----------------------------------------------------------------------------------------------------
def test_who_sees_whom_in_a_row():
    """Clean columns see their left; a block sees the clean tokens before it and itself both ways; texts do not see each other."""
    first = Noised(list(range(10, 16)), [Block(2, (True, False, True)), Block(4, (False, True))])
    rows = rows_of([[first, Noised([30, 31, 32], [Block(1, (True, True))])]], MASK)
    seen = visible(rows)[0]
    assert rows.ids[0].tolist() == [10, 11, 12, 13, 14, 15, MASK, 13, MASK, 14, MASK, 30, 31, 32, MASK, MASK]
    assert rows.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 4, 5, 0, 1, 2, 1, 2]
    expected = {q: set(range(q + 1)) for q in range(6)}
    expected |= {q: {0, 1, 6, 7, 8} for q in (6, 7, 8)} | {q: {0, 1, 2, 3, 9, 10} for q in (9, 10)}
    expected |= {11: {11}, 12: {11, 12}, 13: {11, 12, 13}, 14: {11, 14, 15}, 15: {11, 14, 15}}
    assert {q: set(seen[q].nonzero().flatten().tolist()) for q in range(16)} == expected


def test_a_block_computes_what_the_model_computes_when_it_writes():
    """Noisy columns of a packed row equal the block behind its context alone, under a mask that is built another way."""
    made, _ = student()
    text = Noised(list(range(100, 120)), [Block(7, (True, False, True, True, False)), Block(12, (True,) * 8)])
    rows = rows_of([[Noised(list(range(40, 50)), [Block(3, (True, True))]), text]], MASK)
    with torch.no_grad():
        hidden = made.hidden(rows)[0]
        for number, block in enumerate(text.blocks, start=2):
            ids = [*text.ids[: block.start], *(MASK if hide else text.ids[block.start + i] for i, hide in enumerate(block.masked))]
            n = len(ids)
            mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
            mask[block.start :, block.start :] = 0
            embedded = made.base.get_input_embeddings()(torch.tensor([ids]))
            embedded[0, [i for i, token in enumerate(ids) if token == MASK]] = made.mask_row
            alone = made.base.base_model(inputs_embeds=embedded, attention_mask=mask[None, None], use_cache=False)[0][0]
            torch.testing.assert_close(hidden[rows.blocks[0] == number], alone[block.start :], atol=1e-5, rtol=1e-4)


def test_later_tokens_change_nothing_earlier():
    """A clean token at or behind a block's start moves neither the block nor the clean columns before it; one in front moves both."""
    made, _ = student()
    ids, block = list(range(100, 116)), Block(8, (True,) * 4)

    def run(changed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        other = [i + 500 if at == changed else i for at, i in enumerate(ids)]
        rows = rows_of([[Noised(other, [block])]], MASK)
        with torch.no_grad():
            hidden = made.hidden(rows)[0]
        return hidden[:16], hidden[16:]

    clean, noisy = run(None)
    for at in (8, 11, 15):
        other_clean, other_noisy = run(at)
        assert torch.equal(other_noisy, noisy) and torch.equal(other_clean[:at], clean[:at])
        assert not torch.allclose(other_clean[at], clean[at])
    assert not torch.allclose(run(3)[1], noisy, atol=1e-4)


def test_ranks_open_the_context():
    """A copy with ranks: stretches of context see themselves both ways and what is before, and all see all at one rank."""
    rows = rows_of([[Noised([1, 2, 3, 4], [Block(0, (False, False, False, True), (-1, -1, 0, 0)), Block(0, (False, True), (0, 0))])]], MASK)
    seen = visible(rows)[0]
    assert [set(seen[q].nonzero().flatten().tolist()) for q in (4, 5)] == [{4, 5}, {4, 5}]
    assert [set(seen[q].nonzero().flatten().tolist()) for q in (6, 7)] == [{4, 5, 6, 7}, {4, 5, 6, 7}]
    assert [set(seen[q].nonzero().flatten().tolist()) for q in (8, 9)] == [{8, 9}, {8, 9}]


def test_attention_opens_step_by_step():
    """Blocks of one size for `block`; for `full` they grow, then the context opens, and in the end everything sees everything."""
    assert {opening(done, "block", 8) for done in (0.0, 0.5, 1.0)} == {Opening(8)}
    steps = [opening(done / 100, "full", 8) for done in range(101)]
    assert [steps[i].block for i in (0, 10, 20, 30)] == [8, 16, 32, 32]
    assert all(a.context <= b.context and a.full <= b.full for a, b in zip(steps, steps[1:]))
    assert steps[29].context == 1 and steps[35].context > 1 and steps[35].full == 0 and steps[75].full == 1
    rng, piece = random.Random(0), Piece(list(range(40)), [(20, 3)])
    for copies in (noise_opened(piece, steps[100], rng).blocks, noise_opened(piece, Opening(32, 4, 0.0), rng).blocks):
        assert copies and all(block.start == 0 and len(block.ranks or ()) == len(block.masked) and not block.masked[0] for block in copies)
        assert all(any(block.masked) for block in copies)
    assert all(set(block.ranks) == {0} for block in noise_opened(piece, steps[100], rng).blocks)


# ---- masks ------------------------------------------------------------------------------------------------------------
def test_masks_of_noisy_blocks():
    """Every block has a scored slot, starts anywhere but at the first token, and stays inside its text; answers are masked alone in half."""
    rng = random.Random(0)
    piece = Piece(list(range(100, 140)), [(21, 3)])
    starts, alone, at_answer = set(), 0, 0
    for _ in range(300):
        noised = noise(piece, 8, rng)
        assert noised.columns >= 2 * len(piece.ids)
        for block in noised.blocks:
            assert block.start >= 1 and block.start + len(block.masked) <= 40 and 2 <= len(block.masked) <= 8 and any(block.masked[1:])
            starts.add(block.start % 8)
        first = noised.blocks[0]
        at_answer += 1
        hidden = {first.start + i for i, hide in enumerate(first.masked) if hide}
        alone += hidden <= {21, 22, 23}
    assert starts == set(range(8))
    assert 0.5 < alone / at_answer < 0.95


def test_weights_targets_and_teachers():
    """Slots behind a block's first are scored, with weights that sum to 1 a block; the teacher speaks where a prefix shows."""
    text = Noised([10, 11, 12, 13, 14, 15], [Block(1, (True, True, False, True)), Block(2, (False, False, True, True))])
    rows = rows_of([[text]], MASK)
    assert rows.targets[0, 6:].tolist() == [-1, 12, -1, 14, -1, -1, 14, 15]
    assert rows.weights[0, 6:].tolist() == [0, 0.5, 0, 0.5, 0, 0, 0.5, 0.5]
    assert rows.teachers[0].tolist() == [-1] * 12 + [3, -1]  # slot 2 of the second block: token 4, after clean token 3


def test_rows_are_full_and_hold_whole_texts():
    """Packing: no text is cut, little of a row is padding, and clean columns come back as the texts."""
    rng = random.Random(0)
    texts = []

    def draw() -> Noised:
        texts.append(noise(Piece([rng.randrange(6, 1000) for _ in range(rng.randrange(10, 50))], []), 8, rng))
        return texts[-1]

    rows = pack(draw, 3, 256, MASK)
    assert rows.ids.shape[1] <= 256 and (rows.texts > 0).float().mean() > 0.85
    clean = clean_part(rows)
    found = [clean.ids[r][clean.texts[r] == n].tolist() for r in range(3) for n in range(1, int(clean.texts[r].max()) + 1)]
    assert sorted(map(tuple, found)) == sorted(tuple(t.ids) for t in texts if tuple(t.ids) in set(map(tuple, found))) and len(found) >= 6


# ---- the loss ---------------------------------------------------------------------------------------------------------
def test_the_loss_is_what_its_formula_says():
    """Recomputed slot by slot: cross-entropy one column to the left, KL to the model without its adapter elsewhere."""
    made, _ = student()
    text = Noised(list(range(100, 112)), [Block(3, (True, True, False, True)), Block(6, (False, True, True))])
    rows = rows_of([[text]], MASK)
    with torch.no_grad():
        found = losses(made, rows, torch.Generator().manual_seed(0), kl_weight=0.5, taught=1.0)
        hidden = made.hidden(rows)[0]
        log_p = made.base.get_output_embeddings()(hidden).log_softmax(-1)
        with made.without():
            teacher = made.base(torch.tensor([text.ids])).logits[0].log_softmax(-1)
    kl = (teacher.exp() * (teacher - log_p[:12])).sum(-1).mean()
    first = (-log_p[12, 104] - log_p[14, 106]) / 2
    prefix = (teacher[6].exp() * (teacher[6] - log_p[16])).sum()  # token 7 after clean token 6: 6 shows, 7 and 8 do not
    second = (prefix - log_p[17, 108]) / 2
    assert float(found.kl) == pytest.approx(float(kl), rel=1e-4)
    assert float(found.masked) == pytest.approx(float((first + second) / 2), rel=1e-4)
    assert float(found.total) == pytest.approx(float(found.masked + 0.5 * found.kl), rel=1e-5)


def test_without_a_teacher_every_slot_is_data():
    """taught=0: no row is read by the teacher, no KL, and prefix states are scored against the text."""
    made, _ = student()
    rows = rows_of([[Noised(list(range(100, 112)), [Block(6, (False, True, True))])]], MASK)
    with torch.no_grad():
        found = losses(made, rows, torch.Generator().manual_seed(0), taught=0.0)
        log_p = made.base.get_output_embeddings()(made.hidden(rows)[0]).log_softmax(-1)
    assert float(found.kl) == 0
    assert float(found.masked) == pytest.approx(float(-(log_p[12, 107] + log_p[13, 108]) / 2), rel=1e-4)


def test_a_tied_head_says_the_mask_as_the_saved_model_will():
    """Tied: the mask's logit is its trained row's. Untied: the base's own."""
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for tied in (True, False):
        made, _ = student(tied=tied)
        with torch.no_grad():
            made.mask_row.fill_(0.3)
            weight = made.base.get_output_embeddings().weight.clone()
            if tied:
                weight[MASK] = 0.3
            torch.testing.assert_close(made.log_probabilities(hidden), (hidden @ weight.T).log_softmax(-1))


# ---- training ---------------------------------------------------------------------------------------------------------
def toy_run(text: Path, tokenizer, out: Path, tokens: int, kind: str = "llama", **recipe) -> tuple[dict, dict[str, torch.Tensor]]:
    """Train a tiny model on the toy text."""
    first, last = text_of(text, tokenizer)
    made, tensors = student_of(tiny(kind), MASK, rank=4)
    settings = Recipe(**{"lora_rank": 4, "lr": 1e-2, "rows": 2, "length": 160, **recipe})
    held_out = HeldOut(Corpus({}, last, [], tokenizer), 8, MASK, count=3)
    card = {"attention": "block", "block_size": 8, "mask_token_id": MASK}
    state = train(made, tensors, Corpus({}, first, [], tokenizer), held_out, settings, Run(out, tokens, save_seconds=0.0), card)
    return state, {name: value.detach().clone() for name, value in tensors.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_it_learns(kind, toy_text, tokenizer, tmp_path):
    """The held-out loss falls at every mask ratio, and the log says how."""
    state, _ = toy_run(toy_text, tokenizer, tmp_path / "run", 8000, kind)
    curve = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert curve[0]["tokens"] == 0 and curve[-1]["tokens"] == state["tokens"] >= 8000
    assert curve[0]["next_token"] == pytest.approx(curve[0]["teacher"], abs=1e-4)  # an adapter that does nothing yet
    for ratio in ("10%", "30%", "50%", "80%"):
        assert curve[-1]["loss"][ratio] < 0.75 * curve[0]["loss"][ratio], ratio
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, state["step"] + 1))


def test_full_attention_learns_too(toy_text, tokenizer, tmp_path):
    """Blocks that grow and a context that opens, from the first step to the last."""
    toy_run(toy_text, tokenizer, tmp_path / "run", 6000, attention="full")
    log = [json.loads(line)["masked"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(log[-8:]) < 0.8 * sum(log[:8])


def test_a_run_goes_on_bit_for_bit(toy_text, tokenizer, tmp_path):
    """Stopped at several points and gone on: the same weights and logs as in one go."""
    _, whole = toy_run(toy_text, tokenizer, tmp_path / "whole", 1500)
    for tokens in (300, 700, 1100):
        planned = json.dumps(1500)
        state, _ = _until(toy_text, tokenizer, tmp_path / "parts", tokens, planned)
    state, parts = toy_run(toy_text, tokenizer, tmp_path / "parts", 1500)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    losses_of = [[json.loads(line)["masked"] for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "parts")]
    assert losses_of[0] == losses_of[1] and len(losses_of[0]) == state["step"]


def _until(text, tokenizer, out, tokens, planned):
    """A run that is planned longer and stopped after `tokens`."""
    from easyedit_mdm.training import adapting

    class Stop(Exception):
        pass

    saved = adapting._Training._save

    def save(self):
        saved(self)
        if self.state["tokens"] >= tokens:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(adapting._Training, "_save", save)
        toy_run(text, tokenizer, out, int(planned))
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1]), None
