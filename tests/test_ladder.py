"""The ladder of honesty, likelihood scores, and decoding from states that already show tokens."""

from __future__ import annotations

import math
import random

import pytest
import torch

from easyedit_mdm import decode
from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.editing.request import target_ids
from easyedit_mdm.errors import RequestError
from easyedit_mdm.evaluation.judgements import counterfact_scores, preference
from easyedit_mdm.evaluation.ladder import _any_order, given_k, ladder, mirage_gap
from easyedit_mdm.twins.benchmark import split_facts

MASKED = {"teacher_forced", "one_step", "multi_step", "canvas8", "canvas16", "canvas32", "random", "left_to_right", "steps_half", "in_context"}


@pytest.mark.parametrize("family", ["llada", "dream", "llama"])
def test_rungs(tiny, family):
    """All rungs of the paradigm; the last one sees another prompt; the gap is first minus last."""
    model = tiny(family)
    prompts, answers = ["The river is", "The song of Anna was"], ["very good", "the old red river of the north sea"]
    rungs = ladder(model, prompts, answers)
    short = len(target_ids(model, prompts[1], answers[1])) > 8
    for i, found in enumerate(rungs):
        expected = (MASKED if model.masked else {"teacher_forced", "multi_step", "canvas8", "canvas16", "canvas32", "in_context"}) - (
            {"canvas8"} if i == 1 and short else set()
        )
        assert set(found) == expected
        assert all(0 <= r["token_acc"] <= 1 for r in found.values())
        assert all(r["exact"] == (r["token_acc"] > 1 - 1e-9) for name, r in found.items() if not name.startswith("canvas"))


@pytest.mark.parametrize("name", ["twin_llada", "twin_llama"])
def test_rungs_tell_right_from_wrong(name, world, request):
    """What a twin knows is right on every rung that has room for it, what it does not know on none."""
    model = request.getfixturevalue(name)
    fact = next(f for f in split_facts(world)["test"] if f.length == 3)
    (right,), (wrong,) = (ladder(model, [fact.prompt()], [text]) for text in (fact.object, world.other_object(fact, 3, random.Random(0))))
    told = {rung: found["exact"] for rung, found in right.items() if not rung.startswith("canvas")}
    assert all(told.values()) and set(told) >= {"teacher_forced", "multi_step", "in_context"}
    assert set(wrong) == set(right) and not any(found["exact"] for found in wrong.values())


def test_mirage_gap():
    """First rung minus last, of what is exact."""
    right, wrong = {"token_acc": 1.0, "exact": True}, {"token_acc": 0.5, "exact": False}
    for first, last, gap in ((right, wrong, 1), (wrong, right, -1), (right, right, 0), (wrong, wrong, 0)):
        assert mirage_gap({"teacher_forced": first, "multi_step": right, "in_context": last}) == gap


def test_any_order_is_what_it_says(tiny):
    """Against a loop over all states of a target of three tokens."""
    import itertools

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
    assert _any_order(model, prompt, target) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_given_tokens_stay(tiny, family):
    """What is given stands from the start, is never committed again, and the rest is what those states give."""
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
    """k tokens of the target in their places for k = 0..N-1, everywhere else nothing; the seed draws which."""
    from easyedit_mdm.evaluation import ladder as rungs

    model, seen = tiny("llada"), []
    monkeypatch.setattr(rungs, "decode", lambda *a, given, **k: seen.append(torch.stack(given)) or decode(*a, given=given, **k))
    target = target_ids(model, "The river is", "rather small water")
    for seed in (0, 0, 1, 2, 3):
        given_k(model, "The river is", "rather small water", seed)
    for given in seen:
        assert (given >= 0).sum(1).tolist() == list(range(len(target)))
        assert ((given == -1) | (given == target)).all()
    assert torch.equal(seen[0], seen[1]) and len({str(given.tolist()) for given in seen}) > 1


@pytest.mark.parametrize("family", ["llada", "llama"])
def test_counterfact_scores(tiny, family):
    """Swapping the objects turns every comparison round; normalising divides by the number of tokens."""
    model = tiny(family)
    one = counterfact_scores(model, "The river is", ["A river is"], ["The sea is", "The lake is"], "good", "very old")
    other = counterfact_scores(model, "The river is", ["A river is"], ["The sea is", "The lake is"], "very old", "good")
    assert set(one) == {"ES", "EM", "PS", "PM", "NS", "NM"}
    for key in ("ES", "PS", "NS"):
        assert one[key] == pytest.approx(1 - other[key])
    for key in ("EM", "PM", "NM"):
        assert one[key] == pytest.approx(-other[key], abs=1e-9)
    ids, answers = torch.tensor(model.tokenizer("The river is")["input_ids"]), ("good", "very old")
    new, true = (log_likelihood(model, [ids], [target_ids(model, "The river is", answer)])[0] for answer in answers)
    assert one["EM"] == pytest.approx(math.exp(new) - math.exp(true), rel=1e-5) and one["ES"] == float(new > true)
    near = preference(model, ["The sea is", "The lake is"], "good", "very old")
    assert one["NS"] == sum(t > n for n, t in zip(near["new"], near["true"])) / 2
    assert one["NM"] == pytest.approx(-sum(near["difference"]) / 2, rel=1e-5)
    plain, normal = (preference(model, ["The river is"], "good", "very old", normalised=n) for n in (False, True))
    assert plain["true"][0] / normal["true"][0] == pytest.approx(len(target_ids(model, "The river is", "very old")))
