"""Likelihoods: against the definition, and Monte Carlo against the exact value."""

from __future__ import annotations

import itertools

import pytest
import torch

from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.denoising.likelihood import _monte_carlo
from easyedit_mdm.denoising.states import Slots
from easyedit_mdm.errors import HyperParameterError


def pair(model, length: int):
    """A prompt and a target of random tokens."""
    generator = torch.Generator().manual_seed(length)
    return torch.tensor(model.tokenizer("The river of Anna is")["input_ids"]), torch.randint(
        5, 100, (length,), generator=generator
    )


@torch.no_grad()
def along(model, prompt, target, order) -> float:
    """Sum of log p over one order of revealing."""
    total, shown = 0.0, torch.zeros(len(target), dtype=torch.bool)
    for i in order:
        ids = torch.cat([prompt, torch.where(shown, target, model.ids.mask)])
        total += float(model.token_logits(ids[None]).log_softmax(-1)[0, len(prompt) + i, target[i]])
        shown[i] = True
    return total


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_exact_is_the_mean_over_all_orders(tiny, family):
    """For N = 1..4, all N! of them; the chain rules are two of the orders."""
    model = tiny(family)
    for length in (1, 2, 3, 4):
        prompt, target = pair(model, length)
        orders = list(itertools.permutations(range(length)))
        expected = sum(along(model, prompt, target, order) for order in orders) / len(orders)
        assert log_likelihood(model, [prompt], [target], "exact")[0] == pytest.approx(expected, abs=1e-4)
        assert log_likelihood(model, [prompt], [target], "left_to_right")[0] == pytest.approx(
            along(model, prompt, target, range(length)), abs=1e-4
        )
        assert log_likelihood(model, [prompt], [target], "right_to_left")[0] == pytest.approx(
            along(model, prompt, target, range(length - 1, -1, -1)), abs=1e-4
        )


@pytest.mark.parametrize("method", ["llada", "dream"])
def test_monte_carlo_converges_to_exact(tiny, method):
    """Over independent runs: the mean lies within 4 standard errors of the exact value, and more samples come
    closer.
    """
    model = tiny("llada")
    prompt, target = pair(model, 3)
    exact = log_likelihood(model, [prompt], [target], "exact")[0]
    spread = {}
    for samples in (4, 64):
        values = torch.tensor(
            [log_likelihood(model, [prompt], [target], method, samples, seed)[0] for seed in range(40)]
        )
        spread[samples] = float(values.std())
        assert abs(float(values.mean()) - exact) < 4 * spread[samples] / 40**0.5 + 1e-4
    assert spread[64] < 0.6 * spread[4]


def test_monte_carlo_estimators_are_the_published_ones():
    """LLaDA's: k ~ U{1..N} tokens masked, weight N / k. Dream's: each masked with probability t, weight 1 /
    t, t stratified in (eps, 1].
    """
    shown, weights = _monte_carlo(Slots((6,)), "llada", 3000, torch.Generator().manual_seed(0))
    k = (~shown).sum(1)
    assert torch.allclose(weights, (~shown) * (6 / k[:, None]) / 3000) and set(k.tolist()) == {
        1,
        2,
        3,
        4,
        5,
        6,
    }
    assert (
        all(400 < int((k == n).sum()) < 600 for n in range(1, 7))
        and ((~shown).float().mean(0) - 3.5 / 6).abs().max() < 0.03
    )
    shown, weights = _monte_carlo(Slots((4000,)), "dream", 64, torch.Generator().manual_seed(0))
    ratio = torch.where(weights > 0, 1 / (weights * 64), 0).amax(1)
    assert torch.equal(weights > 0, ~shown) and torch.allclose(weights, (~shown) / ratio[:, None] / 64)
    assert ((~shown).float().mean(1) - ratio).abs().max() < 0.04
    t = ((ratio - 1e-3) / (1 - 1e-3)).sort().values
    assert torch.allclose(t.diff(), torch.tensor(1 / 64), atol=1e-5) and 0 <= t[0] < 1 / 64, (
        "one in each of 64 strata"
    )


def test_pairs_belong_together(tiny):
    """As many targets as prompts; each pair draws its own samples, others for another seed; rows that weigh
    nothing are not run.
    """
    model = tiny("llada")
    prompt, target = pair(model, 6)
    with pytest.raises(ValueError, match="zip"):
        log_likelihood(model, [prompt], [target, target])
    same = log_likelihood(model, [prompt, prompt], [target, target], "llada", 8)
    assert same[0] != same[1] and same == log_likelihood(
        model, [prompt, prompt], [target, target], "llada", 8, max_rows=3
    )
    assert (
        log_likelihood(model, [prompt], [target], "llada", 8, seed=1)[0]
        != same[0]
        == log_likelihood(model, [prompt], [target], "llada", 8)[0]
    )


def test_causal_is_the_chain_rule(tiny):
    """Teacher forcing, one forward; batching of unequal lengths changes nothing."""
    model = tiny("llama")
    pairs = [pair(model, n) for n in (1, 4, 6)]
    together = log_likelihood(model, [p for p, _ in pairs], [t for _, t in pairs])
    for (prompt, target), value in zip(pairs, together):
        ids = torch.cat([prompt, target])
        with torch.no_grad():
            log_probs = model.token_logits(ids[None]).log_softmax(-1)[0]
        expected = sum(float(log_probs[len(prompt) + i, t]) for i, t in enumerate(target))
        assert value == pytest.approx(expected, abs=1e-4)


def test_defaults_and_refusals(tiny):
    """Exact up to 5 tokens, Monte Carlo beyond; what does not fit is refused."""
    model = tiny("llada")
    short, long = pair(model, 5), pair(model, 6)
    assert log_likelihood(model, *[[x] for x in short]) == log_likelihood(
        model, *[[x] for x in short], "exact"
    )
    assert log_likelihood(model, *[[x] for x in long]) == log_likelihood(model, *[[x] for x in long], "llada")
    assert log_likelihood(model, [], []) == []
    for method, says in (
        ("exact", "6 tokens takes 63 forwards"),
        ("causal", "'causal' does not fit"),
        ("best", "unknown likelihood 'best'"),
    ):
        with pytest.raises(HyperParameterError, match=says):
            log_likelihood(model, *[[x] for x in long], method)
