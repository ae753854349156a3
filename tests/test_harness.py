"""What lm-evaluation-harness asks of a model, without the harness: likelihoods with their error, greedy
continuations, whole texts, generations; and the table of damage.
"""

from __future__ import annotations

import math

import pytest
import torch

from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.errors import EditError, HyperParameterError, RequestError
from easyedit_mdm.harness import load_edits
from easyedit_mdm.harness.damage import cells, compared, markdown
from easyedit_mdm.harness.scoring import (
    Scoring,
    cut,
    greedy,
    likelihoods,
    rolling,
    split,
    write_until,
)


@pytest.fixture(scope="module")
def fact(world):
    """A fact that the twins know, with an object of two tokens."""
    return next(f for f in world.all_facts() if f.length == 2 and not f.relation.closed)


def test_a_continuation_is_cut_where_the_context_ends(twin_llada):
    """Spaces at the context's end belong to the continuation; together they are the whole text."""
    for context, continuation in (("Ann Lee lives in", " Rome"), ("Ann Lee lives in ", "Rome"), ("", "Rome")):
        before, after = split(twin_llada, context, continuation)
        whole = twin_llada.tokenizer(context + continuation)["input_ids"]
        assert before.tolist() + after.tolist() == whole
        assert twin_llada.tokenizer.decode(after).strip() == "Rome"
    with pytest.raises(RequestError, match="has no tokens"):
        split(twin_llada, "Ann", "")


def test_a_context_that_is_too_long_loses_its_beginning(twin_llada, caplog):
    """With a warning; a continuation that does not fit is an error."""
    before, after = split(twin_llada, "Ann " * 300, " Rome")
    assert len(before) + len(after) == twin_llada.max_positions
    assert "was cut" in caplog.text
    with pytest.raises(RequestError, match="positions"):
        split(twin_llada, "Ann", " Rome" * 2000)


def test_exact_likelihoods_have_no_error_and_estimates_tell_theirs(twin_llada, fact):
    """The estimate of a short target lies within a few of its standard errors of the exact value."""
    pair = split(twin_llada, fact.prompt(), " " + fact.object)
    (exact,) = likelihoods(twin_llada, [pair])
    assert exact.error == 0 and exact.tokens == 2
    assert exact.value == pytest.approx(log_likelihood(twin_llada, [pair[0]], [pair[1]], "exact")[0])
    wrong = split(twin_llada, fact.prompt(), " Zoter Zemo")
    (told,) = likelihoods(twin_llada, [wrong], Scoring("llada", samples=512))
    (right,) = likelihoods(twin_llada, [wrong], Scoring("exact"))
    assert 0 < told.error < 0.2 * abs(right.value)
    assert abs(told.value - right.value) < 4 * told.error


def test_choices_of_a_question_get_the_same_draws(twin_llada, fact):
    """Wherever they stand in the list."""
    pair = split(twin_llada, fact.prompt(), " Zoter Zemo")
    one = Scoring("llada", samples=16)
    same = likelihoods(twin_llada, [pair, pair], one, draws=[3, 3])
    other = likelihoods(twin_llada, [pair, pair], one, draws=[3, 4])
    assert same[0] == same[1] == other[0] and other[0].value != other[1].value


def test_greedy(twin_llada, twin_llama, fact):
    """A known object is what decoding writes; another is not."""
    for model in (twin_llada, twin_llama):
        pairs = [split(model, fact.prompt(), f" {text}") for text in (fact.object, "Zoter Zemo")]
        assert greedy(model, pairs, Scoring(rows=1)) == [True, False]


def test_a_whole_text(twin_llada, twin_llama, fact):
    """Causal: the chain rule, over windows, each token once. Masked: the bound, with an error."""
    text = f"{fact.prompt()} {fact.object}"
    ids = torch.tensor(twin_llama.tokenizer(text)["input_ids"])
    found = rolling(twin_llama, text)
    with torch.no_grad():
        first = torch.cat([torch.tensor([twin_llama.ids.eos]), ids])
        logits = twin_llama.token_logits(first[None], torch.ones(1, len(first)).long())[0]
    chain = logits.log_softmax(-1)[torch.arange(1, len(first)), ids].sum()
    assert found.tokens == len(ids) and found.error == 0
    assert found.value == pytest.approx(float(chain), rel=1e-4)
    long = " ".join([text] * 20)
    assert rolling(twin_llama, long).tokens == len(twin_llama.tokenizer(long)["input_ids"])
    assert rolling(twin_llada, text).error == 0, "few tokens: exact"
    masked = rolling(twin_llada, f"{text}. {text}", Scoring(samples=16))
    assert masked.error > 0 and masked.tokens > 2 * len(ids) and math.isfinite(masked.value)


def test_generations_stop_where_they_should(twin_llada, fact):
    """At a stop string, and at the canvas's end; options that a denoiser lacks are refused."""
    text = write_until(twin_llada, fact.prompt(), {"until": ["."], "max_gen_toks": 2, "do_sample": False})
    assert text.strip() == fact.object.strip()
    first = fact.object.split()[1]
    stopped = write_until(twin_llada, fact.prompt(), {"until": [first], "max_gen_toks": 2})
    assert stopped.strip() == fact.object.split()[0]
    assert cut("one. two", [".", "wo"]) == "one" and cut("one", None) == "one"
    with pytest.raises(HyperParameterError, match="num_beams"):
        write_until(twin_llada, fact.prompt(), {"num_beams": 4})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"likelihood": "guess"}, "not one of auto"),
        ({"samples": 12}, "multiple of 8"),
        ({"rows": 0}, "rows=0"),
    ],
)
def test_wrong_settings(settings, says):
    """Each is refused by name."""
    with pytest.raises(HyperParameterError, match=says):
        Scoring(**settings)


def test_edits_of_a_folder(tmp_path):
    """One edit, or the edits in it in the order of their names."""
    with pytest.raises(EditError, match="holds no edit"):
        load_edits(tmp_path)


def harness_results(values: list[float], perplexity: float) -> dict:
    """As `simple_evaluate` returns them."""
    return {
        "results": {
            "facts": {"alias": "facts", "acc,none": sum(values) / len(values), "acc_stderr,none": 0.1},
            "texts": {"word_perplexity,none": perplexity},
        },
        "samples": {
            "facts": [{"doc_id": i, "filter": "none", "acc": v} for i, v in enumerate(values)],
            "texts": [{"doc_id": 0, "filter": "none", "word_perplexity": (-3.0, 5)}],
        },
    }


def test_damage_is_paired_by_document():
    """A mean over documents has an interval of its differences; a perplexity has none."""
    was, now = harness_results([1.0] * 10, 10.0), harness_results([1.0] * 8 + [0.0] * 2, 12.5)
    now["samples"]["facts"].reverse()
    accuracy, perplexity = compared(was, now)
    assert (accuracy.task, accuracy.metric, accuracy.n) == ("facts", "acc", 10)
    assert accuracy.difference is not None and accuracy.difference["mean"] == pytest.approx(-0.2)
    assert accuracy.difference["low"] < -0.2 < accuracy.difference["high"] <= 0
    assert perplexity.difference is None
    assert cells(perplexity)[-2:] == ("+2.500", "-")
    assert markdown([accuracy]).splitlines()[2].startswith("| facts | acc | 10 | 1.000 | 0.800 | -0.200 | [")


def test_without_the_extras_the_commands_say_what_to_install(monkeypatch, capsys, tmp_path):
    """One line each, status 2, and nothing of the extra is imported."""
    from easyedit_mdm.cli import arguments, main

    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    (tmp_path / "edit.json").write_text("{}")
    for command, extra in (
        (["app"], "app"),
        (["damage", "twin-llada", "--edits", str(tmp_path), "--tasks", "x"], "lm-eval"),
        (["lm-eval", "run", "--model", "easyedit_mdm"], "lm-eval"),
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"pip install 'easyedit-mdm[{extra}]'" in said
