"""Values optimised through the weights: the loss is that of the model as the finished rank-one update leaves
it.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_batch_methods import hparams as batch_hparams
from test_batch_methods import (
    moments_of,
    statistics,  # noqa: F401 - an automatic fixture: statistics of tiny models
)
from test_rome import REQUEST, hparams

from easyedit_mdm import EditRequest, make_edit, score_prompts
from easyedit_mdm.data.cases import load_cases
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.request import anchor, locate
from easyedit_mdm.editing.solve.batch import BatchHyperParams, outputs
from easyedit_mdm.editing.solve.keys import read_keys
from easyedit_mdm.editing.solve.rank_one import closed_form
from easyedit_mdm.editing.solve.rollout import _slots, _written
from easyedit_mdm.editing.solve.sites import check_modules, settled
from easyedit_mdm.editing.solve.value import _rates, optimise
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.models import FAMILIES

# in small passes, and of no mere likelihood
THROUGH = dict(optimise_through="weights", early_stop_loss=0.0, v_weight_decay=0.0, kl_factor=0.5, max_rows=3)


@torch.no_grad()
def at_anchor(model) -> torch.Tensor:
    """Log-probabilities where the KL anchor is read."""
    ids = locate(model, anchor(EditRequest.of(REQUEST)), "{}", "subject_last").ids
    if model.denoises:
        ids = torch.cat([ids, model.hidden.slots(1)])
    read = torch.tensor([[len(ids) - (1 if model.denoises else 0)]])
    return model.token_logits(ids[None], at=read, canvas=read[0])[0, 0].log_softmax(-1)


def loss_now(model, settings, request=REQUEST) -> float:
    """The likelihood's part of the loss, for the model as it is."""
    fact = tokenise(model, EditRequest.of(request), settings)
    only = dataclasses.replace(settings, v_num_grad_steps=1, kl_factor=0.0)
    return optimise(
        model,
        settled(model, check_modules(model, settings), [fact]),
        [fact],
        torch.ones(1, model.config.hidden_size),
        only,
    )[0].losses[0]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("average", ["single", "easyedit"])
def test_the_last_loss_is_the_edited_models(tiny, family, inside, average, monkeypatch):
    """Whatever prefix, state and slot: what was optimised is what the weights then do, at the anchor, too. As
    an activation it is not.
    """
    model = tiny(family)
    if inside:
        monkeypatch.setattr(type(model), "ends_block", lambda self, site: False)
    before, gap = at_anchor(model), {}
    for through in ("weights", "activation"):
        settings = hparams(
            **{
                **THROUGH,
                "optimise_through": through,
                "key_average": average,
                "state_schedule": "enumerate",
                "v_num_grad_steps": 8,
            }
        )
        edit = make_edit(model, REQUEST, settings)
        losses = edit.card["facts"][0]["losses"]
        assert losses[-1] < losses[0]
        edit.apply(model)
        after = at_anchor(model)
        really = loss_now(model, settings) + 0.5 * float((after.exp() * (after - before)).sum())
        edit.revert(model)
        gap[through] = abs(really - losses[-1]) / losses[-1]
    assert gap["weights"] < 1e-5 and gap["activation"] > 1e-3


def test_with_second_moments_too(twin_llada, world):
    """u = C^-1 k*: the twin's own file, with the states that stay the same from step to step."""
    fact = world.all_facts()[3]
    request = {"prompt": fact.prompt(), "subject": fact.subject, "target_new": "London Paris Rome"}
    settings = ROMEMDMHyperParams.from_hparams("ROME_MDM/twin-llada")
    settings = dataclasses.replace(
        settings, state_schedule="enumerate", kl_factor=0.0, v_num_grad_steps=8, v_lr=0.02
    )
    edit = make_edit(twin_llada, request, settings)
    assert settings.optimise_through == "weights" and settings.mom2_adjustment
    edit.apply(twin_llada)
    really = loss_now(twin_llada, settings, request)
    edit.revert(twin_llada)
    losses = edit.card["facts"][0]["losses"]
    assert really == pytest.approx(losses[-1], rel=1e-3) and losses[-1] < losses[0]


def test_facts_of_a_batch_do_not_mix(tiny):
    """Several facts optimised together, some of which stop early, get the edits that they get alone."""
    model, settings = tiny("llada"), hparams(**THROUGH)
    requests = [EditRequest.of({**REQUEST, "target_new": t}) for t in ("red river English", "the")]
    requests.append(EditRequest.of({"prompt": "Anna is from", "subject": "Anna", "target_new": "good"}))
    free = METHODS["ROME_MDM"].edit_each(model, requests, settings)
    middle = (
        sorted(sum(e.card["facts"][0]["losses"][2:4]) for e in free)[1] / 2
    )  # at least one fact is below it before the others
    settings = dataclasses.replace(settings, early_stop_loss=middle + 1e-3)
    together = METHODS["ROME_MDM"].edit_each(model, requests, settings)
    assert len({e.card["facts"][0]["steps"] for e in together}) > 1
    for request, edit in zip(requests, together):
        alone = make_edit(model, request, settings).changes[0].dense()
        assert (edit.changes[0].dense() - alone).norm() <= 1e-4 * alone.norm()


def test_states_are_those_that_the_edited_model_meets(tiny):
    """on_policy: the rollout sees the edit in the weights."""
    model, settings = tiny("llada"), hparams(**THROUGH)
    request = EditRequest.of({**REQUEST, "target_new": "red river English"})
    fact, site = tokenise(model, request, settings), check_modules(model, settings)
    direction = closed_form(model, site, read_keys(model, site, fact, settings), settings)
    edit = METHODS["ROME_MDM"].edit(model, [request], settings)
    delta = edit.changes[0].left[:, 0] * direction.denominator
    revealed = torch.tensor([i == 1 for i in range(len(fact.target))])
    at, right = torch.tensor([fact.contexts[0].fact_at]), (direction.u / direction.denominator)[None]

    def slots():
        """Logits at the target's slots, of the model as it is."""
        return _slots(model, [fact], [revealed], [fact.target], 0)[0]

    with torch.no_grad(), _written(model, site, at, [delta], right, None):
        through = slots()
    with torch.no_grad(), _written(model, site, at, [delta], None, None):
        activation = slots()
    edit.apply(model)
    with torch.no_grad():
        really = slots()
    edit.revert(model)
    assert torch.allclose(through, really, atol=1e-5)
    assert not torch.allclose(activation, really, atol=1e-3)


def test_r_rome_says_that_it_cannot():
    """Its residual is not delta: it refuses instead of ignoring the setting."""
    base = METHODS["R-ROME_MDM"].hparams.from_hparams("R-ROME_MDM/twin-llada")
    with pytest.raises(HyperParameterError, match="optimise_through='weights' is not one of activation"):
        dataclasses.replace(base, optimise_through="weights")


BATCH_METHODS = [name for name in METHODS if issubclass(METHODS[name].hparams, BatchHyperParams)]
TWO = [
    {**REQUEST, "target_new": "red river English"},
    {"prompt": "Anna is from", "subject": "Anna", "target_new": "good"},
]


@pytest.mark.parametrize("method", BATCH_METHODS)
def test_several_layers_are_refused(method):
    """What an update of several layers does is not linear in the values."""
    base = METHODS[method].hparams.from_hparams(f"{method}/twin-llada")
    with pytest.raises(HyperParameterError, match="name one layer"):
        dataclasses.replace(base, optimise_through="weights", layers=[1, 2])


def losses_of(model, settings, requests) -> list[float]:
    """The likelihood's part of each fact's loss, for the model as it is."""
    facts = [tokenise(model, EditRequest.of(r), settings) for r in requests]
    site = settled(model, check_modules(model, settings), facts)
    only = dataclasses.replace(settings, v_num_grad_steps=1, kl_factor=0.0)
    found = optimise(model, site, facts, torch.ones(len(facts), model.config.hidden_size), only)
    return [outcome.losses[0] for outcome in found]


@pytest.mark.parametrize("family", ["llada", "gpt2", "dream"])
@pytest.mark.parametrize("method", BATCH_METHODS)
@pytest.mark.parametrize(
    "changes", [{"inside": True}, {"key_states": "per_state"}, {"key_average": "easyedit"}]
)
def test_the_last_losses_are_those_of_all_facts_in_the_weights(tiny, family, method, changes, monkeypatch):
    """One update of two facts: each sees the other's part, at every token. As activations neither does."""
    model, changes = tiny(family), dict(changes)
    if changes.pop("inside", False):
        monkeypatch.setattr(type(model), "ends_block", lambda self, site: False)
    gap = {}
    for through in ("weights", "activation"):
        settings = batch_hparams(
            method,
            layers=[1],
            state_schedule="enumerate",
            **{**THROUGH, "kl_factor": 0.0, "optimise_through": through},
            **changes,
        )
        edit = METHODS[method].edit(model, [EditRequest.of(r) for r in TWO], settings)
        last = [fact["losses"][-1] for fact in edit.card["facts"]]
        edit.apply(model)
        really = losses_of(model, settings, TWO)
        edit.revert(model)
        gap[through] = max(abs(a - b) / b for a, b in zip(really, last))
    assert gap["weights"] < 1e-4 and gap["activation"] > 1e-3


@pytest.mark.parametrize("method", BATCH_METHODS)
def test_the_update_elsewhere_is_part_of_the_loss(tiny, method):
    """mom2_factor: what the losses add to the edited model's own is E ||dW k||^2, in units of ||v_0||."""
    model, lost = tiny("llada"), {}
    for factor in (0.0, 3.0):
        settings = batch_hparams(
            method,
            layers=[1],
            state_schedule="enumerate",
            mom2_factor=factor,
            **{**THROUGH, "kl_factor": 0.0},
        )
        edit = METHODS[method].edit(model, [EditRequest.of(r) for r in TWO], settings)
        change = edit.changes[0]
        facts = [tokenise(model, EditRequest.of(r), settings) for r in TWO]
        scale = outputs(model, model.site(1), facts, settings).norm(dim=1)
        left, moment = change.left / scale, moments_of(change.right.shape[1], 1).moment.float()
        elsewhere = float(torch.einsum("wf,fi,ij,gj,wg->", left, change.right, moment, change.right, left))
        edit.apply(model)
        really = sum(losses_of(model, settings, TWO))
        edit.revert(model)
        last = sum(fact["losses"][-1] for fact in edit.card["facts"])
        assert last == pytest.approx(really + factor * elsewhere, rel=1e-4)
        lost[factor] = elsewhere
    assert 0 < lost[3.0] < lost[0.0]


def test_its_weight_is_refused_for_activations():
    """There it would do nothing."""
    base = METHODS["MEMIT_MDM"].hparams.from_hparams("MEMIT_MDM/twin-dream")
    with pytest.raises(HyperParameterError, match="needs optimise_through: weights"):
        dataclasses.replace(base, mom2_factor=1.0)


def test_cosine_rates():
    """v_lr falls over v_num_grad_steps - 1 steps, all that are taken, and would be 0 in the next."""
    delta = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=0.5)
    rates = _rates(optimizer, hparams(v_lr_schedule="cosine", v_num_grad_steps=11))
    seen = []
    for _ in range(11):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    assert seen[0] == 0.5 and seen[5] == pytest.approx(0.25) and seen[10] == pytest.approx(0, abs=1e-9)
    assert all(a > b for a, b in zip(seen, seen[1:]))


def test_the_rate_reaches_the_optimisation(tiny):
    """The schedule changes the deltas."""
    settings = [
        hparams(v_lr_schedule=name, clamp_norm_factor=1e6, v_lr=0.1) for name in ("constant", "cosine")
    ]
    norms = [make_edit(tiny("llada"), REQUEST, s).card["delta_norm"] for s in settings]
    assert norms[1] < 0.8 * norms[0]


@pytest.mark.data
@pytest.mark.end_to_end
def test_real_records_are_written(twin_llada, data_dir):
    """zsRE, which the twin knows nothing of: with its own file, four fifths of the target's tokens and more,
    in the weights.
    """
    settings = ROMEMDMHyperParams.from_hparams("ROME_MDM/twin-llada")
    found = load_cases("zsre", data_dir, None, 5, 42, twin_llada.tokenizer).cases
    edits = METHODS["ROME_MDM"].edit_each(twin_llada, [EditRequest.of(c.request()) for c in found], settings)
    accuracy = []
    for case, edit in zip(found, edits):
        edit.apply(twin_llada)
        accuracy.append(score_prompts(twin_llada, [case.prompt], [case.target_new])[0]["token_acc"])
        edit.revert(twin_llada)
    assert sum(accuracy) / len(accuracy) >= 0.8
