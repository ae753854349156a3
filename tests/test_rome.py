"""The battery that every family and every method passes: an edit is made, applied, taken back; bad input
changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from conftest import edited_site

from easyedit_mdm import EditRequest, ROMEMDMHyperParams, make_edit
from easyedit_mdm.common.fingerprints import model_fingerprint, parameter_hashes
from easyedit_mdm.denoising import SCHEDULES
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.context import context_templates
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.request import locate, target_ids
from easyedit_mdm.editing.solve import value
from easyedit_mdm.editing.solve.keys import read_keys
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.editing.solve.rows import build_rows
from easyedit_mdm.editing.solve.sites import settled
from easyedit_mdm.editing.solve.value import optimise
from easyedit_mdm.errors import (
    EditError,
    HyperParameterError,
    ModelError,
    OptimisationError,
    RequestError,
    StatisticsError,
)
from easyedit_mdm.models import FAMILIES
from easyedit_mdm.models.hooks import changing_output

REQUEST = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target_new": "red river",
}


def hparams(**changes) -> ROMEMDMHyperParams:
    """Settings for tiny random models."""
    return METHODS[changes.get("alg_name", "ROME_MDM")].hparams(
        **{
            "alg_name": "ROME_MDM", "model_name": "tiny", "layers": [1], "v_num_grad_steps": 12, "v_lr": 0.5,
            "v_weight_decay": 1e-3,
            "clamp_norm_factor": 10.0, "context_templates": ["{}", "The old song. {}"], **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("method", ["ROME_MDM", "R-ROME_MDM"])
def test_edit_apply_revert(tiny, family, method):
    """The loss starts at the model's own and falls, one weight changes, it maps k* to delta, and reverting is
    bit-exact.
    """
    model = tiny(family)
    before = parameter_hashes(model)
    # one context and nothing but the likelihood in the loss
    plain = dict(state_schedule="full_mask", context_templates=["{}"], kl_factor=0.0, v_weight_decay=0.0)
    edit = make_edit(model, REQUEST, hparams(alg_name=method, **plain))
    assert parameter_hashes(model) == before, "making an edit must not change the model"
    assert edit.card["facts"][0]["losses"][-1] < edit.card["facts"][0]["losses"][0] - 0.1
    assert edit.card["method"] == method and edit.card["facts"][0]["n_tokens"] >= 2
    assert log_likelihood(model) == pytest.approx(-edit.card["facts"][0]["losses"][0], rel=1e-4)
    originals = edit.apply(model)
    changed = [n for n, h in parameter_hashes(model).items() if h != before[n]]
    assert changed == list(originals) and set(changed) <= set(model.site(1).weights)
    change = edit.changes[0]
    assert not torch.equal(originals[change.name], dict(model.named_parameters())[change.name])
    with pytest.raises(EditError, match="already applied"):
        edit.apply(model)
    edit.revert(model)
    assert parameter_hashes(model) == before
    fact = tokenise(model, EditRequest.of(REQUEST), hparams(**plain))
    site = settled(model, model.site(1), [fact])
    assert tuple(changed) == site.weights
    key = read_keys(model, site, fact, hparams(**plain)).mean
    right = torch.cat([c.right for c in edit.changes], dim=1)
    assert float((change.left @ right @ key).norm()) == pytest.approx(edit.card["delta_norm"], rel=1e-4)
    with pytest.raises(EditError, match="not applied"):
        edit.revert(model)


@torch.no_grad()
def log_likelihood(model) -> float:
    """Mean log-probability of the target's tokens with every slot masked (or teacher-forced)."""
    target = target_ids(model, REQUEST["prompt"], REQUEST["target_new"])
    prompt = torch.tensor(model.tokenizer(REQUEST["prompt"])["input_ids"])
    tail = model.hidden.slots(len(target)) if model.denoises else target
    ids = torch.cat([prompt, tail])[None]
    at = torch.arange(len(prompt), len(prompt) + len(target))[None]
    logits = model.token_logits(ids, at=at, canvas=torch.tensor([len(prompt)]))
    return float(logits.log_softmax(-1)[0, torch.arange(len(target)), target].mean())


def loss_over_all_states(model) -> float:
    """The mean over every state of the target, with the same weights whatever an edit was optimised over; for
    the model as it is.
    """
    settings = hparams(state_schedule="enumerate", v_num_grad_steps=1, kl_factor=0.0, v_weight_decay=0.0)
    fact = tokenise(model, EditRequest.of(REQUEST), settings)
    return optimise(model, model.site(1), [fact], torch.ones(1, 32), settings)[0].losses[0]


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_schedule(tiny, name):
    """Each schedule teaches the model the target, whatever its own losses, drawn anew or not, were; the same
    seed gives the same update.
    """
    model = tiny("llada")
    settings = hparams(state_schedule=name)
    first, second = make_edit(model, REQUEST, settings), make_edit(model, REQUEST, settings)
    assert first.card["facts"][0]["schedule"] == name
    assert torch.equal(first.changes[0].dense(), second.changes[0].dense())
    before = loss_over_all_states(model)
    first.apply(model)
    assert loss_over_all_states(model) < before - 0.1


@pytest.mark.parametrize("name", ["cycle", "uniform", "stratified", "spread"])
def test_the_seed_draws_the_states(tiny, name):
    """Another seed, other states, another update (of a target long enough for `spread` not to hold all states
    anyway).
    """
    model, request = tiny("llada"), {**REQUEST, "target_new": "red river English"}
    one, other = (
        make_edit(model, request, hparams(state_schedule=name, seed=seed)).changes[0].dense()
        for seed in (0, 1)
    )
    assert float((one - other).norm() / one.norm()) > 1e-3


def test_single_token_targets_need_no_states(tiny):
    """N = 1: every schedule is the plain edit."""
    model = tiny("llada")
    request = {**REQUEST, "target_new": "the"}
    assert len(target_ids(model, request["prompt"], "the")) == 1
    updates = [make_edit(model, request, hparams(state_schedule=n)).changes[0].dense() for n in SCHEDULES]
    assert all(torch.allclose(u, updates[0], atol=1e-6) for u in updates)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_batch_of_facts_does_not_mix(tiny, name):
    """Facts of one batch, of unequal target length, get the deltas they get alone; splitting the rows or the
    batch changes nothing.
    """
    model = tiny("llada")
    settings = hparams(early_stop_loss=0.0, state_schedule=name)
    requests = [EditRequest.of({**REQUEST, "target_new": t}) for t in ("red river English", "the")]
    facts = [tokenise(model, r, settings) for r in requests]
    site = model.site(1)
    initial = torch.stack([torch.ones(32), torch.ones(32) * 2])

    def deltas(which, rows=256, facts_per_batch=64):
        changed = dataclasses.replace(settings, max_rows=rows, facts_per_batch=facts_per_batch)
        done = optimise(model, site, [facts[i] for i in which], initial[which], changed)
        return [d.delta for d in done]

    both = deltas([0, 1])
    for together, alone in zip(both, (deltas([0])[0], deltas([1])[0])):
        assert (together - alone).norm() / alone.norm() < 1e-4
    for other in (deltas([0, 1], rows=3), deltas([0, 1], facts_per_batch=1)):
        for together, split in zip(both, other):
            assert (together - split).norm() / together.norm() < 1e-4


def test_out_of_memory_halves_the_batch(tiny, monkeypatch):
    """A batch that does not fit is tried again in halves, with the same result; one fact that does not fit is
    an error.
    """
    model, settings = tiny("llada"), hparams(early_stop_loss=0.0)
    requests = [
        EditRequest.of({**REQUEST, "target_new": t}) for t in ("red river English", "the", "very good")
    ]
    facts, initial = [tokenise(model, r, settings) for r in requests], torch.ones(3, 32)
    whole, real, sizes = optimise(model, model.site(1), facts, initial, settings), value._optimise, []

    def small(adapter, site, part, *rest, **more):
        sizes.append(len(part))
        if len(part) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(adapter, site, part, *rest, **more)

    monkeypatch.setattr(value, "_optimise", small)
    room = 1
    halved = optimise(model, model.site(1), facts, initial, settings)
    assert sizes == [3, 2, 1, 1, 1]
    for a, b in zip(whole, halved):
        assert (a.delta - b.delta).norm() / a.delta.norm() < 1e-4
    room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        optimise(model, model.site(1), facts, initial, settings)


def test_converged_facts_leave_the_batch(twin_llama, world):
    """An early stop ends one fact and lets the other go on."""
    facts = world.all_facts()[:2]
    settings = hparams(
        early_stop_loss=0.5, context_templates=["{}"], v_num_grad_steps=10, kl_factor=0.0, v_weight_decay=0.0
    )
    easy = EditRequest.of(
        {"prompt": facts[0].prompt(), "subject": facts[0].subject, "target_new": facts[0].object}
    )
    hard = EditRequest.of(
        {"prompt": facts[1].prompt(), "subject": facts[1].subject, "target_new": "of the in a Zz Zz Zz"}
    )
    done = optimise(
        twin_llama,
        twin_llama.site(1),
        [tokenise(twin_llama, r, settings) for r in (easy, hard)],
        torch.ones(2, twin_llama.config.hidden_size),
        settings,
    )
    assert done[0].steps == 0 and done[1].steps == 9 and len(done[1].losses) == 10
    assert done[0].forwards < done[1].forwards and not done[0].delta.any()


def test_early_stop_looks_at_a_whole_cycle(tiny, monkeypatch):
    """One easy state must not end the optimisation: with `cycle`, the mean over the last N losses decides."""
    stopped = []
    for losses, expected in (([0.01, 9.0, 0.01, 9.0, 0.01, 9.0], 6), ([0.01, 0.02, 0.01, 9.0, 9.0, 9.0], 2)):
        fed = iter(losses)
        monkeypatch.setattr(
            value._Forward, "losses", lambda self, *a, fed=fed, **k: torch.tensor([next(fed)])
        )
        model = tiny("llada")
        settings = hparams(state_schedule="cycle", v_num_grad_steps=6)
        fact = tokenise(model, EditRequest.of({**REQUEST, "target_new": "of the"}), settings)
        assert len(fact.target) == 2
        done = optimise(model, model.site(1), [fact], torch.ones(1, 32), settings)[0]
        stopped.append((len(done.losses), expected))
    assert all(got == expected for got, expected in stopped)


def test_clamp(tiny):
    """Each delta ends in the ball of clamp_norm_factor times its own initial value's norm, and would leave it
    without.
    """
    model, tight = tiny("llada"), hparams(clamp_norm_factor=0.25, early_stop_loss=0.0)
    facts = [
        tokenise(model, EditRequest.of({**REQUEST, "target_new": t}), tight) for t in ("red river", "the")
    ]
    initial = torch.stack([torch.ones(32), 3 * torch.ones(32)])
    most = 0.25 * initial.norm(dim=1)
    for steps in (2, 3, 12):  # 2 is one step of Adam's, from 0 to v_lr in every direction
        settings = dataclasses.replace(tight, v_num_grad_steps=steps)
        norms = torch.stack(
            [d.delta.norm() for d in optimise(model, model.site(1), facts, initial, settings)]
        )
        assert (norms <= most * (1 + 1e-5)).all()
    assert torch.allclose(norms, most, rtol=1e-4), "the optimisation presses against the ball"
    free = optimise(model, model.site(1), facts, initial, dataclasses.replace(tight, clamp_norm_factor=1e6))
    assert all(d.delta.norm() > 1.5 * m for d, m in zip(free, most))


def test_what_the_clamp_is_measured_by(tiny):
    """In an edit: by the norm of the site's own output for the bare prompt."""
    model, settings = tiny("llada"), hparams(clamp_norm_factor=0.25)
    output = read_keys(
        model, model.site(1), tokenise(model, EditRequest.of(REQUEST), settings), settings
    ).initial
    assert make_edit(model, REQUEST, settings).card["delta_norm"] == pytest.approx(
        0.25 * float(output.norm()), rel=1e-4
    )


@pytest.mark.parametrize("average", ["single", "prompt"])
def test_r_rome_reaches_its_value_with_averaged_states(tiny, average):
    """(W + dW) k* is v_0 + delta, k* being a mean over states (and over prefixes)."""
    model, request = tiny("llada"), EditRequest.of(REQUEST)
    settings = hparams(alg_name="R-ROME_MDM", key_states="average", key_average=average)
    site = model.site(1)
    keys = read_keys(model, site, tokenise(model, request, settings), settings)
    delta = METHODS["R-ROME_MDM"].values(model, [request], settings)[0].delta
    make_edit(model, REQUEST, settings).apply(model)
    reached = model.module(site.name).weight.detach() @ (keys.mean if average == "single" else keys.keys[0])
    assert float((reached - keys.initial - delta).norm()) < 1e-4 * float(delta.norm())


@pytest.mark.parametrize("family", ["llada", "llama"])
@pytest.mark.parametrize("position", ["slot", "subject_last"])
def test_where_the_kl_is_read(tiny, family, position):
    """After "{subject} is a", or after the subject; a masked model reads at a slot, never at a token that is
    shown.
    """
    model = tiny(family)
    fact = tokenise(model, EditRequest.of(REQUEST), hparams())
    rows = build_rows(
        model, {0: fact}, {0: Plan.of(model, fact, "full_mask").draw(0, torch.Generator())}, position
    )
    (row,) = rows.anchor.nonzero()[:, 0].tolist()
    at = int(rows.at[row, 0])
    assert at == (len(fact.anchor.ids) if position == "slot" else fact.anchor.fact_at + 1)
    shown = rows.ids[row][rows.mask[row].bool()].tolist()
    assert shown == fact.anchor.ids[:at].tolist() + model.hidden.slots(int(model.denoises)).tolist()


@pytest.mark.parametrize("through", ["activation", "weights"])
@pytest.mark.parametrize(
    ("family", "name"), [("llada", s) for s in SCHEDULES] + [("llama", "full_mask"), ("gpt2", "full_mask")]
)
def test_layer_passes(tiny, family, name, through, monkeypatch):
    """They are the rows that really went through each layer while the value was optimised."""
    model, settings = (
        tiny(family),
        hparams(state_schedule=name, v_num_grad_steps=3, optimise_through=through, max_rows=5),
    )
    requests = [EditRequest.of({**REQUEST, "target_new": target}) for target in ("red river", "of the")]
    facts = [tokenise(model, request, settings) for request in requests]
    ends = model.ends_block(model.site(1))  # found out by a row of its own
    monkeypatch.setattr(type(model), "ends_block", lambda self, site: ends)
    seen, rights = (
        [],
        torch.ones(2, model.module(model.site(1).name).weight.shape[1 - model.site(1).transposed]),
    )
    with contextlib.ExitStack() as hooks:
        for layer in range(model.layers):
            block = model.module(model.spec.paths.block.format(layer))
            hooks.enter_context(changing_output(block, lambda out: seen.append(len(out)) or out))
        given = (rights * 1e-3,) if through == "weights" else ()
        done = optimise(model, model.site(1), facts, torch.ones(2, 32), settings, *given)
    assert sum(seen) == sum(d.layer_passes for d in done)
    assert all(d.layer_passes > d.forwards for d in done)


def test_one_key_everywhere(tiny):
    """`single`: the update maps k* to delta exactly; `easyedit` does so for the bare prompt's key only along
    u.
    """
    model = tiny("llada")
    edit = make_edit(model, REQUEST, hparams(key_average="single"))
    other = make_edit(model, REQUEST, hparams(key_average="easyedit"))
    assert edit.card["delta_norm"] == pytest.approx(other.card["delta_norm"], rel=1e-5)
    assert edit.card["denominator"] == pytest.approx(edit.card["key_norm"], rel=1e-5)  # u = k*/||k*||
    assert other.card["denominator"] < other.card["key_norm"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"subject": "Somebody Else"}, RequestError, "not in prompt"),
        ({"subject": ""}, RequestError, "subject is ''"),
        ({"target_new": "  "}, RequestError, "target_new is '  '"),
        ({"target_new": None}, RequestError, "target_new is None"),
        ({"target_new": "word " * 200}, RequestError, "128 positions"),
    ],
)
def test_bad_requests(tiny, change, error, message):
    """A clear error, and no weight is touched."""
    model = tiny("llada")
    before = model_fingerprint(model)
    with pytest.raises(error, match=message):
        make_edit(model, {**REQUEST, **change}, hparams())
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": [9]}, ModelError, "layers 0 to 2"),
        ({"rewrite_module_tmp": "model.layers.{}.mlp.down_prj"}, ModelError, "did you mean"),
        ({"lm_head_module": "head"}, ModelError, "no module 'head'"),
        ({"v_loss_layer": 1}, HyperParameterError, "last layer"),
        ({"decode": {"canvas": 1}}, RequestError, "canvas of 1"),
        ({"mom2_adjustment": True, "mom2_dataset": "/no/such.txt"}, StatisticsError, "not a file"),
    ],
)
def test_bad_settings(tiny, change, error, message):
    """The same for hyperparameters that only the model can refuse."""
    model = tiny("llada")
    before = model_fingerprint(model)
    with pytest.raises(error, match=message):
        make_edit(model, REQUEST, hparams(**change))
    assert model_fingerprint(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_the_last_layer_may_be_named(tiny):
    """v_loss_layer: the last one, by number, is what is done anyway."""
    model = tiny("llada")
    named, plain = (
        make_edit(model, REQUEST, hparams(v_num_grad_steps=3, **more)).changes[0].dense()
        for more in ({"v_loss_layer": 2}, {})
    )
    assert torch.equal(named, plain)
    with pytest.raises(HyperParameterError, match="v_loss_layer=3: the loss is read after the last layer, 2"):
        make_edit(model, REQUEST, hparams(v_loss_layer=3))


def test_nan_weights(tiny):
    """A model that computes NaN is refused before anything is changed."""
    model = tiny("llada")
    with torch.no_grad():
        model.module("model.layers.2.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(OptimisationError, match="nan"):
        make_edit(model, REQUEST, hparams())


def test_half_precision(tiny):
    """bf16 weights: the edit works, and reverting gives back every bit."""
    model = tiny("llada", dtype="bfloat16")
    before = parameter_hashes(model)
    edit = make_edit(model, REQUEST, hparams(v_num_grad_steps=4))
    edit.apply(model)
    assert parameter_hashes(model) != before
    edit.revert(model)
    assert parameter_hashes(model) == before


@pytest.mark.parametrize(
    ("where", "token"), [("subject_last", " Darrieux"), ("subject_first", " Daniel"), ("last", " is")]
)
def test_where_the_fact_is_read(tiny, where, token):
    """The site's token, in a context prefix that mentions the subject too."""
    model = tiny("llada")
    prompt = locate(model, EditRequest.of(REQUEST), "Danielle Darrieux sang. {}", where)
    ids = prompt.ids.tolist()
    read = model.tokenizer.decode(ids[: prompt.fact_at + 1])
    assert read.endswith(token)
    assert read.startswith("Danielle Darrieux sang. The")


def test_contexts_belong_to_their_model(tiny, twin_llada):
    """Prefixes are written by the model itself, kept per model, and the same for the same seed."""
    small = tiny("llada")
    mine, theirs = context_templates(small, [[6, 5]], 0), context_templates(twin_llada, [[6, 5]], 0)
    assert mine != theirs and mine[0] == theirs[0] == "{}"
    assert len(mine) == 6 and all(t.count("{}") == 1 and t.endswith(". {}") for t in mine[1:])
    assert mine == context_templates(small, [[6, 5]], 0) != context_templates(small, [[6, 5]], 1)


def test_edit_of_another_shape(tiny):
    """An edit does not fit another model, and says so before it changes anything."""
    edit = make_edit(tiny("llada"), REQUEST, hparams())
    other = tiny("gpt2")
    before = model_fingerprint(other)
    with pytest.raises(EditError, match="no such weight"):
        edit.apply(other)
    assert model_fingerprint(other) == before


def test_reverting_out_of_order(tiny):
    """A later edit must be taken back first; two adapters of one model are one model."""
    from easyedit_mdm import wrap_model

    model = tiny("llada")
    before = parameter_hashes(model)
    first = make_edit(model, REQUEST, hparams(v_num_grad_steps=3))
    second = make_edit(model, {**REQUEST, "target_new": "of the"}, hparams(v_num_grad_steps=3))
    first.apply(model)
    second.apply(model)
    with pytest.raises(EditError, match="revert later edits first"):
        first.revert(model)
    again = wrap_model(model.native, model.tokenizer, family="llada", mask_id=1)
    with pytest.raises(EditError, match="already applied"):
        second.apply(again)
    second.revert(again)
    first.revert(model)
    assert parameter_hashes(model) == before


def test_half_precision_gpt2(tiny):
    """Learned positions are added once, in the model's own dtype."""
    settings = hparams(v_num_grad_steps=8, early_stop_loss=0.0)
    half, whole = (
        make_edit(tiny("gpt2", dtype=dtype), REQUEST, settings).changes[0].dense()
        for dtype in ("bfloat16", "float32")
    )
    assert float((half - whole).norm() / whole.norm()) < 0.03  # 0.13 with positions added twice


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("layer", [0, -1])
def test_the_edited_layer_is_run_once(tiny, family, layer, monkeypatch):
    """delta goes into the stream above the layer: the same deltas as in the site's output, and the layer
    itself is not run at every step.
    """
    model = tiny(family)
    layer %= model.layers
    settings = hparams(
        early_stop_loss=0.0, v_num_grad_steps=6, state_schedule="enumerate", fact_token="last"
    )  # read from where delta is added
    facts = [
        tokenise(model, EditRequest.of({**REQUEST, "target_new": t}), settings)
        for t in ("red river English", "the")
    ]
    passed: list[int] = []

    def run():
        passed.clear()
        block = model.module(model.spec.paths.block.format(layer))
        with changing_output(block, lambda out: passed.append(len(out)) or out):
            return optimise(model, edited_site(model, layer), facts, torch.ones(2, 32), settings)

    ends = model.ends_block(edited_site(model, layer))
    above, few = run(), len(passed)
    monkeypatch.setattr(type(model), "ends_block", lambda self, site: False)
    inside, many = run(), len(passed)
    assert (few < many if ends else few == many) and many >= 6
    if (
        model.shift or layer < model.layers - 1
    ):  # otherwise the prediction of a slot is read at the slot, not at the site
        assert all(b.delta.norm() > 0 for b in inside)
    assert all((a.delta - b.delta).norm() <= 1e-4 * b.delta.norm() for a, b in zip(above, inside))
    assert all(a.losses == pytest.approx(b.losses, rel=1e-4) for a, b in zip(above, inside))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_stands_before_the_subject_is_run_once(tiny, family, monkeypatch):
    """Causal models: the same deltas with earlier columns kept, for fewer columns a step; also in small
    passes, and with facts that leave early.
    """
    model = tiny(family)
    settings = hparams(early_stop_loss=0.0, v_num_grad_steps=8)
    requests = [EditRequest.of({**REQUEST, "target_new": t}) for t in ("red river English", "the")]
    requests.append(EditRequest.of({"prompt": "Anna is from", "subject": "Anna", "target_new": "good"}))
    facts, initial = [tokenise(model, r, settings) for r in requests], torch.ones(3, 32)
    passed: list[int] = []

    def run(**changes):
        passed.clear()
        with changing_output(
            model.module("model.layers.1"), lambda out: passed.append(out.shape[0] * out.shape[1]) or out
        ):
            return optimise(model, model.site(0), facts, initial, dataclasses.replace(settings, **changes))

    kept, few = run(), sum(passed)
    threshold = sorted(d.losses[4] for d in kept)[1] + 1e-4  # at least one fact is below it before the others
    small, early = run(max_rows=2), run(early_stop_loss=threshold)
    monkeypatch.setattr(value, "can_keep", lambda adapter: False)
    plain, many = run(), sum(passed)
    assert few < 0.7 * many
    for got, wanted in ((kept, plain), (small, plain), (early, run(early_stop_loss=threshold))):
        assert [d.steps for d in got] == [d.steps for d in wanted]
        assert all((a.delta - b.delta).norm() <= 1e-4 * b.delta.norm() for a, b in zip(got, wanted))
    assert len({d.steps for d in early}) > 1
