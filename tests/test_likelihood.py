"""Likelihoods: against the definition, and Monte Carlo against the exact value."""

from __future__ import annotations

import itertools

import pytest
import torch

from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.errors import HyperParameterError


def pair(model, length: int):
    """A prompt and a target of random tokens."""
    generator = torch.Generator().manual_seed(length)
    return torch.tensor(model.tokenizer("The river of Anna is")["input_ids"]), torch.randint(5, 100, (length,), generator=generator)


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
        assert log_likelihood(model, [prompt], [target], "left_to_right")[0] == pytest.approx(along(model, prompt, target, range(length)), abs=1e-4)
        assert log_likelihood(model, [prompt], [target], "right_to_left")[0] == pytest.approx(
            along(model, prompt, target, range(length - 1, -1, -1)), abs=1e-4
        )


@pytest.mark.parametrize("method", ["llada", "dream"])
def test_monte_carlo_converges_to_exact(tiny, method):
    """Over independent runs: the mean lies within 4 standard errors of the exact value, and more samples come closer."""
    model = tiny("llada")
    prompt, target = pair(model, 3)
    exact = log_likelihood(model, [prompt], [target], "exact")[0]
    spread = {}
    for samples in (4, 64):
        values = torch.tensor([log_likelihood(model, [prompt], [target], method, samples, seed)[0] for seed in range(40)])
        spread[samples] = float(values.std())
        assert abs(float(values.mean()) - exact) < 4 * spread[samples] / 40**0.5 + 1e-4
    assert spread[64] < 0.6 * spread[4]


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
    assert log_likelihood(model, *[[x] for x in short]) == log_likelihood(model, *[[x] for x in short], "exact")
    assert log_likelihood(model, *[[x] for x in long]) == log_likelihood(model, *[[x] for x in long], "llada")
    assert log_likelihood(model, [], []) == []
    for method, says in (("exact", "6 tokens takes 63 forwards"), ("causal", "'causal' does not fit"), ("best", "unknown likelihood 'best'")):
        with pytest.raises(HyperParameterError, match=says):
            log_likelihood(model, *[[x] for x in long], method)
