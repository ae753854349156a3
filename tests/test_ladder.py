"""The ladder of honesty, likelihood scores, and decoding from states that already show tokens."""

from __future__ import annotations

import pytest
import torch

from easyedit_mdm import decode
from easyedit_mdm.editing.request import target_ids
from easyedit_mdm.errors import RequestError
from easyedit_mdm.evaluation.judgements import counterfact_scores, preference
from easyedit_mdm.evaluation.ladder import _any_order, given_k, ladder, mirage_gap

MASKED = {"teacher_forced", "one_step", "multi_step", "canvas8", "canvas16", "canvas32", "random", "left_to_right", "steps_half", "in_context"}


def own_words(model, prompt: str, n: int) -> str:
    """What the model itself writes in N masks: an answer on which multi_step is right."""
    path = decode(model, [torch.tensor(model.tokenizer(prompt)["input_ids"])], [n])[0]
    return model.tokenizer.decode(path.tokens.tolist())


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
        assert all(
            0 <= r["token_acc"] <= 1 and (not r["exact"] or r["token_acc"] == pytest.approx(1) or n.startswith("canvas")) for n, r in found.items()
        )
        assert mirage_gap(found) == float(found["teacher_forced"]["exact"]) - float(found["in_context"]["exact"])


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


def test_given_k(tiny):
    """k = 0 is the multi-step metric; the model's own words are right for every k along its own order."""
    model = tiny("llada")
    answer = own_words(model, "The river is", 3)
    if len(target_ids(model, "The river is", answer)) == 3:
        assert given_k(model, "The river is", answer)[0] == ladder(model, ["The river is"], [answer])[0]["multi_step"]["exact"]
    assert len(given_k(model, "The river is", "very good")) == len(target_ids(model, "The river is", "very good"))


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
    plain, normal = (preference(model, ["The river is"], "good", "very old", normalised=n) for n in (False, True))
    assert plain["true"][0] / normal["true"][0] == pytest.approx(len(target_ids(model, "The river is", "very old")))
