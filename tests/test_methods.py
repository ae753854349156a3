"""What every method's entry in the table says, and what its hyperparameters refuse, whatever the method."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_batch_methods import REQUESTS

from easyedit_mdm import load_hparams, make_edit, make_edits
from easyedit_mdm.editing import METHODS, context
from easyedit_mdm.editing.activation import optimise_at, success_as_activation
from easyedit_mdm.editing.methods.alphaedit import null_space, projected
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.batch import System
from easyedit_mdm.errors import (
    HyperParameterError,
    ModelError,
    RequestError,
    StatisticsError,
    UnknownNameError,
)
from easyedit_mdm.statistics import SecondMoments

# name: (EasyEdit's counterpart, writes several facts at once, remembers the keys of a sequence)
TABLE = {
    "ROME_MDM": ("ROME", False, False),
    "R-ROME_MDM": ("R-ROME", False, False),
    "MEMIT_MDM": ("MEMIT", True, True),
    "EMMET_MDM": ("EMMET", True, True),
    "AlphaEdit_MDM": ("AlphaEdit", True, True),
    "FT_MDM": ("FT", True, False),
    "LORA_MDM": ("LoRA", True, False),
    "IKE_MDM": ("ROME", True, False),  # for IKE, EasyEdit's runners ask for sentence embeddings
    "GRACE_MDM": ("GRACE", True, False),
    "WISE_MDM": ("WISE", True, False),
    "TimeROME-style": ("ROME", True, False),
}
OPTIMISES_VALUES = {"ROME_MDM", "R-ROME_MDM", "MEMIT_MDM", "EMMET_MDM", "AlphaEdit_MDM", "TimeROME-style"}


def test_the_table():
    """Names, counterparts, and what each can do."""
    methods = {name: METHODS[name] for name in METHODS}
    assert {name: (m.stands_for, m.batchable, m.sequential) for name, m in methods.items()} == TABLE
    assert {name for name, m in methods.items() if m.values is not None} == OPTIMISES_VALUES


@pytest.mark.parametrize("name", list(TABLE))
def test_shipped_files_are_refused_with_one_bad_value(name):
    """Each class checks what all have in common, its own checks notwithstanding."""
    hparams = load_hparams(f"{name}/twin-llada")
    for change, says in (
        ({"seed": -1}, "seed=-1"),
        ({"alg_name": "ROME"}, "ROME"),
        ({"decode": {"steps": 0}}, "steps"),
        ({"guard": {"nothing": 1}}, "nothing"),
    ):
        with pytest.raises((HyperParameterError, UnknownNameError)) as caught:
            dataclasses.replace(hparams, **change)
        assert says in str(caught.value)
    if hasattr(hparams, "batch_size"):
        with pytest.raises(HyperParameterError, match="batch_size=0"):
            dataclasses.replace(hparams, batch_size=0)


@pytest.mark.parametrize("name", list(TABLE))
def test_advice(name):
    """What to try where a fact was not written: a sentence that names a field of the method's file."""
    hparams = load_hparams(f"{name}/twin-llada")
    advice = hparams.advice(1.0)
    fields = {field.name for field in dataclasses.fields(hparams)}
    assert advice.strip() and any(name in advice for name in (*fields, "layer"))


def test_what_files_may_leave_out():
    """Defaults are those of EasyEdit's files, or of the papers."""
    for name, fields in {
        "AlphaEdit_MDM": {"L2": 1.0},
        "GRACE_MDM": {"edit_lr": 1.0, "n_iter": 50, "eps": 1.0},
        "LORA_MDM": {"lora_dropout": 0.1},
        "TimeROME-style": {"ridge": 1e-4},
        "WISE_MDM": {"edit_lr": 1.0, "n_iter": 70, "mask_ratio": 0.2, "act_margin": [5.0, 20.0, 10.0],
            "act_ratio": 0.88, "norm_constraint": 1.0, "densities": 0.53, "retrieve": False},
        "IKE_MDM": {"batch_size": 1},
    }.items():  # fmt: skip
        more = {} if name == "IKE_MDM" else {"layers": [1]}
        more |= {"mom2_dataset": "twins"} if name == "AlphaEdit_MDM" else {}
        made = METHODS[name].hparams(alg_name=name, model_name="x", **more)
        assert {key: getattr(made, key) for key in fields} == fields, name
    assert METHODS["FT_MDM"].hparams(alg_name="FT_MDM", model_name="x", layers=[1], norm_constraint=False)


def test_an_edit_says_that_no_guard_looked_at_it(tiny):
    """And why: there is none, or it was not applied through it."""
    model = tiny("llama")
    common = {"alg_name": "IKE_MDM", "model_name": "tiny"}
    for guard, why in (
        (None, "guard is not set in the hyperparameters"),
        ({}, "not applied through the guard"),
    ):
        for make in (make_edit, lambda *args: make_edits(*args)[0]):
            edit = make(model, REQUESTS[:1], METHODS["IKE_MDM"].hparams(**common, guard=guard))
            assert edit.card["guard"] == {"on": False, "why": why}


# ---- context prefixes --------------------------------------------------------------------------------------


def test_context_prefixes(tiny, monkeypatch):
    """Each begins with the next of five words, and the model goes on up to the length that is asked for,
    sampled at temperature 1 from left to right, from the seed; special tokens are not shown.
    """
    model, asked = tiny("llada"), {}

    def decode(adapter, prompts, lengths, config, generator):
        """What is asked, and an answer with a special token in it."""
        asked.update(prompts=prompts, lengths=lengths, config=config, seed=generator.initial_seed())
        special = model.tokenizer.all_special_ids[0]
        words = model.tokenizer(" river", add_special_tokens=False)["input_ids"]
        return [type("Path", (), {"tokens": torch.tensor([special, *words])}) for _ in prompts]

    monkeypatch.setattr(context, "decode", decode)
    texts = context.context_templates(model, [[8, 7]])
    starts = ("The", "Therefore", "Because", "I", "You", "The", "Therefore")
    assert texts == ("{}", *(f"{start} river. {{}}" for start in starts))
    assert asked["lengths"] == [8 - len(prompt) for prompt in asked["prompts"]] and max(asked["lengths"]) < 8
    assert (asked["config"].order, asked["config"].temperature, asked["seed"]) == ("left_to_right", 1.0, 0)
    context.context_templates(model, [[1, 1]], 5)
    assert asked["lengths"] == [1] and asked["seed"] == 5


# ---- single methods ----------------------------------------------------------------------------------------


def test_alphaedit_says_when_its_system_is_singular(tiny):
    """With L2 = 0 and fewer keys than directions; with L2 the figures say how near it came. A direction
    whose eigenvalue is the threshold itself is not free.
    """
    settings = {"alg_name": "AlphaEdit_MDM", "model_name": "tiny", "layers": [1], "mom2_dataset": "twins"}
    cls = METHODS["AlphaEdit_MDM"].hparams
    moments = SecondMoments(torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), 1000)
    site = tiny("llama").site(1)
    keys, residual = torch.ones(3, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    system = System(site, keys, residual, moments)
    with pytest.raises(StatisticsError, match="singular with L2=0"):
        projected(cls(**settings, nullspace_threshold=9.0, L2=0), {})(system)
    projected(cls(**settings, nullspace_threshold=9.0, L2=1.0), {})(system)
    assert system.figures["denominator"] == pytest.approx(2 / 3, rel=1e-6)
    assert null_space(moments, 2.0, "absolute").shape == (3, 1)


def test_ft_leaves_gradients_as_they_were(tiny):
    """A gradient that somebody has left in the weight has no part in the edit, and is there afterwards."""
    settings = METHODS["FT_MDM"].hparams(
        alg_name="FT_MDM", model_name="tiny", layers=[1], num_steps=3, context_templates=["{}"]
    )
    clean, used = tiny("llama"), tiny("llama")
    wanted = make_edit(clean, REQUESTS[0], settings).changes[0].dense()
    weight = used.weight_of(used.site(1).name)
    weight.grad = torch.ones_like(weight)
    found = make_edit(used, REQUESTS[0], settings).changes[0].dense()
    assert torch.equal(found, wanted) and torch.equal(weight.grad, torch.ones_like(weight))


def test_ike_counts_its_tokens_and_says_where_it_is_not_offered(tiny):
    """Demonstrations and lead once, and every fact; no special tokens; a model with a canvas of its own, and
    one without a tokenizer, are refused.
    """
    settings = METHODS["IKE_MDM"].hparams(
        alg_name="IKE_MDM", model_name="tiny", demonstrations=[{"prompt": "a", "target_new": "b"}]
    )
    model = tiny("bert")
    edit = make_edit(model, REQUESTS, settings)
    tensors = [part.tensors for part in edit.attached]
    facts = sum(len(part["fact"]) for part in tensors)
    assert len(tensors) == 3 and len(tensors[0]["demonstrations"]) > 0 < len(tensors[0]["lead"])
    wanted = len(tensors[0]["demonstrations"]) + len(tensors[0]["lead"]) + facts
    assert edit.card["context_tokens"] == wanted
    special = set(model.tokenizer.all_special_ids)
    assert not special & {int(i) for part in tensors for ids in part.values() for i in ids}
    with pytest.raises(ModelError, match="IKE_MDM is not offered"):
        make_edit(tiny("diffusion-gemma"), REQUESTS, settings)
    bare = tiny("llama")
    bare.tokenizer = None
    with pytest.raises(RequestError, match="has no tokenizer"):
        make_edit(bare, REQUESTS, settings)


def test_emmet_made_together_weighs_as_alone(tiny):
    """Through the weights with mu = 0.5: what each of several edits is, is what it is alone."""
    model = tiny("llama")
    settings = dataclasses.replace(
        load_hparams("EMMET_MDM/twin-llama"), layers=[1], emmet_lambda=0.5, optimise_through="weights",
        v_num_grad_steps=4, context_template_length_params=[[4, 2]], mom2_n_tokens=256, mom2_eps=1e-3,
    )  # fmt: skip
    each = make_edits(model, REQUESTS[:2], settings)
    for edit, request in zip(each, REQUESTS):
        alone = make_edit(model, request, settings).changes[0].dense()
        assert float((edit.changes[0].dense() - alone).norm() / alone.norm()) < 1e-4


def test_a_value_as_an_activation(tiny):
    """Its size is told in units of the site's own output, and whole targets are compared."""
    model = tiny("llama")
    settings = METHODS["ROME_MDM"].hparams(
        alg_name="ROME_MDM", model_name="tiny", layers=[1], v_num_grad_steps=30, v_lr=0.5,
        v_weight_decay=0.0, clamp_norm_factor=2.0, kl_factor=0.0, mom2_adjustment=False,
        context_templates=["{}"],
    )  # fmt: skip
    values = optimise_at(model, [EditRequest.of(r) for r in REQUESTS[:2]], settings)
    assert 1.5 < float(values.ratio.max()) <= 2.001, "the clamp, in the same unit"
    assert len(success_as_activation(model, values)) == 2
