"""The sampler: token for token the published decoders at temperature 0, and sound in every other setting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from easyedit_mdm import DecodeConfig, decode, load_model
from easyedit_mdm.denoising import ORDERS
from easyedit_mdm.denoising.sampler import _Canvas, _next, writable
from easyedit_mdm.errors import HyperParameterError, RequestError, UnknownNameError

HERE = Path(__file__).parent


def generations(folder: Path):
    """(order, steps, block length, prompt, expected) of every generation in a reference file."""
    reference = load_file(folder / "reference.safetensors")
    prompt = reference["prompt_ids"] if "prompt_ids" in reference else reference["input_ids"][:1, :8]
    for key, expected in reference.items():
        found = re.fullmatch(r"generated_([a-z_]+?)(?:_len\d+)?_steps(\d+)(?:_block(\d+))?", key)
        if found:
            yield found[1], int(found[2]), int(found[3]) if found[3] else None, prompt, expected


@pytest.mark.data
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_equals_the_published_decoders(data_dir, family):
    """LLaDA's generate.py and Dream's diffusion_generate, several step counts and blocks."""
    model = load_model(data_dir / "reference" / family)
    seen = 0
    for order, steps, block, prompt, expected in generations(data_dir / "reference" / family):
        out = model.generate(prompt, max_new_tokens=8, steps=steps, block_length=block, order=order)
        assert torch.equal(out, expected), (order, steps, block)
        seen += 1
    assert seen == {"llada": 3, "dream": 6}[family]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_equals_the_kept_reference(family):
    """The same against tests/data/reference."""
    model = load_model(HERE / "data" / "reference" / family)
    cases = list(generations(HERE / "data" / "reference" / family))
    assert len(cases) >= 3
    for order, steps, block, prompt, expected in cases:
        assert torch.equal(
            model.generate(prompt, max_new_tokens=6, steps=steps, block_length=block, order=order), expected
        )


def test_a_long_prompt_beside_one_with_more_slots(tiny):
    """The slots that the long one does not have lie behind its row, and are never read."""
    model = tiny("llada")
    prompts = [torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([12, 3])]
    together = decode(model, prompts, [1, 4], DecodeConfig())
    alone = [decode(model, [p], [n], DecodeConfig())[0] for p, n in zip(prompts, [1, 4])]
    assert [path.tokens.tolist() for path in together] == [path.tokens.tolist() for path in alone]


@pytest.mark.parametrize("family", ["llada", "dream", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("order", list(ORDERS))
def test_every_order(tiny, family, temperature, order):
    """Every slot is committed exactly once, none holds a mask, steps are within the plan, and the seed
    decides.
    """
    model = tiny(family)
    prompts = [torch.arange(5, 5 + n) for n in (3, 7)]
    config = DecodeConfig(order=order, temperature=temperature, seed=3)
    first, second = decode(model, prompts, [4, 6], config), decode(model, prompts, [4, 6], config)
    for path, again, length in zip(first, second, (4, 6)):
        assert torch.equal(path.tokens, again.tokens) and torch.equal(path.step, again.step)
        assert path.tokens.shape == path.step.shape == (length,)
        assert 0 <= int(path.step.min()) and int(path.step.max()) < length
        assert (path.tokens < model.vocabulary).all()
        if model.masked:
            assert (path.tokens != model.ids.mask).all()
    if temperature:
        other = decode(model, prompts, [4, 6], DecodeConfig(order=order, temperature=temperature, seed=4))
        assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(first, other))


def test_one_token_a_step_by_confidence(tiny):
    """N masks, N steps: one commit a step, and the first is the slot with the most confident prediction of
    all.
    """
    model = tiny("llada")
    prompt = torch.arange(5, 12)
    path = decode(model, [prompt], [5])[0]
    assert sorted(path.step.tolist()) == [0, 1, 2, 3, 4]
    ids = torch.cat([prompt, torch.full((5,), model.ids.mask)])
    with torch.no_grad():
        probs = model.token_logits(ids[None])[0, -5:].softmax(-1)
    probs[:, model.ids.mask] = 0
    assert path.first_committed() == int(probs.amax(-1).argmax())
    assert torch.equal(path.one_step, probs.argmax(-1))
    frames = path.frames(model.ids.mask)
    assert len(frames) == 6 and frames[0] == [model.ids.mask] * 5 and frames[-1] == path.tokens.tolist()
    for i, (before, after) in enumerate(zip(frames, frames[1:])):
        assert [a != b for a, b in zip(before, after)].count(True) == 1, i


def test_batch_is_the_prompts_alone(tiny):
    """Prompts of other lengths, and canvases of other lengths, beside a prompt do not change what is written
    after it.
    """
    model = tiny("dream")
    prompts = [torch.arange(5, 5 + n) for n in (3, 8, 5)]
    together = decode(model, prompts, [2, 7, 4])
    for prompt, length, path in zip(prompts, (2, 7, 4), together):
        alone = decode(model, [prompt], [length])[0]
        assert torch.equal(alone.tokens, path.tokens) and torch.equal(alone.step, path.step)
        assert (alone.confidence - path.confidence).abs().max() < 1e-5


def test_causal_models_write_greedily(tiny):
    """For an autoregressive model decode is transformers' greedy search."""
    model = tiny("llama")
    prompt = torch.arange(5, 12)
    path = decode(model, [prompt], [5])[0]
    theirs = model.native.generate(
        prompt[None], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert path.tokens.tolist() == theirs[0, 7:].tolist()


@pytest.mark.parametrize("family", ["llada", "dream", "llama"])
def test_a_canvas_of_one(tiny, family):
    """One mask, one step, alone or beside longer ones: the likeliest token that is no mask."""
    model = tiny(family)
    prompt = torch.arange(5, 12)
    (alone,), (_, beside) = decode(model, [prompt], [1]), decode(model, [prompt, prompt], [4, 1])
    with torch.no_grad():
        logits = model.token_logits(torch.cat([prompt, model.hidden.slots(1)])[None])[0, -1]
    if model.masked:
        logits[model.ids.mask] = -torch.inf
    for path in (alone, beside):
        assert (
            path.tokens.tolist() == [int(logits.argmax())]
            and path.step.tolist() == [0]
            and path.first_committed() == 0
        )


def test_given_tokens_of_any_number(tiny):
    """Token 0 is a token; what is not given is -1."""
    model = tiny("llada")
    path = decode(model, [torch.arange(5, 12)], [3], given=[torch.tensor([0, -1, 9])])[0]
    assert path.tokens[[0, 2]].tolist() == [0, 9] and path.step.tolist() == [-1, 0, -1]


def test_temperature_as_in_transformers(tiny):
    """generate: a temperature is used if positive and sampling not switched off; do_sample alone means 1; the
    generator decides.
    """
    model = tiny("llada")
    ids = torch.arange(5, 12)[None]

    def write(**options) -> list[int]:
        """Six tokens, from the same random numbers."""
        return model.generate(ids, max_new_tokens=6, generator=torch.Generator().manual_seed(3), **options)[
            0, 7:
        ].tolist()

    def path(temperature: float) -> list[int]:
        """The sampler's own."""
        config = DecodeConfig(temperature=temperature)
        return decode(model, [ids[0]], [6], config, torch.Generator().manual_seed(3))[0].tokens.tolist()

    assert write() == write(temperature=0.0) == write(temperature=None) == path(0.0)
    assert write(temperature=0.7) == write(temperature=0.7, do_sample=True) == path(0.7)
    assert write(do_sample=True) == path(1.0) and len({str(path(t)) for t in (0.0, 0.7, 1.0)}) == 3
    torch.manual_seed(5)
    first, second = (model.generate(ids, max_new_tokens=6, do_sample=True) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=True), first) and not torch.equal(
        first, second
    )


def test_settings_are_checked(tiny):
    """Bad settings say what is wrong; records hold every setting."""
    model = tiny("llada")
    prompt = [torch.arange(5, 12)]
    for config, message in (
        (dict(block_length=3), "does not divide"),
        (dict(block_length=2, steps=3), "multiple of 2"),
        (dict(order="entropy", block_length=2), "knows no blocks"),
    ):
        with pytest.raises(HyperParameterError, match=message):
            decode(model, prompt, [4], DecodeConfig(**config))
    with pytest.raises(HyperParameterError, match="at least 1"):
        DecodeConfig(steps=0)
    with pytest.raises(HyperParameterError, match="not negative"):
        DecodeConfig(temperature=-1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'low_confidence'"):
        DecodeConfig(order="low_confidense")
    with pytest.raises(RequestError, match="exceed the 128 positions"):
        decode(model, prompt, [200])
    with pytest.raises(RequestError, match="no tokens"):
        decode(model, prompt, [0])
    assert set(DecodeConfig().record()) == {
        "canvas",
        "steps",
        "block_length",
        "order",
        "pace",
        "threshold",
        "temperature",
        "eps",
        "top_k",
        "seed",
    }


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_remasking_by_hand(tiny, family):
    """After the last step the least sure slots, one after the other, are masked and written anew beside all
    others; tokens that were given stay.
    """
    model = tiny(family)
    prompts, lengths = [torch.arange(5, 11), torch.arange(20, 24)], [5, 3]
    given = [torch.tensor([-1, 77, -1, -1, -1]), torch.full((3,), -1)]
    plain = decode(model, prompts, lengths, given=given)
    paths = decode(model, prompts, lengths, DecodeConfig(remask=2), given=given)
    for prompt, before, after in zip(prompts, plain, paths):
        tokens, sure = before.tokens.clone(), before.confidence.masked_fill(before.step < 0, 2.0)
        for _ in range(2):
            slot = int(sure.argmin())
            sure[slot] = 2.0
            row = torch.cat([prompt, tokens])
            row[len(prompt) + slot] = model.ids.mask
            at, start = torch.tensor([[len(prompt) + slot]]), torch.tensor([len(prompt)])
            with torch.no_grad():
                logits = writable(model, model.token_logits(row[None], at=at, canvas=start))
            tokens[slot] = logits.argmax()
        assert after.tokens.tolist() == tokens.tolist()
    assert paths[0].tokens[1] == 77 and paths[0].step[1] == -1
    assert decode(model, prompts, lengths, given=given)[0].tokens.tolist() == plain[0].tokens.tolist()


def test_remasking_more_often_than_there_are_slots(tiny):
    """Each slot is taken once; an autoregressive model has nothing to mask."""
    prompt = [torch.arange(5, 11)]
    often, once = (decode(tiny("llada"), prompt, [3], DecodeConfig(remask=n))[0].tokens for n in (9, 3))
    assert often.tolist() == once.tolist()
    with pytest.raises(HyperParameterError, match="autoregressive and masks nothing"):
        decode(tiny("llama"), prompt, [3], DecodeConfig(remask=1))
    with pytest.raises(HyperParameterError, match="remask=-1"):
        DecodeConfig(remask=-1)
    assert "remask" not in DecodeConfig().record() and DecodeConfig(remask=2).record()["remask"] == 2


def test_a_block_that_is_full_sooner_than_planned():
    """With a threshold the next turn is the first of the next block, however many turns were left; without
    one, or with a slot still masked, it is the next.
    """
    config = DecodeConfig(steps=8, block_length=4, threshold=0.5)
    plan = config.plan(8)
    assert [turn.start for turn in plan.turns] == [0] * 4 + [4] * 4
    row = torch.zeros(1, 8, dtype=torch.long)
    state = _Canvas(
        row, torch.ones_like(row), torch.arange(8)[None], torch.zeros(1, dtype=torch.long), [plan]
    )
    state.masked[0, :4] = False
    assert [_next(state, 0, place, config) for place in range(4)] == [4] * 4
    assert _next(state, 0, 4, config) == 5 and _next(state, 0, 0, DecodeConfig()) == 1
    state.masked[:] = False
    assert _next(state, 0, 5, config) == len(plan.turns)
