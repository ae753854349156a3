"""States in blocks: what is open, and that schedules, likelihood, sampler, edits and traces follow who sees
whom.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from easyedit_mdm import DecodeConfig, decode
from easyedit_mdm.denoising import SCHEDULES, log_likelihood, schedule
from easyedit_mdm.denoising.states import Slots
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.solve.keys import key_columns, read_keys
from easyedit_mdm.editing.solve.plans import Plan, groups
from easyedit_mdm.editing.solve.rows import build_rows
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.evaluation.ladder import given_k
from easyedit_mdm.models.attention import Attention
from easyedit_mdm.tracing import TraceConfig, TracedFact, trace_fact
from easyedit_mdm.tracing.corruption import CORRUPTIONS, fact_generator
from easyedit_mdm.tracing.facts import place
from easyedit_mdm.tracing.restoring import Runs
from easyedit_mdm.tracing.temporal import final

BLOCKS = [(1,), (3,), (4,), (1, 1, 1), (2, 1), (1, 4), (2, 2), (3, 4, 2)]
drawn = pytest.mark.parametrize("name", [name for name in SCHEDULES if not schedule(name, 2).rolled])


def is_state(blocks: tuple[int, ...], shown: list[bool], read: list[bool]) -> bool:
    """Whether blocks are revealed in order, and only hidden slots of the open one are read, spelled out."""
    ends = list(itertools.accumulate(blocks))
    parts = [list(range(end - size, end)) for size, end in zip(blocks, ends)]
    opened = next(i for i, part in enumerate(parts) if not all(shown[s] for s in part))
    earlier = all(shown[s] for part in parts[:opened] for s in part)
    later = not any(shown[s] for part in parts[opened + 1 :] for s in part)
    inside = all(s in parts[opened] and not shown[s] for s, r in enumerate(read) if r)
    return earlier and later and inside and any(read)


@drawn
@pytest.mark.parametrize("blocks", BLOCKS)
def test_schedules_go_block_by_block(name, blocks):
    """In every state earlier blocks show their tokens, later ones none, and the loss is read in the open
    one.
    """
    plan = schedule(name, blocks)
    generator = torch.Generator().manual_seed(0)
    for step in range(2 * sum(blocks)):
        states = plan.draw(step, generator)
        assert float(states.weights.sum()) == pytest.approx(1)
        for shown, read in zip(states.revealed.tolist(), states.scored.tolist()):
            assert is_state(blocks, shown, read), (step, shown, read)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_enumerate_has_every_state_once(blocks):
    """sum (2^n - 1) states; weights by number revealed are 1/N each."""
    states = schedule("enumerate", blocks, 100).draw(0, torch.Generator())
    assert (
        len(states.weights)
        == sum(2**n - 1 for n in blocks)
        == len({tuple(s) for s in states.revealed.tolist()})
    )
    n = sum(blocks)
    for k in range(n):
        of_k = states.revealed.sum(1) == k
        assert float(states.weights[of_k].sum()) == pytest.approx(1 / n)
        assert int(of_k.sum()) == Slots(blocks).ways(k)


def test_one_block_and_blocks_of_one():
    """Sizes may be given as a number; in blocks of one every schedule is teacher forcing."""
    for name in ("full_mask", "enumerate", "stratified"):
        states = schedule(name, (1, 1, 1)).draw(0, torch.Generator().manual_seed(0))
        forced = schedule("left_to_right", 3).draw(0, torch.Generator())
        assert torch.equal(states.revealed, forced.revealed) and torch.equal(states.scored, forced.scored)
        assert torch.allclose(states.weights, forced.weights)
    assert schedule("full_mask", (2, 3)).draw(0, torch.Generator()).revealed.int().tolist() == [
        [0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
    ]
    with pytest.raises(HyperParameterError, match="at least one token"):
        schedule("cycle", (2, 0))


def orders(blocks: tuple[int, ...]) -> list[list[int]]:
    """Every order in which the slots may be revealed."""
    ends = list(itertools.accumulate(blocks))
    parts = [list(itertools.permutations(range(end - size, end))) for size, end in zip(blocks, ends)]
    return [list(itertools.chain(*choice)) for choice in itertools.product(*parts)]


class Writer:
    """-log p of a target revealed in one order or another, one pass for each set of slots that shows."""

    def __init__(self, model, prompt: torch.Tensor, target: torch.Tensor):
        self.model, self.prompt, self.target = model, prompt, target
        self.known: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def log_probs(self, shown: tuple[int, ...]) -> torch.Tensor:
        """The right tokens' log-probabilities at every slot, with some showing."""
        if shown not in self.known:
            tail = torch.full_like(self.target, self.model.ids.mask)
            tail[list(shown)] = self.target[list(shown)]
            start = len(self.prompt)
            row = torch.cat([self.prompt, tail])[None]
            logits = self.model.token_logits(row, canvas=torch.tensor([start]))[0, start:].log_softmax(-1)
            self.known[shown] = logits.gather(-1, self.target[:, None])[:, 0]
        return self.known[shown]

    def nll(self, order: list[int]) -> float:
        """In one order."""
        before = [tuple(sorted(order[:i])) for i in range(len(order))]
        return -sum(float(self.log_probs(shown)[slot]) for shown, slot in zip(before, order))


@pytest.mark.parametrize("family", ["sdar", "a2d-qwen3", "masked-qwen2", "masked-qwen3"])
@pytest.mark.parametrize(("prompt", "length"), [(6, 4), (8, 4), (5, 5), (7, 3)])
def test_any_order_identity(tiny, family, prompt, length):
    """enumerate's value times N is the mean NLL over all orders that finish a block before the next; so is
    `exact`.
    """
    model = tiny(family, **({"block": 4} if family == "a2d-qwen3" else {}))
    ids = torch.arange(20, 20 + prompt)
    target = torch.arange(40, 40 + length)
    blocks = model.attention.blocks(prompt, length)
    assert sum(blocks) == length and (len(blocks) > 1 or prompt == 8 or length < 5)
    writer = Writer(model, ids, target)
    every = [writer.nll(order) for order in orders(blocks)]
    mean = sum(every) / len(every)
    states = schedule("enumerate", blocks, 100).draw(0, torch.Generator())
    value = 0.0
    for shown, read, weight in zip(states.revealed, states.scored, states.weights):
        value -= float(weight * writer.log_probs(tuple(shown.nonzero().flatten().tolist()))[read].mean())
    assert value * length == pytest.approx(mean, abs=1e-4)
    assert -log_likelihood(model, [ids], [target], "exact")[0] == pytest.approx(mean, abs=1e-4)
    for method, order in (("left_to_right", list(range(length))), ("right_to_left", _leftwards(blocks))):
        assert -log_likelihood(model, [ids], [target], method)[0] == pytest.approx(
            writer.nll(order), abs=1e-4
        )


def _leftwards(blocks: tuple[int, ...]) -> list[int]:
    ends = list(itertools.accumulate(blocks))
    return [slot for size, end in zip(blocks, ends) for slot in reversed(range(end - size, end))]


@pytest.mark.parametrize("method", ["llada", "dream"])
def test_estimators_are_unbiased_in_blocks(tiny, method):
    """Monte Carlo, many samples, against the exact value of a target over three blocks."""
    model = tiny("sdar")
    ids, target = torch.arange(20, 26), torch.arange(40, 47)
    assert model.attention.blocks(6, 7) == (2, 4, 1)
    exact = log_likelihood(model, [ids], [target], "exact")[0]
    runs = [log_likelihood(model, [ids], [target], method, samples=400, seed=s)[0] for s in range(6)]
    mean = sum(runs) / len(runs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in runs) / (len(runs) - 1) / len(runs))
    assert abs(mean - exact) < 5 * spread + 1e-3 and spread < 0.1 * abs(exact)


def test_decoding_goes_block_by_block(tiny):
    """No slot of a later block is committed before the earlier are full; a threshold only makes blocks
    shorter.
    """
    model = tiny("sdar")
    prompts = [torch.arange(20, 26), torch.arange(30, 38)]
    for config in (
        DecodeConfig(),
        DecodeConfig(steps=6),
        DecodeConfig(order="random", seed=2),
        DecodeConfig(threshold=0.01),
    ):
        for prompt, path in zip(prompts, decode(model, prompts, [9, 9], config)):
            parts = path.step.split(model.attention.blocks(len(prompt), 9))
            for before, after in itertools.pairwise(parts):
                assert int(before.max()) < int(after.min())
            assert (path.tokens != model.ids.mask).all()
    steps = [
        int(decode(model, prompts[:1], [9], DecodeConfig(threshold=t))[0].step.max()) for t in (0.0, 1.0)
    ]
    assert steps == [2, 8]
    alone = decode(model, prompts[1:], [9])[0]
    assert torch.equal(alone.tokens, decode(model, prompts, [9, 9])[1].tokens)


def test_what_is_written_later_changes_nothing_before(tiny):
    """A longer canvas leaves the first whole blocks as they were; generate writes the last block to its end
    and cuts it.
    """
    model = tiny("sdar")
    prompt = torch.arange(20, 26)
    short, long = (decode(model, [prompt], [n])[0].tokens for n in (6, 10))
    assert torch.equal(short, long[:6])
    whole = model.generate(prompt[None], max_new_tokens=10)
    assert torch.equal(model.generate(prompt[None], max_new_tokens=8)[0], whole[0, :14])


def test_settings_in_blocks(tiny):
    """Blocks that do not divide the model's, Dream's orders over several blocks, a pace or threshold that is
    not read.
    """
    model, full = tiny("sdar"), tiny("llada")
    prompt = [torch.arange(20, 26)]
    for adapter, config, message in (
        (model, {"block_length": 3}, "does not divide the model's blocks of 4"),
        (model, {"order": "entropy"}, "knows no blocks"),
        (full, {"block_length": 4}, "does not divide the canvas"),
    ):
        with pytest.raises(HyperParameterError, match=message):
            decode(adapter, prompt, [6], DecodeConfig(**config))
    with pytest.raises(HyperParameterError, match="takes no threshold"):
        DecodeConfig(order="origin", threshold=0.9)
    with pytest.raises(HyperParameterError, match="pace='fast'"):
        DecodeConfig(pace="fast")
    parts = decode(model, prompt, [6], DecodeConfig(block_length=2))[0].step.split(2)
    assert all(int(a.max()) < int(b.min()) for a, b in itertools.pairwise(parts))
    assert DecodeConfig(block_length=4, pace="linear").plan(6).block == 4


@pytest.mark.parametrize("attention", [Attention(4), Attention(4, "canvas"), Attention(3), Attention()])
def test_records_of_plans_lead_back(attention):
    """The settings that a record holds give the same plan again."""
    for prompt, length, steps in itertools.product((5, 8), (1, 3, 6, 9), (None, 3, 6)):
        if attention.block is None and steps is not None and steps > length:
            continue
        plan = DecodeConfig(steps=steps).plan(length, attention, prompt)
        block = plan.block if attention.block else None
        again = DecodeConfig(steps=plan.steps, block_length=block).plan(length, attention, prompt)
        assert again.turns == plan.turns


REQUEST = {"prompt": "The river of Ann is", "subject": "Ann", "target_new": "red and old"}


def settings(name: str = "ROME_MDM", **more):
    """Hyperparameters with context prefixes of several lengths."""
    base = {
        "layers": [1],
        "v_num_grad_steps": 8,
        "v_lr": 0.5,
        "v_weight_decay": 1e-3,
        "clamp_norm_factor": 10.0,
    }
    templates = ["{}", "Yes. {}", "It is so that {}", "Old and new: {}"]
    return METHODS[name].hparams(
        alg_name=name, model_name="tiny", context_templates=templates, **{**base, **more}
    )


def test_prefixes_fall_into_groups(tiny):
    """Prefixes after which the slots fall into other blocks have states of their own, each prefix once."""
    model = tiny("sdar")
    hparams = settings()
    fact = tokenise(model, EditRequest.of(REQUEST), hparams)
    some = groups(model, fact)
    assert len(some) > 1 and sorted(c for g in some for c in g.contexts) == list(range(len(fact.contexts)))
    for group in some:
        assert {
            model.attention.blocks(len(fact.contexts[c].ids), len(fact.target)) for c in group.contexts
        } == {group.blocks}
    plan = Plan.of(model, fact, "enumerate")
    rows = build_rows(model, {0: fact}, {0: plan.draw(0, torch.Generator())}, "slot")
    assert float(rows.weights.sum()) == pytest.approx(1)
    for row in range(len(rows)):
        if not rows.anchor[row]:
            start = int(rows.canvas[row])
            shown = (rows.ids[row, start : start + len(fact.target)] != model.ids.mask).tolist()
            blocks = model.attention.blocks(start, len(fact.target))
            assert is_state(blocks, shown, (rows.weights[row] > 0).tolist())
    assert len(groups(tiny("a2d-qwen3", block=4), fact)) == 1 and len(groups(tiny("llada"), fact)) == 1


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("family", ["sdar", "masked-qwen3"])
def test_edits_over_every_schedule(tiny, family, name):
    """ROME_MDM lowers its loss in blocks under every schedule, and is taken back bit for bit."""
    from easyedit_mdm import make_edit

    model = tiny(family)
    before = {n: p.clone() for n, p in model.named_parameters()}
    edit = make_edit(model, REQUEST, settings(state_schedule=name))
    fact = tokenise(model, EditRequest.of(REQUEST), settings())
    likelihoods = [log_likelihood(model, [fact.contexts[0].ids], [fact.target], "exact")[0]]
    edit.apply(model)
    likelihoods += log_likelihood(model, [fact.contexts[0].ids], [fact.target], "exact")
    assert likelihoods[1] > likelihoods[0] + 0.1
    edit.revert(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_keys_of_groups_are_those_of_the_prefixes_alone(tiny):
    """k* over groups is the mean over prefixes of each prefix's own mean over its states, in every kind of
    average.
    """
    model = tiny("sdar")
    hparams = settings(key_states="average")
    fact = tokenise(model, EditRequest.of(REQUEST), hparams)
    site = model.site(1)
    assert len(groups(model, fact)) > 1
    each = []
    for prompt in fact.contexts:
        blocks = model.attention.blocks(len(prompt.ids), len(fact.target))
        states = schedule("enumerate", blocks).draw(0, torch.Generator())
        seen = []
        hook = model.module(site.name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            for shown in states.revealed:
                row = torch.cat([prompt.ids, torch.where(shown, fact.target, model.ids.mask)])[None]
                model.hidden_before(2, row, canvas=torch.tensor([len(prompt.ids)]))
        hook.remove()
        each.append((states.weights[:, None] * torch.stack([s[0, prompt.fact_at] for s in seen])).sum(0))
    keys = read_keys(model, site, fact, hparams)
    assert (keys.keys - torch.stack(each)).abs().max() < 1e-5
    for average, wanted in (
        ("single", torch.stack(each).mean(0)),
        ("easyedit", (each[0] + torch.stack(each[1:]).mean(0)) / 2),
    ):
        for states in ("average", "per_state"):
            some = settings(
                "MEMIT_MDM",
                key_states=states,
                key_average=average,
                mom2_update_weight=1,
                mom2_dataset="twins",
            )
            columns = key_columns(model, site, [fact], some)
            assert float(columns.weights.sum()) == pytest.approx(1)
            mean = (columns.keys * columns.weights).sum(1)
            assert (mean - wanted).abs().max() < 1e-5, (average, states)


def test_traces_read_the_open_block(tiny, tokenizer):
    """The slots that a traced run reads are those of the open block; the final log-probability goes through
    all blocks.
    """
    model = tiny("sdar")
    fact = TracedFact("The river of Ann is", "Ann", "red and old")
    placed = place(model, fact)
    blocks = model.attention.blocks(len(placed.ids), len(placed.answer))
    assert len(blocks) > 1
    corruption = CORRUPTIONS["noise"](model, placed, 2, 3.0, (), fact_generator(placed, 0))
    for k in range(len(placed.answer)):
        shown = torch.tensor(Slots(blocks).at(k, range(Slots(blocks).opened(k)[2]))[0])
        runs = Runs(model, placed, corruption, shown)
        assert is_state(blocks, shown.tolist(), [i in runs.read.tolist() for i in range(len(placed.answer))])
        assert torch.isfinite(final(runs, runs.clean, None)).all()
    last = Runs(model, placed, corruption, torch.tensor([True] * (len(placed.answer) - 1) + [False]))
    assert float(final(last, last.clean, None)) == pytest.approx(float(last.clean.right[0, 0]))
    for reveal in ("path", "random"):
        trace = trace_fact(model, fact, TraceConfig(samples=2, reveal=reveal, revealed=(0, 1, 3)))
        for state in trace.states:
            shown = [i in state.revealed for i in range(len(placed.answer))]
            assert is_state(blocks, shown, [not s and i == shown.index(False) for i, s in enumerate(shown)])
    assert trace.joint["method"] == "exact"
    wanted = log_likelihood(model, [placed.ids], [placed.answer], "exact")[0]
    assert trace.joint["clean"] == pytest.approx(wanted, abs=1e-5)
    assert len(given_k(model, fact.prompt, fact.answer)) == len(placed.answer)
