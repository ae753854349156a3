"""The adapter's contract, for every registered family."""

from __future__ import annotations

import copy

import pytest
import torch

from easyedit_mdm.errors import HyperParameterError, ModelError
from easyedit_mdm.models import FAMILIES, adapt, geometry
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.hooks import changing_output

families = pytest.mark.parametrize("family", list(FAMILIES))


def rows(seed: int = 0) -> list[torch.Tensor]:
    """Three rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 150, (n,), generator=generator) for n in (5, 9, 12)]


def canvas_of(model, starts: list[int]) -> dict[str, torch.Tensor]:
    """Where each row's canvas begins, for models that cannot see it: two columns behind the row's start."""
    return {"canvas": torch.tensor(starts) + 2} if model.hidden.noise else {}


@families
@torch.no_grad()
def test_padding_changes_nothing(tiny, family):
    """Row i of a batch, padded left or right, equals the row alone, within 1e-5."""
    model = tiny(family)
    right, mask = right_padded(rows(), model.ids.pad, "cpu")
    length = right.shape[1]
    left = torch.stack([torch.cat([torch.full((length - len(r),), model.ids.pad), r]) for r in rows()])
    left_mask = torch.stack(
        [torch.cat([torch.zeros(length - len(r)), torch.ones(len(r))]) for r in rows()]
    ).long()
    starts = [length - len(r) for r in rows()]
    on_right = model.token_logits(right, mask, **canvas_of(model, [0, 0, 0]))
    on_left = model.token_logits(left, left_mask, **canvas_of(model, starts))
    most = 2e-5 if model.hidden.noise else 1e-5  # their logits are larger
    for i, row in enumerate(rows()):
        alone = model.token_logits(row[None], **canvas_of(model, [0]))[0]
        assert (on_right[i, : len(row)] - alone).abs().max() < most
        assert (on_left[i, length - len(row) :] - alone).abs().max() < most
        if not model.shift and not model.hidden.noise:
            assert (model(right, mask).logits[i, : len(row)] - alone).abs().max() < 1e-5


@families
@torch.no_grad()
def test_from_any_layer_on(tiny, family):
    """Running the lower layers once and the upper ones from there gives the same logits, at chosen slots
    too.
    """
    model = tiny(family)
    ids, mask = right_padded(rows(), model.ids.pad, "cpu")
    where = canvas_of(model, [0, 0, 0])
    whole = model.token_logits(ids, mask, **where)
    at = torch.tensor([[1, 4], [0, 8], [11, 3]])
    for layer in range(model.layers + 1):
        hidden = model.hidden_before(layer, ids, mask, **where)
        if layer > 0:
            first = model.hidden_before(1, ids, mask, **where)
            onwards = model.hidden_before(layer, ids, mask, start=1, hidden=first, **where)
            assert (onwards - hidden).abs().max() < 1e-5
        assert (model.token_logits(ids, mask, layer=layer, hidden=hidden, **where) - whole).abs().max() < 1e-5
        some = model.token_logits(ids, mask, at=at, layer=layer, hidden=hidden, **where)
        assert (some - whole.gather(1, at[:, :, None].expand(-1, -1, whole.shape[-1]))).abs().max() < 1e-5


@families
@torch.no_grad()
def test_who_sees_whom(tiny, family):
    """A token's logits move with the row's last token exactly where what they are read from sees it; a causal
    model's never do.
    """
    model = tiny(family)
    ids, canvas = rows()[2][None], torch.tensor([6])
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 150
    moved = (
        (model.token_logits(ids, canvas=canvas) - model.token_logits(changed, canvas=canvas))
        .abs()
        .amax(-1)[0]
    )
    hidden = None if model.hidden.noise else ids == model.hidden.token
    ranks = geometry.ranks(torch.ones_like(ids), model.attention, canvas, hidden)[0]
    at = torch.arange(len(ranks))[None]
    where = geometry.sources(at, torch.ones_like(ids)) if model.shift else at
    # what goes through one expert together changes its rounding
    noise = 0.0 if model.spec.experts is None and not model.hidden.noise else 1e-5
    assert torch.equal(moved > max(noise, 1e-6), ranks[where[0]] >= ranks[-1])
    assert model.denoises or moved.max() <= noise


@families
@torch.no_grad()
def test_alignment(tiny, family):
    """Aligned logits are the native ones, one to the left where the family shifts."""
    model = tiny(family)
    ids = rows()[2][None]
    if model.hidden.noise:  # the native class reads the canvas apart, and predicts nothing else
        raw = model(ids[:, :5], decoder_input_ids=ids[:, 5:]).logits
        ours = model.token_logits(ids, canvas=torch.tensor([5]))[:, 5:]
        assert (ours - raw).abs().max() < 5e-5  # through a cache there: other sums
        for refused in ({}, {"canvas": torch.tensor([5])}):
            with pytest.raises(ModelError, match="decoder_input_ids"):
                model(ids, **refused)
        with pytest.raises(ModelError, match="give canvas"):
            model.token_logits(ids)
        return
    aligned, raw = model.token_logits(ids), model(ids).logits
    if model.shift:
        assert (aligned[:, 1:] - raw[:, :-1]).abs().max() < 1e-5
        assert (aligned[:, 0] - raw[:, 0]).abs().max() < 1e-5
    else:
        assert (aligned - raw).abs().max() < 1e-5


@families
def test_names_are_the_native_ones(tiny, family):
    """The adapter's parameters are the native model's, under the same names, each once; copying copies
    them.
    """
    model = tiny(family)
    native = dict(model.native.named_parameters())
    mine = dict(model.named_parameters())
    assert list(native) == list(mine) and all(native[n] is mine[n] for n in native)
    twin = copy.deepcopy(model)
    assert all(a is b for a, b in zip(twin.parameters(), twin.native.parameters()))
    assert next(twin.parameters()) is not next(model.parameters())


@families
def test_sites(tiny, family):
    """The down-projection of each layer; wrong layers and modules are named, with what was meant."""
    model = tiny(family)
    assert set(model.site(1).weights) <= set(dict(model.named_parameters(remove_duplicate=False)))
    with pytest.raises(ModelError, match="layers 0 to 2"):
        model.site(3)
    with pytest.raises(ModelError, match="did you mean"):
        model.site(1, model.spec.paths.down + "x")
    with pytest.raises(ModelError, match="no matrix"):
        model.site(1, model.spec.paths.block)


@families
def test_what_ends_a_block(tiny, family):
    """The down-projection's output reaches the stream as it is; the attention's, or one with a norm after it,
    does not.
    """
    half = tiny(family, dtype="bfloat16").train()
    state = torch.get_rng_state()
    model = tiny(family)
    # a norm after the residual, or before it: nothing inside the block ends it
    before = family not in ("bert", "diffusion-gemma")
    sites = [(m, m.site(layer)) for m in (model, half) for layer in range(model.layers)]
    assert all(m.ends_block(site) is (before and not site.parts) for m, site in sites)
    assert (
        torch.equal(torch.get_rng_state(), state) and half.training and next(half.parameters()).requires_grad
    )
    attention = model.spec.paths.attention + {"gpt2": ".c_proj", "bert": "", "modernbert": ""}.get(
        family, ".o_proj"
    )
    assert not model.ends_block(model.site(0, attention)) and not half.ends_block(half.site(0, attention))
    wide = {"gpt2": "mlp.c_fc", "bert": "intermediate.dense", "modernbert": "mlp.Wi"}.get(
        family, "mlp.up_proj"
    )
    if any(site.parts for _, site in sites):
        return  # of a mixture: there is no one projection inside the block
    inside = f"{model.spec.paths.block}.{wide}"
    assert not model.ends_block(model.site(0, inside))
    other = tiny(family)
    with changing_output(
        other.module(other.spec.paths.mlp.format(0)), lambda out: out / out.norm(dim=-1, keepdim=True)
    ):
        assert not other.ends_block(other.site(0))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_generate_has_transformers_signature(tiny, family):
    """Left-padded batches, max_length, eos handling; rows do not influence each other; canvas settings are
    checked.
    """
    model = tiny(family)
    first, second = rows()[0], rows()[1]
    pad = len(second) - len(first)
    ids = torch.stack([torch.cat([torch.full((pad,), model.ids.pad), first]), second])
    mask = torch.stack(
        [torch.cat([torch.zeros(pad), torch.ones(len(first))]), torch.ones(len(second))]
    ).long()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6)
    assert out.shape == (2, len(second) + 6) and torch.equal(out[:, : len(second)], ids)
    for row, prompt in zip(out, (first, second)):
        assert torch.equal(
            row[len(second) :], model.generate(prompt[None], max_new_tokens=6)[0, len(prompt) :]
        )
    assert model.generate(second[None], max_length=12).shape == (1, 12)
    token = int(out[1, len(second) + 1])
    ended = model.generate(second[None], max_new_tokens=6, eos_token_id=token, pad_token_id=3)[
        0, len(second) :
    ]
    first_end = ended.tolist().index(token)
    assert (ended[first_end + 1 :] == 3).all()
    with pytest.raises(HyperParameterError, match="max_new_tokens"):
        model.generate(second[None])
    with pytest.raises(TypeError, match="num_beams"):
        model.generate(second[None], max_new_tokens=2, num_beams=4)


def test_causal_generate_is_transformers(tiny):
    """Autoregressive adapters hand over to the native model."""
    model = tiny("llama")
    ids = rows()[1][None]
    ours = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    theirs = model.native.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(ours, theirs)


def test_a_bare_adapter_says_how_to_get_a_decoder(tiny):
    """models/ knows nothing of denoising: without load_model there is no generate."""
    model = tiny("llada")
    bare = adapt(model.native, model.tokenizer, family="llada", mask_id=1)
    with pytest.raises(ModelError, match="load_model"):
        bare.generate(torch.tensor([[2, 3]]), max_new_tokens=2)
    with pytest.raises(ModelError, match="labels"):
        model(torch.tensor([[2, 3]]), labels=torch.tensor([[2, 3]]))
