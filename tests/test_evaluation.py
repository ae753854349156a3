"""The multi-step metric: against decoding by hand, for both paradigms."""

from __future__ import annotations

import math

import pytest
import torch

from easyedit_mdm import DecodeConfig, decode, score_prompts
from easyedit_mdm.editing.request import target_ids
from easyedit_mdm.errors import RequestError
from easyedit_mdm.evaluation import fluency, ngram_entropy, perplexity
from easyedit_mdm.models.geometry import right_padded


@pytest.mark.parametrize("family", ["llada", "dream", "llama"])
def test_scores_are_what_was_written(tiny, family):
    """Feeding the model its own words as the answer scores 1; other words are counted slot by slot."""
    model = tiny(family)
    prompt = torch.tensor(model.tokenizer("The river is")["input_ids"])
    path = decode(model, [prompt], [4])[0]
    target = path.tokens.clone()
    target[0] = (target[0] + 1) % 100 + 2
    right = int((path.tokens == target).sum()) / 4
    score = _score(model, "The river is", path.tokens)
    assert score["token_acc"] == 1.0 and score["exact"] and score["first_commit"] and score["n_tokens"] == 4
    wrong = _score(model, "The river is", target)
    assert wrong["token_acc"] == right and not wrong["exact"]
    assert wrong["first_commit"] == bool(
        path.tokens[path.first_committed()] == target[path.first_committed()]
    )


def _score(model, prompt: str, tokens: torch.Tensor) -> dict:
    """score_prompts with the answer given as ids."""
    from easyedit_mdm.evaluation import multi_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_step, "target_ids", lambda *a: tokens)
        return multi_step.score_prompts(model, [prompt], ["given"])[0]


def test_one_step_and_teacher_forcing(tiny):
    """Masked: the share right when all slots are committed at once. Causal: each slot after the right ones
    before it.
    """
    masked, causal = tiny("llada"), tiny("llama")
    for model in (masked, causal):
        ids = torch.tensor(model.tokenizer("The river is")["input_ids"])
        target = target_ids(model, "The river is", "good old water")
        slots = torch.full_like(target, model.ids.mask) if model.masked else target
        with torch.no_grad():
            best = model.token_logits(torch.cat([ids, slots])[None])[0, len(ids) :].argmax(-1)
        score = score_prompts(model, ["The river is"], ["good old water"])[0]
        share, other = ("one_step", "teacher_forced") if model.masked else ("teacher_forced", "one_step")
        assert score[share] == pytest.approx(float((best == target).double().mean())) and other not in score
        assert score.get("one_step_exact") == (bool(torch.equal(best, target)) if model.masked else None)


def test_batching_prompts_changes_nothing(tiny):
    """Prompts and answers of other lengths beside a prompt."""
    model = tiny("llada")
    prompts, answers = ["The river is", "What is the name of the old city?"], ["good", "rather small water"]
    together = score_prompts(model, prompts, answers)
    alone = [score_prompts(model, [p], [a])[0] for p, a in zip(prompts, answers)]
    assert together == alone
    assert score_prompts(model, [], []) == []


def test_settings_and_lengths(tiny):
    """The record holds the resolved settings; a longer canvas is compared on its first slots; a shorter one
    is an error.
    """
    model = tiny("llada")
    score = score_prompts(model, ["The river is"], ["good old"], DecodeConfig(canvas=8, steps=4))[0]
    assert (
        score["decode"]["canvas"] == 8
        and score["decode"]["steps"] == 4
        and score["n_tokens"]
        == len(score["tokens"])
        == len(target_ids(model, "The river is", "good old"))
        >= 2
    )
    with pytest.raises(RequestError, match="canvas of 1"):
        score_prompts(model, ["The river is"], ["good old"], DecodeConfig(canvas=1))


def test_target_ids_are_those_in_context(tiny):
    """One space between, whatever the prompt ends with; the prompt's own tokens come first."""
    model = tiny("llada")
    tok = model.tokenizer
    for prompt in ("The river is", "The river is ", "What is it?"):
        ids = target_ids(model, prompt, " good")
        assert tok(prompt.rstrip() + " good")["input_ids"][-len(ids) :] == ids.tolist()
        assert tok.decode(ids) == " good"


def test_fluency(twin_llada):
    """Entropies by hand; repeated for the same seed; within the model's positions."""
    two, three = [0.5, 0.5], [1.0]  # "a b a": bigrams ab, ba; one trigram
    by_hand = sum(w * -sum(p * math.log2(p) for p in ps) for w, ps in ((2 / 3, two), (4 / 3, three))) / 2
    assert ngram_entropy("a b a") == pytest.approx(by_hand)
    assert ngram_entropy("") == ngram_entropy("one") == 0
    written = [fluency(twin_llada, "The river is", 30, seed)["ngram_entropy"] for seed in (0, 0, 1)]
    assert written[0] == written[1] != written[2] and all(2 < entropy < math.log2(64) for entropy in written)
    full = " the" * (twin_llada.max_positions - 4)
    assert fluency(twin_llada, full, 30)["ngram_entropy"] < 1, (
        "four words are written where there is room for four"
    )
    with pytest.raises(RequestError, match=f"fills all {twin_llada.max_positions} positions"):
        fluency(twin_llada, full + " the the the the", 30)


def test_right_padded():
    """Rows of unequal length keep their tokens, the mask says which."""
    ids, mask = right_padded([torch.tensor([1, 2]), torch.tensor([3])], 9, "cpu")
    assert ids.tolist() == [[1, 2], [3, 9]] and mask.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("family", ["llada", "dream", "llama"])
@torch.no_grad()
def test_perplexity(tiny, family):
    """exp of the mean loss of each token given all others (masked) or those before it (causal); batching
    changes nothing.
    """
    model = tiny(family)
    texts = ["The river song of the old city was good.", "A new album"]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])
        for i in range(0 if model.masked else 1, len(ids)):
            row = ids.clone()
            if model.masked:
                row[i] = model.ids.mask
            total -= float(model.token_logits(row[None]).log_softmax(-1)[0, i, ids[i]])
            count += 1
    found = perplexity(model, texts)
    assert found["n"] == count and found["value"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert perplexity(model, texts, max_rows=2)["value"] == pytest.approx(found["value"], rel=1e-5)
    with pytest.raises(RequestError, match="nothing|no text"):
        perplexity(model, [])


def test_text_to_the_end(twin_llada):
    """What stands before the first end-of-text token, on a canvas longer than the answer."""
    from easyedit_mdm.evaluation.multi_step import _to_end

    ids = twin_llada.tokenizer(" red river")["input_ids"]
    end = twin_llada.ids.eos
    assert _to_end(twin_llada, torch.tensor([*ids, end, *ids])) == "red river"
    assert _to_end(twin_llada, torch.tensor(ids)) == "red river"
