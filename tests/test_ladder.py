"""The ladder of honesty, likelihood scores, and decoding from states that already show tokens."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from easyedit_mdm import DecodeConfig, decode
from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.denoising.likelihood import _monte_carlo
from easyedit_mdm.denoising.states import Slots
from easyedit_mdm.editing.request import target_ids
from easyedit_mdm.errors import RequestError
from easyedit_mdm.evaluation.judgements import Preference, counterfact_scores
from easyedit_mdm.evaluation.ladder import any_order, given_k, ladder
from easyedit_mdm.evaluation.records import RUNGS, mirage_gap
from easyedit_mdm.twins.benchmark import split_facts

MASKED = {*RUNGS}
CAUSAL = {"teacher_forced", "multi_step", "canvas8", "canvas16", "canvas32", "in_context"}


def own_words(model, prompt: str, n: int, order: str = "low_confidence") -> str:
    """What the model itself writes in N masks: an answer on which that order is right."""
    path = decode(
        model, [torch.tensor(model.tokenizer(prompt)["input_ids"])], [n], DecodeConfig(order=order)
    )[0]
    return model.tokenizer.decode(path.tokens.tolist())


@pytest.mark.parametrize("family", ["llada", "dream", "llama", "sdar"])
def test_rungs(tiny, family):
    """All rungs of the paradigm; whole answers are right teacher-forced where they are from left to right."""
    model = tiny(family)
    prompts, answers = (
        ["The river is", "The song of Anna was"],
        ["very good", "the old red river of the north sea"],
    )
    prompts, answers = (
        [*prompts, "The river is"],
        [*answers, own_words(model, "The river is", 3, "left_to_right")],
    )
    rungs = ladder(model, prompts, answers)
    for found, prompt, answer in zip(rungs, prompts, answers):
        short = len(target_ids(model, prompt, answer)) <= 8
        assert set(found) == (MASKED if model.masked else CAUSAL) - (set() if short else {"canvas8"})
        for name, rung in found.items():
            assert 0 <= rung["token_acc"] <= 1
            if not name.startswith("canvas"):
                assert rung["exact"] == (rung["token_acc"] > 1 - 1e-9)
        written = found["left_to_right" if model.masked else "multi_step"]
        assert found["teacher_forced"]["exact"] == written["exact"]
        assert mirage_gap(found) == found["teacher_forced"]["token_acc"] - written["token_acc"]


@pytest.mark.parametrize("name", ["twin_llada", "twin_llama"])
def test_rungs_tell_right_from_wrong(name, world, request):
    """What a twin knows is right on every rung that has room for it, what it does not know on none."""
    model = request.getfixturevalue(name)
    fact = next(f for f in split_facts(world)["test"] if f.length == 3)
    (right,), (wrong,) = (
        ladder(model, [fact.prompt()], [text])
        for text in (fact.object, world.other_object(fact, 3, random.Random(0)))
    )
    told = {rung: found["exact"] for rung, found in right.items() if not rung.startswith("canvas")}
    assert all(told.values()) and set(told) >= {"teacher_forced", "multi_step", "in_context"}
    assert set(wrong) == set(right) and not any(found["exact"] for found in wrong.values())


def constructed(model, target: torch.Tensor, right, surest_last: bool = False) -> None:
    """Make a model predict token j of the target where `right(j, shown)`, else another one; then the end of
    text.

    `shown`: the slots that show their right token (in front of j, on a causal model). The left is surest.
    """
    other = next(t for t in range(5, 100) if t not in target.tolist())

    def token_logits(ids, mask=None, at=None, *, layer=0, hidden=None, canvas=None):
        out = torch.zeros(*at.shape, model.vocabulary)
        for row, slots, start, places in zip(ids, out, canvas.tolist(), at.tolist()):
            there = [j for j in range(len(target)) if start + j < len(row) and row[start + j] == target[j]]
            for logits, place in zip(slots, places):
                j = place - start
                shown = {i for i in there if model.masked or i < j}
                token = model.ids.eos if j >= len(target) else int(target[j]) if right(j, shown) else other
                logits[token] = 10 + (j if surest_last else -j) / 8
        return out

    model.token_logits = token_logits


PATHS = {"left_to_right", "multi_step", "random", "steps_half", "one_step"}
MODELS = {  # which predictions are right -> rungs that are exact, on a masked model
    "always": (lambda j, shown: True, False, MASKED),
    "never": (lambda j, shown: False, False, set()),
    "only where its own token is shown": (lambda j, shown: j in shown, False, set()),
    "only while nothing is shown": (lambda j, shown: not shown, False, {"one_step"}),
    "only after all tokens before it": (
        lambda j, shown: set(range(j)) <= shown, True, {"teacher_forced", "left_to_right"},
    ),
    "but for one state that no path but a random one sees": (
        lambda j, shown: shown != {1}, False, MASKED - {"any_order", "random"},
    ),
    "but for the last token, next to others": (lambda j, shown: j < 2 or not shown, False, {"one_step"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_rungs_of_constructed_models(tiny, name):
    """Each rung comes out as the model was made; right in any order is right on every path."""
    model = tiny("llada")
    right, surest_last, expected = MODELS[name]
    prompt, answer = "The river is", model.tokenizer.decode([20, 30, 40])
    target = target_ids(model, prompt, answer)
    assert len(target) == 3
    constructed(model, target, right, surest_last)
    (found,) = ladder(model, [prompt], [answer])
    exact = {rung for rung, values in found.items() if values["exact"]}
    # one order is drawn: it may or may not come through the one state
    assert exact - {"random"} == expected - {"random"} and ("random" in exact or "random" not in expected)
    assert found["any_order"]["states"] == 7 and ("any_order" not in exact or exact >= PATHS)


@pytest.mark.parametrize(("family", "decoded"), [("llada", "left_to_right"), ("llama", "multi_step")])
def test_the_mirage_gap_of_a_constructed_model(tiny, family, decoded):
    """The first token is wrong, each other one right after right ones: teacher forcing hides two thirds of
    it.
    """
    model = tiny(family)
    prompt, answer = "The river is", model.tokenizer.decode([20, 30, 40])
    target = target_ids(model, prompt, answer)
    constructed(model, target, lambda j, shown: j > 0 and set(range(j)) <= shown)
    (found,) = ladder(model, [prompt], [answer])
    assert found["teacher_forced"] == {"token_acc": pytest.approx(2 / 3), "exact": False}
    assert found[decoded] == {"token_acc": 0, "exact": False} and mirage_gap(found) == pytest.approx(2 / 3)


def test_any_order_is_what_it_says(tiny):
    """Against a loop over all states of a target of three tokens."""
    model = tiny("llada")
    prompt, target = torch.tensor(model.tokenizer("The river is")["input_ids"]), torch.tensor([20, 30, 40])
    total = 0.0
    for k in range(3):
        sets = list(itertools.combinations(range(3), k))
        for shown in sets:
            tail = torch.tensor([int(target[i]) if i in shown else model.ids.mask for i in range(3)])
            with torch.no_grad():
                best = model.token_logits(torch.cat([prompt, tail])[None]).argmax(-1)[0, len(prompt) :]
            hidden = [i for i in range(3) if i not in shown]
            total += sum(int(best[i] == target[i]) for i in hidden) / len(hidden) / len(sets) / 3
    assert any_order(model, prompt, target)["token_acc"] == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_given_tokens_stay(tiny, family):
    """What is given stands from the start, is never committed again, and the rest is what those states
    give.
    """
    model = tiny(family)
    prompt = torch.tensor(model.tokenizer("The river is")["input_ids"])
    free = decode(model, [prompt], [4])[0]
    late = free.step.argmax()
    shown = free.tokens.clone()
    shown[late] = -1
    path = decode(model, [prompt], [4], given=[shown])[0]
    assert torch.equal(path.tokens, free.tokens), "the last slot sees what it saw"
    assert (path.step == -1).sum() == 3 and path.first_committed() == int(late)
    other = torch.full((4,), -1)
    other[0] = 55
    assert int(decode(model, [prompt], [4], given=[other])[0].tokens[0]) == 55
    with pytest.raises(RequestError, match="autoregressive"):
        causal = tiny("llama")
        decode(causal, [prompt], [4], given=[shown])


def test_given_k(twin_llada, world):
    """A fact that is known is written whatever is given of it; one that is not, is not from nothing."""
    fact = next(f for f in split_facts(world)["test"] if f.length == 4)
    assert given_k(twin_llada, fact.prompt(), fact.object) == [True] * 4
    other = given_k(twin_llada, fact.prompt(), world.other_object(fact, 4, random.Random(0)))
    assert len(other) == 4 and other[0] is False


def test_given_k_reveals_right_tokens(tiny, monkeypatch):
    """k tokens of the target in their places for k = 0..N-1, everywhere else nothing; the seed draws
    which.
    """
    from easyedit_mdm.evaluation import ladder as rungs

    model, seen = tiny("llada"), []
    monkeypatch.setattr(
        rungs,
        "decode",
        lambda *a, given, **k: seen.append(torch.stack(given)) or decode(*a, given=given, **k),
    )
    target = target_ids(model, "The river is", "rather small water")
    for seed in (0, 0, 1, 2, 3):
        given_k(model, "The river is", "rather small water", seed)
    for given in seen:
        assert (given >= 0).sum(1).tolist() == list(range(len(target)))
        assert ((given == -1) | (given == target)).all()
    assert torch.equal(seen[0], seen[1]) and len({str(given.tolist()) for given in seen}) > 1


@pytest.mark.parametrize("family", ["llada", "llama"])
def test_counterfact_scores(tiny, family):
    """Swapping the objects turns every comparison round; per token, sums are divided by their tokens."""
    model = tiny(family)
    prompts = "The river is", ["A river is"], ["The sea is", "The lake is"]
    new, true = model.tokenizer.decode([20]), model.tokenizer.decode([30, 40])
    one, other = (
        counterfact_scores(model, *prompts, new, true),
        counterfact_scores(model, *prompts, true, new),
    )
    for kind in ("sum", "per_token"):
        assert set(one[kind]) == {"ES", "EM", "PS", "PM", "NS", "NM"}
        for key, value in one[kind].items():
            assert value == pytest.approx((1 if key.endswith("S") else 0) - other[kind][key], abs=1e-9)
    assert one["likelihood"] == ("exact" if model.masked else "causal")
    ids = torch.tensor(model.tokenizer("The river is")["input_ids"])
    logs = [
        log_likelihood(model, [ids], [target_ids(model, "The river is", text)])[0] for text in (new, true)
    ]
    assert one["sum"]["EM"] == pytest.approx(math.exp(logs[0]) - math.exp(logs[1]), rel=1e-5)
    assert one["sum"]["ES"] == float(logs[0] > logs[1])
    near = Preference(model, ["The sea is", "The lake is"], new, true).log_probabilities(per_token=False)
    assert one["sum"]["NS"] == sum(t > n for n, t in near) / 2
    assert one["sum"]["NM"] == pytest.approx(sum(math.exp(t) - math.exp(n) for n, t in near) / 2, rel=1e-5)
    found = Preference(model, ["The river is"], new, true)
    ((_, total),), ((_, mean),) = (found.log_probabilities(per_token) for per_token in (False, True))
    assert total / mean == pytest.approx(len(target_ids(model, "The river is", true))) and total / mean > 1.5


def test_objects_of_unlike_length_are_judged_by_one_likelihood(tiny):
    """Where one object is too long for the exact likelihood, both are estimated, from the same draws."""
    model = tiny("llada")
    prompt, short, long = "The river is", "good", "the old red river of the north sea"
    ids = torch.tensor(model.tokenizer(prompt)["input_ids"])
    found = Preference(model, [prompt], short, long)
    targets = [target_ids(model, prompt, text) for text in (short, long)]
    assert len(targets[0]) <= 5 < len(targets[1]) and found.likelihood == "llada"
    assert [found.new, found.true] == [log_likelihood(model, [ids], [t], "llada") for t in targets]
    assert counterfact_scores(model, prompt, ["A river is"], [], short, long)["likelihood"] == "llada"
    drawn = [_monte_carlo(Slots((n,)), "llada", 64, torch.Generator().manual_seed(3))[0] for n in (3, 6)]
    hidden = [(~shown).sum(1) for shown in drawn]
    assert torch.equal(hidden[0], (hidden[1] + 1) // 2), "the same share of either target is masked"
    assert len(set(hidden[1].tolist())) == 6
