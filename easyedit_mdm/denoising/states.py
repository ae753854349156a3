"""Which partially revealed states of a target an edit is optimised over.

A target of N tokens has 2^N - 1 states worth predicting in: the sets S of slots that already show their token, short of
all of them. The loss of a state is the mean, over the slots outside S, of -log p(y_i | prompt, y_S). Over a uniformly
random order of revealing, the expected negative log-likelihood of the whole target is N times the mean over states with
weight 1 / (N C(N, |S|)): what `enumerate` computes exactly, and the others estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.errors import HyperParameterError

MAX_STATES = 31


@dataclass(frozen=True)
class States:
    """A batch of states of one target.

    Attributes:
        revealed: which slots show their token.
        scored: which slots the loss is read at; never a revealed one.
        weights: weight of each state; they sum to 1.
        shown: the tokens in revealed slots, where they are not the target's own.
    """

    revealed: Bool[Tensor, "states slots"]
    scored: Bool[Tensor, "states slots"]
    weights: Float[Tensor, " states"]
    shown: Int[Tensor, "states slots"] | None = None


@dataclass(frozen=True)
class Schedule:
    """A schedule for targets of one length.

    Attributes:
        name: what was asked for.
        used: what is done; differs from `name` where `enumerate` has too many states and becomes `stratified`.
        fixed: the states are the same at every step, so that what lies below the edited layer can be computed once.
        cycle: number of steps after which every kind of state has been seen; early stopping looks at their mean.
        draw: (step, generator) -> states.
        dealt: a step does not see all states in every context prefix: prefix c has, at step t, only state number
            (c + t) mod (number of states).
        rolled: the states of a step are those that the model itself, as edited so far, comes through while it decodes, most
            confident slot first: with the `right` tokens revealed, or with its `own`, right or wrong. `draw` has none then.
        most: the most states a step.
    """

    name: str
    used: str
    fixed: bool
    cycle: int
    draw: Callable[[int, torch.Generator], States]
    dealt: bool = False
    rolled: str = ""
    most: int = MAX_STATES


Maker = Callable[[int, int], Schedule]
SCHEDULES: Registry[Maker] = Registry("state schedule")


def schedule(name: str, length: int, max_states: int = MAX_STATES) -> Schedule:
    """The schedule called `name` for targets of `length` tokens.

    Args:
        max_states: the most states that one step may hold; `enumerate` becomes `stratified` beyond it.

    Raises:
        UnknownNameError: for a name that is not known.
        HyperParameterError: if length or max_states is less than 1.
    """
    make = SCHEDULES[name]
    if length < 1 or max_states < 1:
        raise HyperParameterError(f"a schedule needs a target of at least one token (got {length}) and max_states >= 1 (got {max_states})")
    return make(length, max_states)


def _states(revealed: Bool[Tensor, "states slots"], weights: Float[Tensor, " states"] | None = None) -> States:
    n = revealed.shape[0]
    return States(revealed, ~revealed, torch.full((n,), 1 / n) if weights is None else weights)


def _random_state(length: int, k: int, generator: torch.Generator) -> Bool[Tensor, " slots"]:
    state = torch.zeros(length, dtype=torch.bool)
    state[torch.randperm(length, generator=generator)[:k]] = True
    return state


@SCHEDULES.register("full_mask")
def full_mask(length: int, max_states: int = MAX_STATES) -> Schedule:
    """Nothing revealed: the plain transfer of ROME and MEMIT to a masked model."""
    states = _states(torch.zeros(1, length, dtype=torch.bool))
    return Schedule("full_mask", "full_mask", True, 1, lambda step, generator: states)


@SCHEDULES.register("cycle")
def cycle(length: int, max_states: int = MAX_STATES) -> Schedule:
    """The paper's: at step t one state with t mod N tokens revealed, drawn anew (arXiv 2606.03924)."""

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step."""
        return _states(_random_state(length, step % length, generator)[None])

    return Schedule("cycle", "cycle", length == 1, length, draw)


@SCHEDULES.register("uniform")
def uniform(length: int, max_states: int = MAX_STATES) -> Schedule:
    """One state a step, the number of revealed tokens drawn from U{0..N-1}."""

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step."""
        k = int(torch.randint(length, (1,), generator=generator))
        return _states(_random_state(length, k, generator)[None])

    return Schedule("uniform", "uniform", length == 1, length, draw)


@SCHEDULES.register("stratified")
def stratified(length: int, max_states: int = MAX_STATES) -> Schedule:
    """One state for each number k of revealed tokens, drawn anew each step; k = 0 always among them.

    For targets longer than `max_states` the numbers k are spread evenly over 0..N-1.
    """
    counts = torch.linspace(0, length - 1, min(length, max_states)).round().int().tolist()

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step."""
        return _states(torch.stack([_random_state(length, k, generator) for k in counts]))

    return Schedule("stratified", "stratified", length == 1, 1, draw)


@SCHEDULES.register("enumerate")
def enumerate_all(length: int, max_states: int = MAX_STATES) -> Schedule:
    """All 2^N - 1 states, weight 1 / (N C(N, |S|)): the exact any-order objective.

    Beyond `max_states` it becomes `stratified` with one draw of states that is kept for all steps.
    """
    if 2**length - 1 > max_states:
        return _frozen_draw("enumerate", stratified(length, max_states))
    sets = [s for k in range(length) for s in itertools.combinations(range(length), k)]
    revealed = torch.zeros(len(sets), length, dtype=torch.bool)
    for row, slots in enumerate(sets):
        revealed[row, list(slots)] = True
    weights = torch.tensor([1 / (length * math.comb(length, len(s))) for s in sets])
    states = _states(revealed, weights)
    return Schedule("enumerate", "enumerate", True, 1, lambda step, generator: states)


@SCHEDULES.register("left_to_right")
def left_to_right(length: int, max_states: int = MAX_STATES) -> Schedule:
    """The N prefixes, each scored on the next slot only: what an autoregressive model's teacher forcing covers."""
    revealed = torch.ones(length, length).tril(-1).bool()
    states = States(revealed, torch.eye(length).bool(), torch.full((length,), 1 / length))
    return Schedule("left_to_right", "left_to_right", True, 1, lambda step, generator: states)


@SCHEDULES.register("spread")
def spread(length: int, max_states: int = MAX_STATES) -> Schedule:
    """A fixed set of states dealt out over the context prefixes and steps: no more forwards than `full_mask`.

    The set holds rounds of N states, one for each number k = 0..N-1 of revealed tokens, so that over a cycle every k weighs
    the same in every prefix, after N steps already; in round r stands the r-th of the C(N, k) states with k revealed, in random order. As many
    rounds as make all states equally frequent within their k, at most max_states / N (at least one).
    """
    counts = torch.linspace(0, length - 1, min(length, max_states)).round().int().tolist()
    rounds = max(1, min(max_states // len(counts), math.lcm(*(math.comb(length, k) for k in counts))))
    kept: list[States] = []

    def draw(step: int, generator: torch.Generator) -> States:
        """The set, the same at every step."""
        if not kept:
            sets = [_shuffled(length, k, rounds, generator) for k in counts]
            kept.append(_states(torch.stack([states[r] for r in range(rounds) for states in sets])))
        return kept[0]

    return Schedule("spread", "spread", True, len(counts), draw, dealt=True)


@SCHEDULES.register("confidence")
def confidence(length: int, max_states: int = MAX_STATES) -> Schedule:
    """The N states met when the right tokens are revealed in the edited model's own order, most confident slot first."""
    return _rolled("confidence", length, max_states, "right")


@SCHEDULES.register("on_policy")
def on_policy(length: int, max_states: int = MAX_STATES) -> Schedule:
    """The N states met when the edited model decodes by itself: its own tokens are shown, and may be wrong."""
    return _rolled("on_policy", length, max_states, "own")


def _rolled(name: str, length: int, max_states: int, tokens: str) -> Schedule:
    if length == 1:  # there is nothing to roll out: the plain edit
        return Schedule(name, name, True, 1, full_mask(1, max_states).draw)

    def draw(step: int, generator: torch.Generator) -> States:
        """Not without a model.

        Raises:
            HyperParameterError: always.
        """
        raise HyperParameterError(f"the states of {name!r} are those a model decodes through: they cannot be drawn without one")

    return Schedule(name, name, False, 1, draw, rolled=tokens, most=max_states)


def _shuffled(length: int, k: int, n: int, generator: torch.Generator) -> Bool[Tensor, "n slots"]:
    """n states with k tokens revealed: without repetition as far as there are so many, in random order."""
    total = math.comb(length, k)
    if total > 64 * n:  # too many to list: random ones hardly repeat
        return torch.stack([_random_state(length, k, generator) for _ in range(n)])
    every = torch.zeros(total, length, dtype=torch.bool)
    for row, slots in enumerate(itertools.combinations(range(length), k)):
        every[row, list(slots)] = True
    return every[torch.randperm(total, generator=generator)].repeat(-(-n // total), 1)[:n]


def _frozen_draw(name: str, source: Schedule) -> Schedule:
    """`source` with the states of its first draw kept, so that what lies below the edit is computed once."""
    kept: list[States] = []

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step."""
        if not kept:
            kept.append(source.draw(0, generator))
        return kept[0]

    return Schedule(name, source.used, True, source.cycle, draw)
