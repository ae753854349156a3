"""A canvas longer than the target, on which the edit is to end: states, rows and loss, and what it does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_batch_methods import hparams as batch_hparams
from test_batch_methods import statistics  # noqa: F401 - an automatic fixture: statistics of tiny models
from test_families_blocks import is_state
from test_rome import REQUEST, hparams
from test_through_weights import THROUGH, loss_now

from easyedit_mdm import EditRequest, Session, load_hparams, make_edit, score_prompts
from easyedit_mdm.denoising import SCHEDULES, DecodeConfig, schedule
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.solve.keys import key_columns
from easyedit_mdm.editing.solve.losses import StateLosses
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.editing.solve.rows import build_rows
from easyedit_mdm.errors import HyperParameterError, RequestError
from easyedit_mdm.twins.benchmark import cases

DRAWN = [name for name in SCHEDULES if not schedule(name, 2).rolled]
N = 3  # tokens of REQUEST's target


def plan_of(model, name: str, canvas: int, most: int = 31, **changes) -> tuple[Plan, torch.Tensor]:
    """The plan of REQUEST, and its target."""
    fact = tokenise(model, EditRequest.of(REQUEST), hparams(**changes))
    assert len(fact.target) == N
    return Plan.of(model, fact, name, most, canvas), fact.target


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("canvas", [1, 4, 9])
def test_the_states(tiny, name, canvas):
    """Half of the weight; target, end, and slots behind it that are never read and may show the end."""
    model = tiny("llada")
    plan, target = plan_of(model, name, canvas)
    generator, behind = torch.Generator().manual_seed(0), set()
    for step in range(40):
        own, longer = [states for _, states in plan.draw(step, generator)]
        assert own.tokens is None and own.revealed.shape[1] == N
        slots = max(canvas, N + 1)
        assert longer.tokens.tolist() == target.tolist() + [model.ids.eos] * (slots - N)
        assert float(own.weights.sum()) == float(longer.weights.sum()) == pytest.approx(0.5)
        for shown, read in zip(longer.revealed.tolist(), longer.scored.tolist()):
            assert is_state((N + 1,), shown[: N + 1], read[: N + 1]) and not any(read[N + 1 :])
            behind.add(sum(shown[N + 1 :]))
    late = max(0, canvas - N - 1)
    assert behind == {0} if name in ("full_mask", "left_to_right") else min(behind) >= 0
    if late and name in ("stratified", "cycle", "uniform"):  # drawn anew: from none to all of them
        assert behind == set(range(late + 1))


def test_fixed_states_stay(tiny):
    """What a schedule keeps from step to step stays, the slots behind the end included; what it draws does
    not.
    """
    model = tiny("llada")
    for name, fixed in (("enumerate", True), ("spread", True), ("stratified", False)):
        plan, _ = plan_of(model, name, 9)
        generator = torch.Generator().manual_seed(0)
        first, *later = [plan.draw(step, generator)[1][1].revealed.tolist() for step in range(6)]
        assert plan.fixed == fixed == all(each == first for each in later)


@pytest.mark.parametrize("name", DRAWN)
def test_where_a_sampler_begins(tiny, name):
    """The canvas with nothing shown is among the states, every other time where they are drawn anew."""
    plan, _ = plan_of(tiny("llada"), name, 16)
    generator, hidden = torch.Generator().manual_seed(0), []
    for step in range(24):
        states = plan.draw(step, generator)[1][1]
        hidden.append(bool((~states.revealed.any(1)).any()))
    assert all(hidden) if plan.fixed else sum(hidden) >= 3


def test_early_stopping_looks_at_one_round(tiny):
    """The states of both canvases have been seen after as many steps as the longer one has: an easy fact
    stops there.
    """
    model = tiny("llada")
    plan, _ = plan_of(model, "spread", 16)
    assert plan.cycle == N + 1
    settings = hparams(state_schedule="spread", open_canvas=16, early_stop_loss=1e9, v_num_grad_steps=25)
    assert len(make_edit(model, REQUEST, settings).card["facts"][0]["losses"]) == N + 1


def test_blocks_end_where_the_end_is(tiny):
    """In a block-causal model nothing stands behind the block of the end; earlier blocks are finished."""
    model = tiny("sdar")
    fact = tokenise(model, EditRequest.of(REQUEST), hparams())
    sizes = model.blocks(len(fact.contexts[0].ids), 40)
    assert len(sizes) > 2
    for canvas in (4, 40):
        plan = Plan.of(model, fact, "stratified", 31, canvas)
        for group, longer in zip(plan.groups, plan.longer):
            states = longer.draw(0, torch.Generator().manual_seed(0))
            read, blocks = N + 1, group.longer
            last = next(i for i in range(len(blocks)) if sum(blocks[: i + 1]) >= read)
            assert states.revealed.shape[1] == sum(blocks[: last + 1])
            within = (*blocks[:last], read - sum(blocks[:last]))
            for shown, scored in zip(states.revealed.tolist(), states.scored.tolist()):
                assert is_state(within, shown[:read], scored[:read])
                if last and not all(shown[: sum(blocks[:last])]):
                    assert not any(shown[read:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_autoregressive_model_is_asked_for_the_end(tiny, family):
    """Half of the loss is the target's, the other half that of the target and one end-of-text token."""
    model = tiny(family)
    settings = hparams(open_canvas=16, context_templates=["{}"], kl_factor=0.0, v_weight_decay=0.0)
    fact = tokenise(model, EditRequest.of(REQUEST), settings)
    row = torch.cat([fact.contexts[0].ids, fact.target])
    at = torch.arange(len(row) - N, len(row) + 1)[None]
    with torch.no_grad():
        logs = model.token_logits(row[None], at=at)[0].log_softmax(-1)
    right = logs.gather(-1, torch.cat([fact.target, torch.tensor([model.ids.eos])])[:, None])[:, 0]
    assert loss_now(model, settings) == pytest.approx(-float(right[:N].mean() + right.mean()) / 2, rel=1e-5)


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "llama"])
@pytest.mark.parametrize("name", ["enumerate", "spread", "full_mask"])
def test_the_last_loss_is_the_edited_models(tiny, family, name):
    """Through the weights, on both canvases, whatever prefixes."""
    model = tiny(family)
    settings = hparams(
        **{**THROUGH, "kl_factor": 0.0, "state_schedule": name, "v_num_grad_steps": 7, "open_canvas": 6}
    )
    edit = make_edit(model, REQUEST, settings)
    losses = edit.card["facts"][0]["losses"]
    edit.apply(model)
    cycle = Plan.asked(model, tokenise(model, EditRequest.of(REQUEST), settings), settings).cycle
    if cycle > 1 and model.denoises:  # dealt out: the last step has other states than the first
        assert min(losses[1:]) < losses[0]
        return
    assert losses[-1] < losses[0] and loss_now(model, settings) == pytest.approx(losses[-1], rel=1e-4)


def test_dealt_states_weigh_as_much(tiny):
    """At each step a prefix has one state of each canvas, half and half."""
    model = tiny("llada")
    settings = hparams(state_schedule="spread", open_canvas=9)
    fact = tokenise(model, EditRequest.of(REQUEST), settings)
    plan = Plan.asked(model, fact, settings)
    rows = build_rows(model, {0: fact}, {0: plan.draw(0, torch.Generator().manual_seed(0))}, None, plan.dealt)
    for step in range(plan.cycle):
        counting = rows.take(rows.counting(step))
        assert len(counting) == 2 * len(fact.contexts)
        assert float(counting.weights.sum()) == pytest.approx(1)
        long = counting.mask.sum(1) > counting.canvas + N
        assert float(counting.weights[long].sum()) == pytest.approx(0.5)


def test_training_methods_read_it(tiny):
    """FT's loss has it, too; `prompt_last` reads one place and refuses it."""
    model = tiny("llama")
    named = {"alg_name": "FT_MDM", "model_name": "tiny", "layers": [1]}
    settings = METHODS["FT_MDM"].hparams(**named, open_canvas=4)
    fact = tokenise(model, EditRequest.of(REQUEST), settings)
    losses = StateLosses(model, [fact], settings)
    expected = loss_now(model, hparams(open_canvas=4, context_templates=["{}"], v_weight_decay=0.0))
    assert float(losses.backward(0, [0], torch.ones(1))) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(HyperParameterError, match="open_canvas=4.*prompt_last"):
        METHODS["FT_MDM"].hparams(**named, open_canvas=4, objective_optimization="prompt_last")


def test_keys_of_its_states(tiny):
    """`per_state` has a key for each state of both canvases, and they weigh one half each."""
    model = tiny("llada")
    counts = {}
    for canvas in (0, 9):
        settings = batch_hparams("MEMIT_MDM", key_states="per_state", open_canvas=canvas)
        fact = tokenise(model, EditRequest.of(REQUEST), settings)
        columns = key_columns(model, model.site(1), [fact], settings)
        counts[canvas] = columns.keys.shape[1]
        assert float(columns.weights.sum()) == pytest.approx(1)
    assert counts == {0: 2**N - 1, 9: 2**N - 1 + 2 ** (N + 1) - 1}


def test_a_codebook_needs_the_keys_of_both(tiny):
    """GRACE_MDM on a masked model is asked for a key a state; on an autoregressive one they are all one."""
    named = {"alg_name": "GRACE_MDM", "model_name": "tiny", "layers": [1], "n_iter": 2, "open_canvas": 8}
    with pytest.raises(HyperParameterError, match="open_canvas=8 with key_states: full_mask"):
        make_edit(tiny("llada"), REQUEST, METHODS["GRACE_MDM"].hparams(**named))
    (part,) = make_edit(
        tiny("llada"), REQUEST, METHODS["GRACE_MDM"].hparams(**named, key_states="per_state")
    ).attached
    assert len(part.tensors["keys"]) == 2**N - 1 + 2 ** (N + 1) - 1
    make_edit(tiny("llama"), REQUEST, METHODS["GRACE_MDM"].hparams(**named))


@pytest.mark.parametrize("method", ["LORA_MDM", "WISE_MDM"])
def test_other_methods_have_it_in_their_loss(tiny, method):
    """Their first loss is another with it."""
    named = {"alg_name": method, "model_name": "tiny", "layers": [1]}
    if method == "LORA_MDM":
        pytest.importorskip("peft", exc_type=ImportError)
        named |= {"num_steps": 2, "target_modules": ["q_proj"], "lora_dropout": 0.0}
    else:
        named |= {"n_iter": 2, "edit_lr": 0.1}
    first = [
        make_edit(tiny("llada"), REQUEST, METHODS[method].hparams(**named, open_canvas=canvas)).card["facts"]
        for canvas in (0, 8)
    ]
    assert first[0][0]["losses"][0] != pytest.approx(first[1][0]["losses"][0], rel=1e-3)


def test_what_cannot_be_done(tiny, monkeypatch):
    """States that a model decodes through, a model without an end, a row that is too long."""
    with pytest.raises(HyperParameterError, match="open_canvas=8 with state_schedule: on_policy"):
        hparams(open_canvas=8, state_schedule="on_policy")
    with pytest.raises(HyperParameterError, match="open_canvas=-1"):
        hparams(open_canvas=-1)
    model = tiny("llada")
    with pytest.raises(RequestError, match="an open canvas of 5000 slots"):
        tokenise(model, EditRequest.of(REQUEST), hparams(open_canvas=5000))
    monkeypatch.setattr(model, "ids", dataclasses.replace(model.ids, eos=None))
    with pytest.raises(HyperParameterError, match="no end-of-text token"):
        make_edit(model, REQUEST, hparams(open_canvas=8))


def test_without_it_nothing_changes(tiny):
    """The same draws and rows as ever, where there is none."""
    model = tiny("llada")
    fact = tokenise(model, EditRequest.of({**REQUEST, "target_new": "a " * 10}), hparams())
    dealt = Plan.of(model, fact, "spread")
    rows = build_rows(model, {0: fact}, {0: dealt.draw(0, torch.Generator())}, None, True)
    read = rows.weights > 0
    assert len({float(w) for w in (rows.weights * read.sum(1, keepdim=True))[read]}) <= 2
    plan, _ = plan_of(model, "stratified", 0)
    own = schedule("stratified", N).draw(3, torch.Generator().manual_seed(5))
    (states,) = [each for _, each in plan.draw(3, torch.Generator().manual_seed(5))]
    assert torch.equal(states.revealed, own.revealed) and torch.equal(states.weights, own.weights)


@pytest.mark.parametrize("name", ["twin-llada", "twin-llama"])
def test_an_edit_ends(name, request, world):
    """On a canvas of 16 the edited twins end behind the target, where the shipped edit writes on."""
    model = request.getfixturevalue(name.replace("-", "_"))
    some = [case for case in cases(world, "validation") if case.length == 3][:4]
    ended = {}
    for canvas in (0, 16):
        settings = dataclasses.replace(load_hparams(f"MEMIT_MDM/{name}"), open_canvas=canvas)
        ended[canvas] = []
        for case in some:
            with Session(model, settings) as session:
                session.edit([EditRequest.of(case.request())])
                score = score_prompts(model, [case.fact.prompt()], [case.target], DecodeConfig(canvas=16))[0]
                ended[canvas].append(score["text_to_end"] == case.target)
    assert all(ended[16]) and not all(ended[0])
