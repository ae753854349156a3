"""MEMIT, EMMET and AlphaEdit: closed forms against brute force, batches, key states, sequences, bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import edited_site

from easyedit_mdm import make_edit, make_edits
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.editing import METHODS, EditRequest, History
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.methods.alphaedit import null_space, projected
from easyedit_mdm.editing.methods.memit import least_squares
from easyedit_mdm.editing.solve import batch, sites
from easyedit_mdm.editing.solve.batch import BatchHyperParams, System, pivots
from easyedit_mdm.editing.solve.keys import key_columns
from easyedit_mdm.errors import (
    HyperParameterError,
    ModelError,
    OptimisationError,
    RequestError,
    StatisticsError,
)
from easyedit_mdm.models import FAMILIES
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.statistics import SecondMoments

BATCHED = [name for name in METHODS if issubclass(METHODS[name].hparams, BatchHyperParams)]
# of changes of weights; the residual memory has tests of its own
OF_VALUES = [name for name in METHODS if METHODS[name].values is not None and name != "TimeROME-style"]
REQUESTS = [
    {
        "prompt": "The mother tongue of Danielle Darrieux is",
        "subject": "Danielle Darrieux",
        "target_new": "red river",
    },
    {"prompt": "The river of Anna is", "subject": "Anna", "target_new": "the"},
    {"prompt": "The old song of Robert was", "subject": "Robert", "target_new": "a very good one"},
]


def test_which_methods_these_are():
    """All tests over BATCHED run for these three at least."""
    assert set(BATCHED) >= {"MEMIT_MDM", "EMMET_MDM", "AlphaEdit_MDM"} and not {
        "ROME_MDM",
        "R-ROME_MDM",
    } & set(BATCHED)


def moments_of(size: int, seed: int = 0) -> SecondMoments:
    """A second moment with eigenvalues from 0.001 to 1."""
    basis = torch.linalg.qr(
        torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )[0]
    return SecondMoments(basis @ torch.diag(torch.logspace(-3, 0, size, dtype=torch.float64)) @ basis.T, 1000)


@pytest.fixture(autouse=True)
def statistics(monkeypatch):
    """Well-behaved statistics for tiny models: what is tested here is what is done with them."""

    def given(adapter, sites, *_, **__):
        return [
            moments_of(adapter.module(s.name).weight.shape[0 if s.transposed else 1], s.layer) for s in sites
        ]

    monkeypatch.setattr(sites, "moments_for", given)


def hparams(method: str, **changes):
    """Settings for tiny random models."""
    extra = {"AlphaEdit_MDM": {"nullspace_threshold": 0.1, "L2": 1e-3}}.get(
        method, {"mom2_update_weight": 1e-3}
    )
    given = {**extra, **changes}
    return METHODS[method].hparams(
        **{
            "alg_name": method, "model_name": "tiny", "layers": [0, 1], "v_num_grad_steps": 10, "v_lr": 0.5,
            "v_weight_decay": 1e-3,
            "clamp_norm_factor": 10.0,
            "context_templates": ["{}", "The old song. {}"], "mom2_dataset": "given",
            **{k: v for k, v in given.items() if (k, v) != ("mom2_update_weight", None)},
        }
    )  # fmt: skip


@pytest.mark.parametrize("family", ["dream", "llama"])
@pytest.mark.parametrize("method", OF_VALUES)
def test_edits_made_together_are_those_made_alone(tiny, family, method):
    """make_edits: for every method, to 1e-5 of the update's norm, whatever the lengths of the other
    targets.
    """
    model = tiny(family)
    layers = [0, 1] if METHODS[method].batchable else [1]
    extra = {} if METHODS[method].batchable else {"mom2_update_weight": None, "mom2_adjustment": True}
    settings = hparams(method, layers=layers, state_schedule="enumerate", early_stop_loss=3.0, **extra)
    together = make_edits(model, REQUESTS, settings)
    for request, edit in zip(REQUESTS, together, strict=True):
        alone = make_edit(model, request, settings)
        assert [f["target_new"] for f in edit.card["facts"]] == [request["target_new"]]
        for ours, theirs in zip(edit.changes, alone.changes, strict=True):
            assert (ours.dense() - theirs.dense()).norm() <= 1e-5 * theirs.dense().norm()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("method", BATCHED)
def test_edit_apply_revert(tiny, family, method):
    """Every batched method on every family: losses fall, the residual is written, making and reverting leave
    no trace.
    """
    model = tiny(family)
    before = parameter_hashes(model)
    if method == "AlphaEdit_MDM" and model.site(1).routed:
        with pytest.raises(HyperParameterError, match="those of experts are others for every fact"):
            make_edit(model, REQUESTS, hparams(method))
        return
    edit = make_edit(model, REQUESTS, hparams(method))
    assert parameter_hashes(model) == before, "making an edit must not change the model"
    assert all(fact["losses"][-1] < fact["losses"][0] - 0.05 for fact in edit.card["facts"])
    assert len({fact["n_tokens"] for fact in edit.card["facts"]}) > 1
    first, last = (edit.card["layers"][str(layer)]["residual"] for layer in (0, 1))
    # behind a norm, what one layer adds is not what arrives at the next
    room = 1.05 if model.hidden.noise else 1.0
    assert last < first * room, "what is missing must shrink from layer to layer"
    facts = [tokenise(model, EditRequest.of(r), hparams(method)) for r in REQUESTS]
    wanted = [w for layer in (0, 1) for w in sites.settled(model, model.site(layer), facts).weights]
    edit.apply(model)
    changed = [n for n, h in parameter_hashes(model).items() if h != before[n]]
    assert changed == wanted
    edit.revert(model)
    assert parameter_hashes(model) == before


def system(columns: int, seed: int = 1) -> System:
    """A random system of 12 inputs and 5 outputs."""
    generator = torch.Generator().manual_seed(seed)
    keys, residual = (torch.randn(n, columns, generator=generator, dtype=torch.float64) for n in (12, 5))
    return System(Site(0, "x", transposed=False), keys, residual, moments_of(12))


@pytest.mark.parametrize("carried", [False, True])
def test_memit_is_least_squares(carried):
    """dW minimises ||dW K - R||^2 + ||dW K_0||^2 + lambda tr(dW C dW^T): equal to a brute-force solution, in
    which C is data too.
    """
    task, weight = system(4), 0.3
    known = torch.randn(12, 3 if carried else 0, generator=torch.Generator().manual_seed(5)).double()
    left, right = least_squares(0.0, weight, {"x": known, "y": task.keys})(task)
    root = torch.linalg.cholesky(
        weight * task.moments.moment
    )  # C's own "keys", whose outputs must not change
    inputs = torch.cat([task.keys, known, root], dim=1)
    outputs = torch.cat([task.residual, torch.zeros(5, known.shape[1] + 12, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(inputs.T, outputs.T).solution.T
    assert torch.allclose(left @ right, expected, rtol=1e-8, atol=1e-10)


def test_emmet_meets_every_equality():
    """With mu = 0, dW K = R to the letter, and dW is the smallest such change in C's metric."""
    task = system(4)
    left, right = least_squares(0.0, 0.0)(task)
    change = left @ right
    assert torch.allclose(change @ task.keys, task.residual, atol=1e-9)
    root = torch.linalg.cholesky(task.moments.moment)
    whitened = torch.linalg.solve(root, task.keys)
    expected = task.residual @ torch.linalg.pinv(whitened) @ torch.linalg.inv(root)
    assert torch.allclose(change, expected, rtol=1e-8, atol=1e-9)
    twice = dataclasses.replace(task, keys=task.keys[:, [0, 0]], residual=task.residual[:, [0, 1]])
    with pytest.raises(StatisticsError, match="linearly dependent.*fewer facts"):
        least_squares(0.0, 0.0)(twice)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_whatever_the_units(scale):
    """Dependent keys are found, independent ones accepted, however large or small keys are."""
    task = system(3)
    good = dataclasses.replace(task, keys=task.keys * scale)
    left, right = least_squares(0.0, 0.0)(good)
    assert torch.allclose(left @ right @ good.keys, task.residual, atol=1e-6)
    with pytest.raises(
        StatisticsError,
        match=f"system of 3 keys at layer 0 is singular .statistics of {task.moments.tokens} tokens",
    ):
        least_squares(0.0, 0.0)(dataclasses.replace(good, keys=good.keys[:, [0, 1, 0]]))


def test_pivots():
    """Smallest over largest of the squared diagonal; a closed form notes its system's."""
    assert pivots(torch.diag(torch.tensor([3.0, 1.0, 2.0]))) == pytest.approx(1 / 9)
    task = system(4)
    least_squares(0.0, 0.3)(task)
    solved = torch.linalg.solve(task.moments.moment, task.keys)
    factor = torch.linalg.cholesky(task.keys.T @ solved + 0.3 * torch.eye(4, dtype=torch.float64))
    assert task.figures["denominator"] == pytest.approx(pivots(factor), rel=1e-6)


@pytest.mark.parametrize("carried", [False, True])
def test_alphaedit_is_the_papers_system(carried):
    """Equal to solving (P (K K^T + K_0 K_0^T) + L2 I) X = P K R^T as it stands; nothing is changed outside
    the null space.
    """
    task = system(3)
    known = (
        {"x": torch.randn(12, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)}
        if carried
        else {}
    )
    settings = hparams("AlphaEdit_MDM", nullspace_threshold=0.05, L2=0.7)
    left, right = projected(settings, known)(task)
    values, vectors = torch.linalg.eigh(task.moments.moment)
    free = vectors[:, values < 0.05]
    project = free @ free.T
    every = torch.cat([task.keys, *known.values()], dim=1)
    expected = torch.linalg.solve(
        project @ every @ every.T + 0.7 * torch.eye(12, dtype=torch.float64),
        project @ task.keys @ task.residual.T,
    ).T
    assert torch.allclose(left @ right, expected, rtol=1e-8, atol=1e-10)
    assert float((left @ right @ vectors[:, values >= 0.05]).abs().max()) < 1e-10


def test_null_space_scales():
    """Relative thresholds follow the largest eigenvalue; an empty null space says so."""
    moments = moments_of(12)
    scaled = SecondMoments(moments.moment * 100, 1000)
    assert null_space(moments, 0.05, "absolute").shape == null_space(scaled, 0.05, "relative").shape
    with pytest.raises(StatisticsError, match="raise nullspace_threshold"):
        null_space(scaled, 1e-6, "absolute")


@pytest.mark.parametrize("family", ["llada", "llama"])
def test_memit_with_one_fact_is_rome(tiny, family):
    """One fact, one layer, lambda -> 0, the same k*, C and norm for the clamp: ROME's update."""
    model = tiny(family)
    shared = {"layers": [1], "early_stop_loss": 0.0}
    ours = (
        make_edit(
            model,
            REQUESTS[0],
            hparams("MEMIT_MDM", **shared, mom2_update_weight=1e-12, clamp_reference="mlp"),
        )
        .changes[0]
        .dense()
    )
    settings = hparams("MEMIT_MDM", **shared)
    plain = {f.name: getattr(settings, f.name) for f in dataclasses.fields(METHODS["ROME_MDM"].hparams)}
    one = (
        make_edit(model, REQUESTS[0], METHODS["ROME_MDM"].hparams(**{**plain, "alg_name": "ROME_MDM"}))
        .changes[0]
        .dense()
    )
    assert float((ours - one).norm() / one.norm()) < 1e-4


def test_emmet_with_mu_one_is_memit(tiny):
    """The identity in `memit.py`'s docstring, on a model."""
    model = tiny("llada")
    one, other = (
        make_edit(model, REQUESTS, hparams(m, **x))
        for m, x in (("MEMIT_MDM", {}), ("EMMET_MDM", {"emmet_lambda": 1.0}))
    )
    for a, b in zip(one.changes, other.changes):
        assert torch.allclose(a.dense(), b.dense(), atol=1e-6)


@pytest.mark.parametrize("method", BATCHED)
def test_single_token_targets_need_no_states(tiny, method):
    """Denoising-aware with N = 1 is plain: schedules and key states make no difference."""
    model = tiny("llada")
    request = {**REQUESTS[0], "target_new": "the"}
    plain = make_edit(model, request, hparams(method, state_schedule="full_mask")).changes
    for changes in ({"state_schedule": "enumerate"}, {"key_states": "per_state"}, {"key_states": "average"}):
        for a, b in zip(plain, make_edit(model, request, hparams(method, **changes)).changes):
            assert torch.allclose(a.dense(), b.dense(), atol=1e-6)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_keys_go_on_from_layer_to_layer(tiny, family):
    """With the streams of the layer before kept: the same keys, also where that layer's weights have changed
    since.
    """
    model, settings = tiny(family), hparams("MEMIT_MDM", max_rows=4)
    facts, lower = [tokenise(model, EditRequest.of(r), settings) for r in REQUESTS], {}
    for layer in range(model.layers):
        site = edited_site(model, layer)
        assert (
            key_columns(model, site, facts, settings, lower).keys
            - key_columns(model, site, facts, settings).keys
        ).abs().max() < 1e-5
        if layer > 0:
            assert {at for at, _ in lower.values()} == {layer}
        with torch.no_grad():
            for part in site.parts or [site.name]:
                model.weight_of(part).mul_(-2)  # what a stale stream would not know


def test_key_states(tiny):
    """per_state gives a key for each state, whose weighted mean is average's; full_mask's is the one with
    nothing revealed.
    """
    model = tiny("llada")
    settings = {name: hparams("MEMIT_MDM", key_states=name) for name in ("full_mask", "average", "per_state")}
    requests = [*REQUESTS[:2], {**REQUESTS[2], "target_new": "the of"}]
    facts = [tokenise(model, EditRequest.of(r), settings["average"]) for r in requests]
    columns = {name: key_columns(model, model.site(1), facts, s) for name, s in settings.items()}
    sizes = [2 ** len(f.target) - 1 for f in facts]
    assert columns["per_state"].fact.bincount().tolist() == sizes and len(set(sizes)) > 1
    for i in range(len(facts)):
        of_i = columns["per_state"].fact == i
        keys, weights = columns["per_state"].keys[:, of_i], columns["per_state"].weights[of_i]
        assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
        assert torch.allclose(keys @ weights.double(), columns["average"].keys[:, i], atol=1e-6)
        assert torch.allclose(keys[:, 0], columns["full_mask"].keys[:, i], atol=1e-6)
    assert not torch.allclose(columns["average"].keys, columns["full_mask"].keys, atol=1e-4)
    changes = {name: make_edit(model, REQUESTS, s).changes[0].dense() for name, s in settings.items()}
    assert not torch.allclose(changes["per_state"], changes["average"], atol=1e-5)


@pytest.mark.parametrize("method", BATCHED)
def test_history(tiny, method):
    """A second edit knows the first one's keys while the model carries it, and forgets them once it is taken
    back.
    """
    model = tiny("llada")
    settings = hparams(method, **({} if method == "AlphaEdit_MDM" else {"keep_edits": True}))
    alone = make_edit(model, REQUESTS[1], settings).changes[0].dense()
    history = History()
    first = make_edit(model, REQUESTS[0], settings, history)
    first.apply(model)
    without = make_edit(model, REQUESTS[1], settings).changes[0].dense()
    second = make_edit(model, REQUESTS[1], settings, history).changes[0].dense()
    assert len(history) == 2
    assert not torch.allclose(second, without, atol=1e-6)
    first.revert(model)
    assert torch.equal(make_edit(model, REQUESTS[1], settings, history).changes[0].dense(), alone)
    assert len(history) == 1


@pytest.mark.parametrize("method", ["MEMIT_MDM", "EMMET_MDM"])
def test_no_history_unless_asked_for(tiny, method):
    """As in EasyEdit: earlier edits are nothing to a later one."""
    model, settings, history = tiny("llada"), hparams(method), History()
    make_edit(model, REQUESTS[0], settings, history).apply(model)
    without = make_edit(model, REQUESTS[1], settings).changes[0].dense()
    assert torch.equal(make_edit(model, REQUESTS[1], settings, history).changes[0].dense(), without)
    assert len(history) == 0


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([REQUESTS[0], {**REQUESTS[0], "target_new": "bad"}], "two targets, 'red river' and 'bad'"),
        ([REQUESTS[0], REQUESTS[0]], "twice"),
        ([REQUESTS[0], {**REQUESTS[0], "prompt": "the  mother tongue of {} is"}], "twice"),
        ([], "at least one"),
    ],
)
def test_contradictions(tiny, requests, message):
    """The same subject and relation twice in a batch; nothing changed."""
    model = tiny("llada")
    before = parameter_hashes(model)
    with pytest.raises(RequestError, match=message):
        make_edit(model, requests, hparams("MEMIT_MDM"))
    assert parameter_hashes(model) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": [0, 9]}, ModelError, "layers 0 to 2"),
        ({"layers": [1, 0]}, HyperParameterError, "ascending"),
        ({"layers": []}, HyperParameterError, "list of layer numbers"),
        ({"mom2_adjustment": False}, HyperParameterError, "defined by its statistics"),
        ({"key_states": "all"}, HyperParameterError, "full_mask, average, per_state"),
        ({"clamp_reference": "head"}, HyperParameterError, "block, mlp"),
        ({"mom2_update_weight": -1.0}, HyperParameterError, "mom2_update_weight=-1.0 must be .* at least 0"),
        ({"batch_size": 0}, HyperParameterError, "whole number"),
    ],
)
def test_bad_settings(tiny, changes, error, message):
    """Each with a clear error."""
    with pytest.raises(error, match=message):
        make_edit(tiny("llada"), REQUESTS, hparams("MEMIT_MDM", **changes))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("EMMET_MDM", {"emmet_lambda": -0.5}, "emmet_lambda=-0.5 must be"),
        ("AlphaEdit_MDM", {"L2": -1}, "L2=-1 must be"),
        ("AlphaEdit_MDM", {"nullspace_threshold": float("nan")}, "nullspace_threshold=nan must be"),
        ("AlphaEdit_MDM", {"nullspace_scale": "log"}, "nullspace_scale='log' is not one of"),
        ("AlphaEdit_MDM", {"mom2_eps": 0.1}, "mom2_eps=0.1: AlphaEdit_MDM does not use it"),
        ("AlphaEdit_MDM", {"mom2_update_weight": 3}, "mom2_update_weight=3: AlphaEdit_MDM does not use it"),
    ],
)
def test_bad_settings_of_their_own(method, changes, message):
    """What a method adds is checked, too."""
    with pytest.raises(HyperParameterError, match=message):
        hparams(method, **changes)


def test_statistics_are_never_left_out(tiny, monkeypatch):
    """No text, no edit: the identity does not take the place of C."""
    monkeypatch.undo()
    with pytest.raises(StatisticsError, match="not a file"):
        make_edit(tiny("llada"), REQUESTS, hparams("MEMIT_MDM"))
    with pytest.raises(HyperParameterError, match="names no text"):
        hparams("MEMIT_MDM", mom2_dataset=None)


def test_failure_in_the_middle_leaves_no_trace(tiny, monkeypatch):
    """An error at the second layer, with the first one changed already, leaves the model as it was."""
    model = tiny("llada")
    before, real, calls = parameter_hashes(model), batch.key_columns, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OptimisationError("no")
        return real(*args)

    monkeypatch.setattr(batch, "key_columns", failing)
    with pytest.raises(OptimisationError):
        make_edit(model, REQUESTS, hparams("MEMIT_MDM"))
    assert parameter_hashes(model) == before
