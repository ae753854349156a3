"""States that the edited model itself comes through."""

from __future__ import annotations

import pytest
import torch

from easyedit_mdm.denoising import DecodeConfig, decode, schedule
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.request import Prompt
from easyedit_mdm.editing.solve.replaced import _Replaced
from easyedit_mdm.editing.solve.rollout import rolled_out, states_met
from easyedit_mdm.editing.solve.side import _SideLosses
from easyedit_mdm.models.hooks import answering, changing_output

TARGETS = [torch.tensor([7, 3, 11, 5]), torch.tensor([4, 9])]


def facts_of(model) -> dict[int, Fact]:
    """Two facts with targets of different lengths."""
    prompts = [Prompt(torch.tensor([5, 6, 7, 8, 9]), 2), Prompt(torch.tensor([12, 3, 4]), 1)]
    return {i: Fact([p], t, p) for i, (p, t) in enumerate(zip(prompts, TARGETS))}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_own_tokens_are_those_of_the_sampler(tiny, family):
    """on_policy's states are the very steps of low_confidence decoding with the value added at the site."""
    model, site = tiny(family), tiny(family).site(1)
    facts = facts_of(model)
    deltas = [torch.full((32,), 0.4), torch.linspace(-2, 2, 32)]
    states = rolled_out(model, site, facts, deltas, [schedule("on_policy", len(t)) for t in TARGETS])
    for i, fact in facts.items():

        def add(out, i=i, fact=fact):
            """delta at the only row's site."""
            out = out.clone()
            out[:, fact.contexts[0].fact_at] += deltas[i]
            return out

        with changing_output(model.module(site.name), add):
            path = decode(model, [fact.contexts[0].ids], [len(fact.target)], DecodeConfig())[0]
        order = path.step.argsort()
        for k in range(len(fact.target)):
            known = torch.zeros(len(fact.target), dtype=torch.bool)
            known[order[:k]] = True
            assert torch.equal(states[i].revealed[k], known)
            assert torch.equal(states[i].shown[k][known], path.tokens[known])
    assert any(
        not torch.equal(s.shown[-1][s.revealed[-1]], t[s.revealed[-1]])
        for s, t in zip(states.values(), TARGETS)
    ), "a random model writes wrong tokens"


@pytest.mark.parametrize("memory", ["GRACE_MDM", "WISE_MDM"])
def test_memories_are_in_the_model_while_it_decodes(tiny, memory):
    """What a memory puts in at the fact's token is there in every step that states are taken from."""
    model = tiny("llada")
    site, facts = model.site(1), list(facts_of(model).values())
    settings = METHODS[memory].hparams(
        alg_name=memory, model_name="tiny", layers=[1], state_schedule="on_policy", context_templates=["{}"]
    )
    module, generator = model.module(site.name), torch.Generator().manual_seed(3)
    if memory == "GRACE_MDM":
        values = 3 * torch.randn(2, 32, generator=generator)
        losses = _Replaced(model, site, facts, list(values), settings)
    else:
        delta = 3 * torch.randn(module.weight.shape, generator=generator)
        losses = _SideLosses(model, site, facts, delta, settings)
    met = states_met(model, None, facts, losses.plans, [0, 1], inserted=losses._inserted)
    bare = states_met(model, None, facts, losses.plans, [0, 1])
    for i, fact in enumerate(facts):
        at = fact.contexts[0].fact_at

        def put(entering, out, i=i, at=at):
            """By hand, in the only row."""
            out = out.clone()
            out[:, at] = values[i] if memory == "GRACE_MDM" else out[:, at] + entering[:, at] @ delta.T
            return out

        with answering(module, put):
            path = decode(model, [fact.contexts[0].ids], [len(fact.target)], DecodeConfig())[0]
        states, order = met[i][0][1], path.step.argsort()
        for k in range(len(fact.target)):
            known = torch.zeros(len(fact.target), dtype=torch.bool)
            known[order[:k]] = True
            assert torch.equal(states.revealed[k], known)
            assert torch.equal(states.shown[k][known], path.tokens[known])
    assert any(not torch.equal(met[i][0][1].shown, bare[i][0][1].shown) for i in (0, 1))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_what_the_sampler_never_writes(tiny, family):
    """A model that wants nothing but the mask token, and ids without a token: both decoders write what comes
    after those.
    """
    model, facts = tiny(family), facts_of(tiny(family))

    def wanting(logits):
        """The forbidden ids, above all others."""
        logits = logits.clone()
        logits[..., model.vocabulary :] += 50
        logits[..., model.ids.mask] += 100
        return logits

    with changing_output(model.module(model.spec.paths.head), wanting):
        plans = [schedule("on_policy", len(t)) for t in TARGETS]
        states = rolled_out(model, model.site(1), facts, [torch.zeros(32)] * 2, plans)
        for i, fact in facts.items():
            path = decode(model, [fact.contexts[0].ids], [len(fact.target)], DecodeConfig())[0]
            last = states[i].revealed[-1]
            assert last.sum() == len(fact.target) - 1 and torch.equal(
                states[i].shown[-1][last], path.tokens[last]
            )
            assert (
                model.ids.mask not in states[i].shown[-1]
                and int(states[i].shown[-1].max()) < model.vocabulary
            )


def test_right_tokens_in_the_models_order(tiny):
    """confidence: the target's own tokens, one more from state to state, in an order that the value
    changes.
    """
    model, site = tiny("llada"), tiny("llada").site(1)
    facts, plans = facts_of(model), [schedule("confidence", len(t)) for t in TARGETS]
    orders = set()
    for seed in range(8):
        deltas = list(3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)))
        states = rolled_out(model, site, facts, deltas, plans)
        for i, target in enumerate(TARGETS):
            assert states[i].revealed.sum(1).tolist() == list(range(len(target)))
            assert all((b >= a).all() for a, b in zip(states[i].revealed, states[i].revealed[1:]))
            assert torch.equal(states[i].shown, target.expand(len(target), -1))
            assert torch.equal(states[i].scored, ~states[i].revealed)
        orders.add(str(states[0].revealed.tolist()))
    assert len(orders) > 1


def test_few_states(tiny):
    """No more than max_states, with nothing revealed always among them."""
    model = tiny("llada")
    plans = [schedule("confidence", len(t), 2) for t in TARGETS]
    states = rolled_out(model, model.site(0), facts_of(model), [torch.zeros(32)] * 2, plans)
    assert [s.revealed.sum(1).tolist() for s in states.values()] == [[0, 3], [0, 1]]
