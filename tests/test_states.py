"""State schedules, held against the definition of the any-order likelihood."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from easyedit_mdm.denoising import SCHEDULES, schedule
from easyedit_mdm.errors import HyperParameterError, UnknownNameError


def toy_nll(length: int, seed: int):
    """A table -log p(y_i | y_S) for every state S and slot i outside it."""
    generator = torch.Generator().manual_seed(seed)
    sets = [s for k in range(length) for s in itertools.combinations(range(length), k)]
    return {s: torch.rand(length, generator=generator, dtype=torch.float64) for s in sets}


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_enumerate_is_the_any_order_nll(length):
    """enumerate's value times N is the mean over all N! orders of the NLL of revealing in that order."""
    table = toy_nll(length, seed=length)
    states = schedule("enumerate", length).draw(0, torch.Generator())
    value = 0.0
    for revealed, scored, weight in zip(states.revealed, states.scored, states.weights):
        losses = table[tuple(revealed.nonzero().flatten().tolist())]
        value += float(weight) * float(losses[scored].mean())
    orders = list(itertools.permutations(range(length)))
    expected = sum(
        sum(float(table[tuple(sorted(o[:k]))][o[k]]) for k in range(length)) for o in orders
    ) / len(orders)
    assert length * value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES if not schedule(name, 2).rolled]
)  # those: see test_rollout.py
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 40])
def test_states_are_valid(name, length):
    """Weights sum to 1; something is scored, and never what is revealed; N = 1 is the plain edit for every
    schedule.
    """
    plan = schedule(name, length)
    generator = torch.Generator().manual_seed(0)
    for step in range(7):
        states = plan.draw(step, generator)
        assert float(states.weights.sum()) == pytest.approx(1, abs=1e-5)
        assert not (states.revealed & states.scored).any()
        assert states.scored.any(-1).all()
        assert states.revealed.shape[0] <= 31 or name == "left_to_right"
        if length == 1:
            assert states.revealed.tolist() == [[False]]


def test_cycle_reveals_t_mod_n():
    """The paper's correction: k = t mod N tokens revealed at step t, other ones each time."""
    plan = schedule("cycle", 4)
    generator = torch.Generator().manual_seed(0)
    drawn = [plan.draw(t, generator).revealed[0] for t in range(40)]
    assert [int(s.sum()) for s in drawn] == [t % 4 for t in range(40)]
    assert len({tuple(s.tolist()) for s in drawn[1::4]}) > 1
    assert plan.cycle == 4 and not plan.fixed


def test_stratified_and_uniform():
    """stratified: one state for each k; uniform: one k a step, all of them met."""
    generator = torch.Generator().manual_seed(0)
    assert schedule("stratified", 5).draw(0, generator).revealed.sum(-1).tolist() == [0, 1, 2, 3, 4]
    plan = schedule("uniform", 3)
    assert {int(plan.draw(t, generator).revealed.sum()) for t in range(60)} == {0, 1, 2}


def test_left_to_right_scores_the_next_slot():
    """The N prefixes, loss on the next slot only."""
    states = schedule("left_to_right", 3).draw(0, torch.Generator())
    assert states.revealed.int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert states.scored.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_enumerate_becomes_stratified_and_says_so():
    """Beyond max_states the schedule is stratified, kept for all steps, and the record tells."""
    plan = schedule("enumerate", 6)
    assert (plan.used, plan.name, plan.fixed) == ("stratified", "enumerate", True)
    assert schedule("enumerate", 3, 7).used == "enumerate", "as many states as are allowed"
    assert schedule("enumerate", 3, 6).used == "stratified"
    generator = torch.Generator().manual_seed(0)
    first, second = plan.draw(0, generator), plan.draw(1, generator)
    assert torch.equal(first.revealed, second.revealed)
    assert schedule("enumerate", 40, 8).draw(0, generator).revealed.sum(-1).tolist()[0] == 0
    assert len(schedule("enumerate", 40, 8).draw(0, generator).weights) == 8


@pytest.mark.parametrize(
    ("name", "fixed", "cycle", "dealt", "rolled"),
    [
        ("full_mask", True, 1, False, ""), ("cycle", False, 3, False, ""), ("uniform", False, 3, False, ""),
        ("stratified", False, 1, False, ""),
        ("enumerate", True, 1, False, ""), ("left_to_right", True, 1, False, ""), ("spread", True, 3, True,
            ""),
        ("confidence", False, 1, False, "right"), ("on_policy", False, 1, False, "own"),
    ],
)  # fmt: skip
def test_what_schedules_say_of_themselves(name, fixed, cycle, dealt, rolled):
    """Whether states stay, after how many steps all kinds were seen, and whether they are dealt out or rolled
    out; N = 1 is fixed.
    """
    plan, one = schedule(name, 3), schedule(name, 1)
    assert (plan.name, plan.used, plan.fixed, plan.cycle, plan.dealt, plan.rolled) == (
        name,
        name,
        fixed,
        cycle,
        dealt,
        rolled,
    )
    assert one.fixed and one.cycle == 1 and not one.rolled
    assert schedule(name, 3, 2).most == (2 if rolled else 31)
    if not rolled:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        first, *others = [plan.draw(0, g).revealed for g in generators] + [
            plan.draw(1, generators[0]).revealed for _ in range(20)
        ]
        assert all(torch.equal(first, other) for other in others) == fixed


def test_every_schedule_is_told():
    """The table above holds all of them."""
    (told,) = [
        mark.args[1]
        for mark in test_what_schedules_say_of_themselves.pytestmark
        if mark.name == "parametrize"
    ]
    assert {row[0] for row in told} == set(SCHEDULES)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if not schedule(name, 2).rolled])
def test_few_states(name):
    """One state a step is enough for every schedule but the prefixes, of which none is left out; less is
    refused, by name.
    """
    states = schedule(name, 4, 1).draw(0, torch.Generator().manual_seed(0))
    assert len(states.weights) == (4 if name == "left_to_right" else 1) and float(
        states.weights.sum()
    ) == pytest.approx(1)
    for length, most in ((0, 5), (3, 0)):
        with pytest.raises(HyperParameterError, match=f"got {length}.*got {most}"):
            schedule(name, length, most)


def test_random_states_are_fair():
    """Every set of its size comes up about equally often, in `cycle` and in what `enumerate` keeps for long
    targets.
    """
    generator, plan = torch.Generator().manual_seed(0), schedule("cycle", 4)
    drawn = [tuple(plan.draw(2, generator).revealed[0].tolist()) for _ in range(1200)]
    assert {sum(state) for state in drawn} == {2} and len(set(drawn)) == 6
    assert all(140 < drawn.count(state) < 260 for state in set(drawn))
    assert schedule("enumerate", 12).draw(0, generator).revealed.sum(1).tolist() == list(range(12))


def test_names():
    """Unknown names say what was meant; states that need a model say so."""
    with pytest.raises(UnknownNameError, match="did you mean 'enumerate'"):
        schedule("enumerat", 3)
    for name in ("confidence", "on_policy"):
        with pytest.raises(HyperParameterError, match="cannot be drawn without"):
            schedule(name, 3).draw(0, torch.Generator())


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_spread_deals_every_kind_evenly(length):
    """Over a cycle each number k of revealed tokens comes up equally often; where all states fit, each state
    within its k too.
    """
    plan = schedule("spread", length)
    states = plan.draw(0, torch.Generator().manual_seed(0))
    assert plan.dealt and plan.fixed and len(states.weights) <= 31 and plan.cycle == length
    counts = states.revealed.sum(1).tolist()
    assert all(counts.count(k) == len(counts) // length for k in range(length))
    n = len(counts)
    assert all(
        {counts[(c + t) % n] for t in range(start, start + plan.cycle)} == set(range(length))
        for c in range(3)
        for start in range(n)
    ), "a cycle"
    if length <= 3:
        for k in range(length):
            of_k = [tuple(s.tolist()) for s in states.revealed if int(s.sum()) == k]
            assert len({of_k.count(s) for s in set(of_k)}) == 1 and len(set(of_k)) == math.comb(length, k)
    assert torch.equal(plan.draw(7, torch.Generator().manual_seed(1)).revealed, states.revealed)
