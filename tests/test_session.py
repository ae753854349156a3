"""One editing session: modes, the stack of edits and taking any of them back, and the guard over a whole
sequence.
"""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from easyedit_mdm import Session
from easyedit_mdm.editing import METHODS, ROMEMDMHyperParams
from easyedit_mdm.editing.edit import Edit, LowRank
from easyedit_mdm.editing.methods import Method
from easyedit_mdm.errors import CollapseError, EditError, HyperParameterError, NameTakenError, RequestError

STEPS = 3


@pytest.fixture(scope="module")
def requests(world):
    """Four facts of the twins' world, each about another subject."""
    facts = {f.subject: f for f in world.all_facts()}
    return [
        {"prompt": f.prompt(), "subject": f.subject, "target_new": "red"} for f in list(facts.values())[:4]
    ]


@pytest.fixture
def model(twin_llama):
    """A twin of one's own."""
    return copy.deepcopy(twin_llama)


def hparams(method: str = "ROME_MDM", **changes) -> ROMEMDMHyperParams:
    """The shipped file, with few steps."""
    read = METHODS[method].hparams.from_hparams(f"{method}/twin-llama")
    return dataclasses.replace(read, v_num_grad_steps=STEPS, context_templates=["{}"], guard=None, **changes)


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_everything_is_put_back(model, requests):
    """At the end of the block, and after an exception in it, the weights are those of before; `keep` leaves
    the edits.
    """
    base = weights(model)
    with Session(model, hparams()) as session:
        made = session.edit(requests[:2])
        assert len(made) == 2
        assert session.edits == made
        assert not same(weights(model), base)
    assert same(weights(model), base)
    with pytest.raises(ZeroDivisionError), Session(model, hparams()) as session:
        session.edit(requests[:1])
        raise ZeroDivisionError
    assert same(weights(model), base)
    with Session(model, hparams()) as session:
        session.edit(requests[:1])
        session.keep()
    assert not same(weights(model), base)


def test_an_edit_in_the_middle_is_taken_back(model, requests):
    """Without the second of four edits the weights are those of the other three applied in order, bit for
    bit.
    """
    base = weights(model)
    session = Session(model, hparams())
    first, second, third, fourth = session.edit(requests)
    assert session.undo(second) is second
    assert session.edits == [first, third, fourth]
    without = weights(model)
    session.undo_all()
    assert same(weights(model), base)
    for edit in (first, third, fourth):
        edit.apply(model)
    assert same(weights(model), without)
    with pytest.raises(EditError, match="no edit to take back"):
        session.undo()


def test_the_history_forgets_an_edit_in_the_middle(model, requests):
    """AlphaEdit's next edit respects the keys of the edits that are left, and of no other."""
    settings = hparams("AlphaEdit_MDM")
    names = [model.site(layer).weight for layer in settings.layers]
    session = Session(model, settings)
    made = session.edit(requests[:3], mode="sequential")
    keys = session.history.carried(model, names)
    session.undo(made[1])
    left = session.history.carried(model, names)
    assert len(session.history) == 2
    for name, columns in keys.items():
        third = columns.shape[1] // 3
        assert torch.equal(left[name], torch.cat([columns[:, :third], columns[:, 2 * third :]], dim=1))
    session.undo()
    session.history.carried(model, names)
    assert len(session.history) == 1
    session.undo_all()
    assert session.history.carried(model, names) == {}


def test_undo_refuses_what_is_not_there(model, requests):
    """An edit of another session, and one that was taken back already."""
    session, other = Session(model, hparams()), Session(model, hparams())
    (edit,) = session.edit(requests[:1])
    with pytest.raises(EditError, match="not one that the model carries in this session"):
        other.adopt(edit)
        other.undo(Edit([], {}))
    session.undo()
    assert other.edits == []


def test_modes(model, requests):
    """Batch makes one edit of all, sequential one a group in what earlier ones left, each independent
    ones.
    """
    base = weights(model)
    session = Session(model, hparams("MEMIT_MDM", mom2_n_tokens=2000))
    (batch,) = session.edit(requests)
    assert len(batch.card["facts"]) == 4
    session.undo_all()
    groups = session.edit(requests, mode="sequential", batch_size=3)
    assert [len(edit.card["facts"]) for edit in groups] == [3, 1]
    session.undo_all()
    alone = [next(iter(session.steps([request]))).edits[0] for request in requests[:2]]
    each = session.edit(requests[:2], mode="each")
    for one, other in zip(alone, each):
        for a, b in zip(one.changes, other.changes):
            assert (a.dense() - b.dense()).abs().max() < 1e-4 * a.dense().abs().max()
    session.undo_all()
    assert same(weights(model), base)


def test_steps(model, requests):
    """Each and batch take a step back before the next, sequential keeps it."""
    base, session = weights(model), Session(model, hparams())
    for step in session.steps(requests[:2]):
        assert session.edits == step.edits
        assert len(step.requests) == 1
    assert same(weights(model), base)
    carried = [len(session.edits) for _ in session.steps(requests[:3], "sequential", 2)]
    assert carried == [2, 3]
    session.undo_all()
    for _ in session.steps(requests[:2]):
        break
    assert same(weights(model), base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "bacth"}, "did you mean 'batch'"),
        ({"mode": "batch"}, "writes one fact at a time"),
        ({"mode": "each", "batch_size": 2}, "one fact at a time"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_modes_that_make_no_sense(model, requests, options, message):
    """Said with the value; no weight is changed."""
    base = weights(model)
    with pytest.raises(HyperParameterError, match=message):
        Session(model, hparams()).edit(requests, **options)
    assert same(weights(model), base)


def test_a_failure_takes_the_call_back(model, requests):
    """The second fact of a call cannot be edited: the first is taken back, edits of earlier calls stay."""
    session = Session(model, hparams())
    (kept,) = session.edit(requests[:1])
    before = weights(model)
    with pytest.raises(Exception, match="canvas"):
        session.hparams = dataclasses.replace(hparams(), decode={"canvas": 1})
        session.edit([requests[1], {**requests[2], "target_new": "red red red red red red"}])
    assert session.edits == [kept]
    assert same(weights(model), before)


def test_weights_that_somebody_else_put_back(model, requests):
    """EasyEdit's editor restores weights itself: such an edit is no longer on the stack."""
    base, session = weights(model), Session(model, hparams())
    session.edit(requests[:1])
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(base[name])
    assert session.edits == []
    session.edit(requests[1:2])
    session.undo_all()
    assert same(weights(model), base)


# ---- the guard over a sequence, and methods that come later ------------------------------------------------
@dataclasses.dataclass
class NudgeHyperParams(ROMEMDMHyperParams):
    """Of a method that adds a little of one direction, whatever the fact."""

    ALG_NAME = "NUDGE_MDM"


def nudge(adapter, requests, hparams, values=None) -> Edit:
    """A change of a tenth of the weight's norm, always in the same direction."""
    site = adapter.site(hparams.layers[0])
    weight = adapter.weight_of(site.name)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(weight.shape[0], 1, generator=generator)
    right = torch.randn(1, weight.shape[1], generator=generator)
    size = 0.1 * weight.detach().norm() / (left @ right).norm() if not hparams.seed else float(hparams.seed)
    facts = [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in requests]
    return Edit([LowRank(site.weight, left * size, right)], {"method": "NUDGE_MDM", "facts": facts})


@pytest.fixture
def nudging():
    """The method, registered for the length of a test."""
    METHODS.register("NUDGE_MDM")(
        Method("NUDGE_MDM", NudgeHyperParams, nudge, lambda *_: [], stands_for="ROME")
    )
    yield NudgeHyperParams
    METHODS.unregister("NUDGE_MDM")


def test_small_edits_that_together_ruin_the_model(nudging, model, requests):
    """Each passes alone; the guard compares with the model before the first one and stops the sequence."""
    config = nudging("NUDGE_MDM", "twin-llama", [1], guard={"norm_ratio": 2.0, "perplexity_ratio": None})
    session = Session(model, config)
    with pytest.raises(CollapseError, match="norm_ratio_all"):
        for _ in range(200):
            session.edit(requests[:1])
    assert 5 < len(session.edits) < 40
    session.undo_all()
    config = nudging("NUDGE_MDM", "twin-llama", [1], guard={"norm_ratio": None, "perplexity_ratio": 3.0})
    session = Session(model, config)
    with pytest.raises(CollapseError, match="perplexity_ratio"):
        for _ in range(200):
            session.edit(requests[:1])
    assert len(session.edits) > 1


@pytest.mark.end_to_end
def test_the_guard_in_easyedit_s_sequential_loop(nudging, tmp_path, requests, monkeypatch):
    """200 small edits through BaseEditor, by a method that was registered after EasyEdit was joined: stopped
    on the way.
    """
    from easyedit_mdm import register

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)  # the form that the other tests of this process import
    editor_class = register().editor_class
    METHODS.unregister("NUDGE_MDM")
    METHODS.register("NUDGE_MDM")(Method("NUDGE_MDM", nudging, nudge, lambda *_: [], stands_for="ROME"))
    config = nudging(
        "NUDGE_MDM", "twin-llama", [1], device="cpu", guard={"norm_ratio": 1.0, "perplexity_ratio": None}
    )
    editor = editor_class.from_hparams(config)
    before = weights(editor.model)
    many = [requests[i % 4] for i in range(200)]
    with pytest.raises(CollapseError, match="norm_ratio_all"):
        editor.edit(
            prompts=[r["prompt"] for r in many],
            subject=[r["subject"] for r in many],
            target_new=[r["target_new"] for r in many],
            ground_truth=["<|endoftext|>"] * 200,
            sequential_edit=True,
            verbose=False,
        )
    session = editor.hparams.model_name.session
    assert 2 < len(session.edits) < 40
    session.undo_all()
    assert same(weights(editor.model), before)


def test_a_taken_name_is_refused(nudging):
    """Two things under one name would hide one of them."""
    with pytest.raises(NameTakenError, match="'NUDGE_MDM' is registered already"):
        METHODS.register("NUDGE_MDM")(Method("NUDGE_MDM", nudging, nudge, lambda *_: [], stands_for="ROME"))


def test_the_docstring_s_example():
    """The example in Session's docstring runs."""
    import doctest

    import easyedit_mdm.session

    results = doctest.testmod(easyedit_mdm.session)
    assert results.attempted >= 5
    assert results.failed == 0


# ---- mode rebase -------------------------------------------------------------------------------------------
def joint(model, facts, settings) -> torch.Tensor:
    """The edited weights after one batch of all facts."""
    with Session(model, settings) as session:
        session.edit(facts, mode="batch")
        return edited(model, settings)


def edited(model, settings) -> torch.Tensor:
    """The weights that a method edits, one after another."""
    named = dict(model.named_parameters())
    return torch.cat([named[model.site(layer).weight].detach().flatten() for layer in settings.layers])


@pytest.mark.parametrize("method", ["MEMIT_MDM", "EMMET_MDM", "AlphaEdit_MDM"])
def test_rebased_batches_are_one_batch_of_all(model, requests, method):
    """After each group the weights are those of one batch of all facts so far, whatever the groups."""
    settings, base = hparams(method), weights(model)
    wanted = {n: joint(model, requests[:n], settings) for n in (2, 4)}
    with Session(model, settings) as session:
        for step, n in zip(session.steps(requests, mode="rebase", batch_size=2), (2, 4)):
            torch.testing.assert_close(edited(model, settings), wanted[n], atol=1e-5, rtol=1e-4)
            assert len(step.edits) == len(session.edits) == 1
            assert len(step.edits[0].card["facts"]) == n and len(step.requests) == 2
        one = session.edits
        (again,) = session.edit(requests[:2], mode="rebase", batch_size=1)
        assert [again] == session.edits != one, (
            "facts that are edited again take the places of the earlier ones"
        )
        torch.testing.assert_close(edited(model, settings), wanted[4], atol=1e-5, rtol=1e-4)
    assert same(weights(model), base)


def test_one_fact_of_a_rebased_edit_is_taken_back(model, requests):
    """The others are what they would be without it; the last one gives the base back, bit for bit."""
    settings, base = hparams("MEMIT_MDM"), weights(model)
    others = [requests[0], requests[2], requests[3]]
    wanted = joint(model, others, settings)
    session = Session(model, settings)
    session.edit(requests, mode="rebase", batch_size=2)
    session.undo_fact(requests[1])
    torch.testing.assert_close(edited(model, settings), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(EditError, match="not among the 3 facts"):
        session.undo_fact(requests[1])
    for fact in others:
        session.undo_fact(fact)
    assert same(weights(model), base) and session.edits == []
    session.edit(requests[:2], mode="rebase")
    session.undo()
    assert same(weights(model), base)
    with pytest.raises(EditError, match="not among the 0 facts"):
        session.undo_fact(requests[0])


def test_a_rebased_group_that_fails_leaves_the_ones_before(model, requests, monkeypatch):
    """Values that cannot be made, or a guard that says no: weights and facts are those of before the call."""
    settings = hparams("MEMIT_MDM")
    session = Session(model, settings)
    session.edit(requests[:2], mode="rebase", batch_size=2)
    kept, stack = weights(model), session.edits
    with pytest.raises(RequestError):
        session.edit([requests[2], {**requests[3], "subject": "nobody"}], mode="rebase", batch_size=1)
    assert same(weights(model), kept) and session.edits == stack

    def refuse(edit, force):
        """A guard that lets nothing through."""
        raise CollapseError("no")

    session.guard = SimpleNamespace(apply=refuse)
    with pytest.raises(CollapseError):
        session.edit(requests[2:], mode="rebase", batch_size=2)
    with pytest.raises(CollapseError):
        list(session.steps(requests[2:], mode="rebase", batch_size=2))
    session.guard = None
    assert same(weights(model), kept) and session.edits == stack
    session.undo_fact(requests[0])
    assert len(session.edits[0].card["facts"]) == 1
    session.undo_all()


def test_rebase_refuses_what_it_cannot_do(model, requests):
    """A method that writes one fact at a time, one without values, and values that belong to their batch."""
    for settings, words in (
        (hparams(), "MEMIT_MDM, EMMET_MDM and AlphaEdit_MDM"),
        (hparams("MEMIT_MDM", optimise_through="weights"), "optimise_through: activation"),
    ):
        with pytest.raises(HyperParameterError, match=words):
            Session(model, settings).edit(requests, mode="rebase")
