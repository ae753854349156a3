"""Causal tracing: equal to runs patched by hand, the same in batches of any size, and honest about what it
cannot trace.
"""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch

from easyedit_mdm.denoising import decode, log_likelihood
from easyedit_mdm.errors import DataError, HyperParameterError, RequestError, UnknownNameError
from easyedit_mdm.models.hooks import changing_output, reading_output
from easyedit_mdm.tracing import (
    CORRUPTIONS,
    KINDS,
    Runs,
    TraceConfig,
    TracedFact,
    check_known,
    own_answer,
    read_facts,
    trace_fact,
    trace_facts,
)
from easyedit_mdm.tracing.corruption import embedding_deviation, fact_generator
from easyedit_mdm.tracing.effects import trace_state
from easyedit_mdm.tracing.facts import place
from easyedit_mdm.tracing.temporal import final
from easyedit_mdm.twins.benchmark import split_facts

FACT = TracedFact(
    "The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "red river"
)  # three tokens


def corruption_of(
    adapter, fact: TracedFact = FACT, corrupt: str = "noise", samples: int = 2, others: tuple[str, ...] = ()
):
    """A fact in tokens, and its corruption."""
    placed = place(adapter, fact)
    return placed, CORRUPTIONS[corrupt](adapter, placed, samples, 3.0, others, fact_generator(placed, 0))


def runs_of(adapter, fact: TracedFact = FACT, revealed: tuple[int, ...] = (), **options) -> Runs:
    """All runs of a fact, some slots revealed."""
    placed, corruption = corruption_of(adapter, fact)
    shown = torch.zeros(len(placed.answer), dtype=torch.bool)
    shown[list(revealed)] = True
    return Runs(adapter, placed, corruption, shown, **options)


def twin_facts(world, length: int, n: int) -> list[TracedFact]:
    """Test facts of the twins' world with answers of one length."""
    return [
        TracedFact(f.prompt(), f.subject, f.object) for f in split_facts(world)["test"] if f.length == length
    ][:n]


# ---- the oracle --------------------------------------------------------------------------------------------


def by_hand(
    native, ids: torch.Tensor, noise: torch.Tensor, first: int, slots: int, patches: dict | None = None
) -> float:
    """log p of the last `slots` tokens of one row, run whole, one row at a time: noise at the subject, and
    modules' outputs overwritten.

    Knows nothing of the package: transformers' model, plain forward hooks.
    """
    handles = []

    def noisy(module, inputs, out):
        """The corrupted embedding."""
        out = out.clone()
        out[0, first : first + len(noise)] += noise
        return out

    def patch(token, value):
        """A hook that writes a clean value at one token."""

        def hook(module, inputs, out):
            """Overwrite."""
            values = (out[0] if isinstance(out, tuple) else out).clone()
            values[0, token] = value
            return (values, *out[1:]) if isinstance(out, tuple) else values

        return hook

    handles.append(native.model.embed_tokens.register_forward_hook(noisy))
    for module, (token, value) in (patches or {}).items():
        handles.append(module.register_forward_hook(patch(token, value)))
    with torch.no_grad():
        log_probs = native(input_ids=ids[None]).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    n = len(ids)
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(n - slots, n))


def clean_outputs(native, ids: torch.Tensor) -> dict:
    """Every block's, MLP's and attention's output in the clean run."""
    kept, handles = {}, []
    for i, block in enumerate(native.model.layers):
        for kind, module in (("hidden", block), ("mlp", block.mlp), ("attention", block.self_attn)):

            def save(m, a, out, key=(kind, i)):
                return kept.__setitem__(key, (m, (out[0] if isinstance(out, tuple) else out)[0]))

            handles.append(module.register_forward_hook(save))
    with torch.no_grad():
        native(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("length", [1, 3])
def test_effects_equal_a_plain_reimplementation(twin_llama, world, length):
    """Two prompts of an autoregressive model, every kind, layer and token, within 1e-5."""
    (fact,) = twin_facts(world, length, 1)
    config = TraceConfig(samples=2, window=3)
    trace = trace_fact(twin_llama, fact, config)
    placed, corruption = corruption_of(twin_llama, fact)
    ids, native = torch.cat([placed.ids, placed.answer]), twin_llama.native
    kept = clean_outputs(native, ids)
    runs = [by_hand(native, ids, noise, placed.first, length) for noise in corruption.noise]
    corrupted = torch.tensor(runs).exp().mean()
    assert trace.states[0].corrupted["probability"] == pytest.approx(float(corrupted), abs=1e-5)
    for kind in KINDS:
        found = trace.states[0].effects[kind]["probability"]
        assert found.shape == (8, len(placed.ids) + length - 1) and float(found.abs().max()) > 0.01
        for layer in range(0, 8, 3):
            low, high = (layer, layer + 1) if kind == "hidden" else (max(0, layer - 1), min(8, layer + 2))
            for token in range(found.shape[1]):
                patches = {kept[kind, i][0]: (token, kept[kind, i][1][token]) for i in range(low, high)}
                restored = [
                    by_hand(native, ids, noise, placed.first, length, patches) for noise in corruption.noise
                ]
                expected = torch.tensor(restored).exp().mean() - corrupted
                assert float(found[layer, token]) == pytest.approx(float(expected), abs=1e-5), (
                    kind,
                    layer,
                    token,
                )


@pytest.mark.parametrize("family", ["llada", "dream", "llama", "qwen2", "gpt2"])
def test_everything_and_nothing(tiny, family):
    """Restoring every token of any layer gives the clean run, restoring none the corrupted one; the two
    differ.
    """
    runs = runs_of(tiny(family), window=2)
    every, none = (torch.full((2, runs.placed.length), flag) for flag in (True, False))
    which = torch.arange(2)
    assert float((runs.corrupted.joint - runs.clean.joint).abs().min()) > 1e-3
    for layer in range(3):
        assert torch.allclose(
            runs.restored("hidden", layer, every, which).joint, runs.clean.joint.expand(2), atol=1e-5
        )
        for kind in KINDS:
            assert torch.allclose(
                runs.restored(kind, layer, none, which).joint, runs.corrupted.joint, atol=1e-5
            )


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_masked_runs_by_hand(tiny, family):
    """A masked model with a slot revealed: whole runs through the adapter, patched by hand, say the same."""
    adapter = tiny(family)
    runs = runs_of(adapter, revealed=(1,), window=2)
    placed = runs.placed
    tail = placed.answer.clone()
    tail[[0, 2]] = adapter.ids.mask
    ids, at = torch.cat([placed.ids, tail])[None], torch.tensor([[len(placed.ids), len(placed.ids) + 2]])

    def joint() -> float:
        """log p of the two slots that are masked."""
        with torch.no_grad():
            log_probs = adapter.token_logits(ids, at=at)[0].log_softmax(-1)
        return float(log_probs[0, placed.answer[0]] + log_probs[1, placed.answer[2]])

    assert float(runs.clean.joint) == pytest.approx(joint(), abs=1e-5)
    token, layers = placed.end - 1, (1, 2)
    modules = [adapter.module(adapter.spec.paths.mlp.format(i)) for i in layers]
    with ExitStack() as stack:
        seen = [stack.enter_context(reading_output(m)) for m in modules]
        joint()
    with ExitStack() as stack:
        stack.enter_context(runs.corruption.at(adapter, torch.tensor([1])))
        for module, clean in zip(modules, seen):

            def write(out, clean=clean[0]):
                return torch.cat([out[:, :token], clean[:, token : token + 1], out[:, token + 1 :]], 1)

            stack.enter_context(changing_output(module, write))
        expected = joint()
    where = torch.zeros(1, placed.length, dtype=torch.bool)
    where[0, token] = True
    assert float(runs.restored("mlp", 2, where, torch.tensor([1])).joint) == pytest.approx(expected, abs=1e-5)
    assert list(runs.layers_of("mlp", 2)) == [1, 2] and list(runs.layers_of("hidden", 2)) == [2]


@pytest.mark.parametrize("family", ["dream", "llama"])
def test_batches_change_nothing(tiny, family):
    """Seven rows at a time or all at once: the same effects, in more passes."""
    adapter = tiny(family)
    whole, parts = (trace_fact(adapter, FACT, TraceConfig(samples=3, max_rows=rows)) for rows in (256, 7))
    for a, b in zip(whole.states, parts.states):
        for kind in KINDS:
            for name, values in a.effects[kind].items():
                assert torch.allclose(values, b.effects[kind][name], atol=1e-5), (kind, name)
    assert whole.passes < parts.passes and whole.rows == parts.rows
    if (
        family == "llama"
    ):  # clean and corrupted, one pass for each kind and layer, and the likelihood of four runs
        assert whole.passes == 2 + 3 * 3 + 4


def test_bfloat16(tiny):
    """In half precision everything restored is still the clean run, and effects are numbers."""
    adapter = tiny("dream", dtype="bfloat16")
    runs = runs_of(adapter)
    every = torch.ones(2, runs.placed.length, dtype=torch.bool)
    assert torch.allclose(
        runs.restored("hidden", 1, every, torch.arange(2)).joint, runs.clean.joint.expand(2), atol=0.1
    )
    state = trace_state(runs)
    assert all(bool(v.isfinite().all()) for table in state.effects.values() for v in table.values())


# ---- later denoising steps ---------------------------------------------------------------------------------


def test_final_is_the_models_own_denoising(twin_llada, world):
    """Clean, a known fact's final log-probability is what its tokens got when the sampler committed them."""
    for fact in twin_facts(world, 4, 2):
        runs = runs_of(twin_llada, fact)
        path = decode(twin_llada, [runs.placed.ids], [4])[0]
        assert torch.equal(path.tokens, runs.placed.answer)
        assert float(final(runs, runs.clean, None)) == pytest.approx(
            float(path.confidence.log().sum()), abs=1e-4
        )


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_final_by_hand(tiny, family):
    """Restored at one step, then denoised on under the corruption: a plain loop, one row at a time."""
    adapter = tiny(family)
    runs = runs_of(adapter, revealed=(2,))
    where = torch.eye(runs.placed.length, dtype=torch.bool)[:6]
    samples = torch.tensor([0, 1, 0, 1, 0, 1])
    said = runs.restored("hidden", 1, where, samples)
    found = final(runs, said, samples)
    for row in range(6):
        canvas, total, answer = runs.canvas.clone(), 0.0, said
        for _ in range(2):
            masked = [i for i in range(3) if canvas[i] == adapter.ids.mask]
            if answer is said:
                right, sure, token = (
                    dict(zip((0, 1), said.right[row])),
                    dict(zip((0, 1), said.sure[row])),
                    dict(zip((0, 1), said.token[row])),
                )
            else:
                right, sure, token = (
                    {i: getattr(answer, name)[0, i] for i in masked} for name in ("right", "sure", "token")
                )
            slot = max(masked, key=lambda i: float(sure[i]))
            total += float(right[slot])
            canvas[slot] = token[slot]
            answer = runs.answer(canvas[None], samples[row : row + 1])
        assert float(found[row]) == pytest.approx(total, abs=1e-5)


def test_final_with_one_slot_left_is_what_is_read(tiny):
    """No step follows: the two measures are one."""
    state = trace_state(runs_of(tiny("dream"), revealed=(0, 2)))
    for kind in KINDS:
        assert torch.allclose(
            state.effects[kind]["final_log_probability"], state.effects[kind]["log_probability"], atol=1e-9
        )
    assert state.clean["final_log_probability"] == state.clean["log_probability"]


def test_states_of_a_masked_model(twin_llada, world):
    """No slot and half of them by default, those that the model writes first; whatever is asked for; all
    kinds measured.
    """
    (fact,) = twin_facts(world, 4, 1)
    trace = trace_fact(twin_llada, fact, TraceConfig(samples=1))
    order = decode(twin_llada, [trace.placed.ids], [4])[0].step
    assert [s.revealed for s in trace.states] == [[], sorted(order.argsort()[:2].tolist())]
    for state in trace.states:
        assert (
            state.effects["mlp"]["final_log_probability"].shape
            == (8, trace.placed.length)
            == (8, len(trace.tokens))
        )
        assert state.clean["probability"] > state.corrupted["probability"]
    assert trace.joint["method"] == "exact"
    assert trace.joint["clean"] == pytest.approx(
        log_likelihood(twin_llada, [trace.placed.ids], [trace.placed.answer], "exact")[0]
    )
    assert TraceConfig(revealed=(9, 3, 0)).counts(4) == [0, 3] and TraceConfig().counts(1) == [0]
    random = trace_fact(twin_llada, fact, TraceConfig(samples=1, revealed=(1, 3), reveal="random"))
    assert [len(s.revealed) for s in random.states] == [1, 3] and set(random.states[0].revealed) < set(
        random.states[1].revealed
    )
    with pytest.raises(RequestError, match="4 tokens: none of"):
        trace_fact(twin_llada, fact, TraceConfig(samples=1, revealed=(4,)))


# ---- corruptions -------------------------------------------------------------------------------------------


def test_noise(tiny):
    """Three standard deviations of the embeddings, at the subject alone; a fact's own, whatever is traced
    beside it.
    """
    adapter = tiny("llama")
    placed, corruption = corruption_of(adapter, samples=400)
    assert float(corruption.noise.std()) == pytest.approx(3 * embedding_deviation(adapter), rel=0.02)
    assert corruption.noise.shape[1] == placed.end - placed.first > 2
    with reading_output(adapter.module(adapter.spec.paths.embedding)) as clean:
        adapter.token_logits(placed.ids[None])
    few = corruption_of(adapter, samples=3)[1]
    with (
        few.at(adapter, torch.tensor([2])),
        reading_output(adapter.module(adapter.spec.paths.embedding)) as noisy,
    ):
        adapter.token_logits(placed.ids[None])
    changed = (noisy[0] - clean[0]).abs().sum(-1)[0] > 0
    assert changed.nonzero().flatten().tolist() == list(range(placed.first, placed.end))
    other = TracedFact("Where does Danielle Darrieux live?", "Danielle Darrieux", "red")
    alone, beside = (
        trace_facts(adapter, facts, TraceConfig(samples=1), progress=False)[0][-1]
        for facts in ([FACT], [other, FACT])
    )
    assert torch.equal(
        alone.states[0].effects["mlp"]["probability"], beside.states[0].effects["mlp"]["probability"]
    )


def test_replace(twin_llama, world):
    """Other subjects of as many tokens, the rest of the prompt untouched; without one, an error that says so,
    and the fact is left out.
    """
    fact = next(
        TracedFact(f.prompt(), f.subject, f.object)
        for f in split_facts(world)["test"]
        if len(f.subject.split()) == 2
    )
    placed, corruption = corruption_of(twin_llama, fact, "replace", 3, tuple(world.subjects))
    assert (
        corruption.samples == 3
        and corruption.noise is None
        and len({tuple(row) for row in corruption.ids.tolist()}) == 3
    )
    for row in corruption.ids:
        assert set((row != placed.ids).nonzero().flatten().tolist()) <= set(
            range(placed.first, placed.end)
        ) and not torch.equal(row, placed.ids)
    with pytest.raises(RequestError, match="other subjects has the"):
        corruption_of(twin_llama, fact, "replace", 3, (fact.subject, "Somebody with a very long name indeed"))
    four = next(
        TracedFact(f.prompt(), f.subject, f.object)
        for f in split_facts(world)["test"]
        if len(f.subject.split()) == 4
    )
    two = [s for s in world.subjects if len(s.split()) == 2]
    traces, left_out = trace_facts(
        twin_llama, [four, fact], TraceConfig("replace", samples=1), two, progress=False
    )
    assert (
        [t.placed.fact for t in traces] == [fact]
        and left_out[0]["prompt"] == four.prompt
        and "tokens" in left_out[0]["reason"]
    )
    with pytest.raises(RequestError, match="no fact could be traced"):
        trace_facts(twin_llama, [four], TraceConfig("replace", samples=1), two, progress=False)


def test_mask(twin_llada, twin_llama, world):
    """Masks at the subject, one sample; an autoregressive model has none."""
    (fact,) = twin_facts(world, 2, 1)
    placed, corruption = corruption_of(twin_llada, fact, "mask", 5)
    masked = (corruption.ids[0] == twin_llada.ids.mask).nonzero().flatten().tolist()
    assert corruption.samples == 1 and masked == list(range(placed.first, placed.end))
    trace = trace_fact(twin_llada, fact, TraceConfig("mask"))
    assert (
        trace.samples == 1
        and trace.states[0].clean["probability"] > 2 * trace.states[0].corrupted["probability"]
    )
    with pytest.raises(HyperParameterError, match="'mask' needs a mask token"):
        trace_fact(twin_llama, fact, TraceConfig("mask"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"samples": 0}, "samples=0"),
        ({"window": 0}, "window=0"),
        ({"level": 0}, "level=0"),
        ({"reveal": "all"}, "reveal="),
        ({"revealed": (-1,)}, "revealed"),
    ],
)
def test_settings_are_checked(settings, says):
    """Each error names the setting and its value."""
    with pytest.raises(HyperParameterError, match=says):
        TraceConfig(**settings)
    with pytest.raises(UnknownNameError, match="did you mean 'noise'"):
        TraceConfig("nois")


# ---- facts -------------------------------------------------------------------------------------------------


def test_reading_facts(tmp_path):
    """Three schemas; records that hold no fact are listed with the reason."""
    records = [
        {"known_id": 0, "subject": "Vinson Massif", "attribute": "Antarctica",
            "prompt": "Vinson Massif is located in the continent of"},
        {"prompt": "The tongue of X is", "subject": "X", "target_new": "Y", "ground_truth": ["Z", "z"]},
        {"requested_rewrite": {"prompt": "{} works for", "subject": "A B", "target_new": {"str": "C"},
            "target_true": {"str": "D"}}},
        {"prompt": "no subject", "subject": "X", "attribute": "a"},
        {"prompt": "The tongue of X is", "subject": "X", "target_new": "Y"},
        7,
    ]  # fmt: skip
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records))
    facts, skipped = read_facts(path)
    assert facts == [
        TracedFact("Vinson Massif is located in the continent of", "Vinson Massif", "Antarctica"),
        TracedFact("The tongue of X is", "X", "Z"),
        TracedFact("A B works for", "A B", "D"),
    ]  # fmt: skip
    assert [s["record"] for s in skipped] == [3, 4, 5]
    assert (
        "not in prompt" in skipped[0]["reason"]
        and "ground_truth" in skipped[1]["reason"]
        and "int" in skipped[2]["reason"]
    )
    for text, says in (
        ("{", "cannot be read"),
        ("{}", "holds dict"),
        ("[]", "the list is empty"),
        ("[1]", "no fact among 1"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            read_facts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_facts(tmp_path / "none.json")


def test_classes_of_tokens(twin_llama):
    """Before, first, middle, last, further, last of the prompt, slots; one token is the last, and a subject
    at the end stays one.
    """
    placed = place(twin_llama, FACT)
    names = placed.classes(2)
    assert (
        len(names) == len(placed.ids) + 2
        and names[0] == "before"
        and names[-3:] == ["last", "slots", "slots"]
    )
    assert (
        names[placed.first] == "subject_first"
        and names[placed.end - 1] == "subject_last"
        and "subject_middle" in names
    )
    assert names.count("further") == len(placed.ids) - placed.end - 1
    ends = place(twin_llama, TracedFact("The wife of Danielle", "Danielle", "x"))
    assert ends.classes(0)[-1] == "subject_last" and "last" not in ends.classes(0)
    one = place(twin_llama, TracedFact("in the city", "in", "x"))
    assert (
        one.end - one.first == 1
        and one.classes(0)[0] == "subject_last"
        and "subject_first" not in one.classes(0)
    )


def test_only_known_facts(twin_llada, twin_llama, world):
    """Asked until enough are known to all; who knows what is counted, what is not known is named with what
    was written instead.
    """
    right = twin_facts(world, 2, 3)
    wrong = TracedFact(right[0].prompt, right[0].subject, "no such thing")
    outside = TracedFact("nobody was born in", "Somebody", "x")
    checked = check_known([twin_llada, twin_llama], [wrong, outside, *right], 2, progress=False)
    assert (
        checked.facts == right[:2]
        and checked.asked == 3
        and checked.known == {"twin-llada": 2, "twin-llama": 2}
    )
    (unknown,) = checked.unknown
    assert unknown["answer"] == "no such thing" and unknown["written"].keys() == {"twin-llada", "twin-llama"}
    assert (
        checked.unusable[0]["prompt"] == outside.prompt and "not in prompt" in checked.unusable[0]["reason"]
    )
    with pytest.raises(DataError, match="none of 1 facts is known.*no such thing"):
        check_known([twin_llada], [wrong], progress=False)
    assert own_answer(twin_llada, right[0].prompt, 2) == right[0].answer
