"""Which partially revealed states of a target an edit is optimised over.

A target of N tokens has 2^N - 1 states worth predicting in: the sets S of slots that already show their
token, short of all of them. The loss of a state is the mean, over the slots outside S, of -log p(y_i |
prompt, y_S). Over a uniformly random order of revealing, the expected negative log-likelihood of the whole
target is N times the mean over states with weight 1 / (N C(N, |S|)): what `enumerate` computes exactly, and
the others estimate.

A block-causal model reveals block by block. The block in which the next token is due is *open*: the blocks
before it show their tokens, the slots after it are hidden, and the loss is read in the open block alone. A
target whose slots fall into blocks of n_1, n_2, ... has sum_b (2^n_b - 1) such states; with k tokens
revealed, m of them in the open block of n slots, each weighs 1 / (N C(n, m)), and the same identity holds for
the orders that finish a block before the next. One block of N is the masked model above, blocks of one are
teacher forcing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
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
        scored: which slots the loss is read at: hidden ones of the open block.
        weights: weight of each state; they sum to 1.
        shown: the tokens in revealed slots, where they are not the right ones.
        tokens: the right tokens, where the slots are not just the target's.
    """

    revealed: Bool[Tensor, "states slots"]
    scored: Bool[Tensor, "states slots"]
    weights: Float[Tensor, " states"]
    shown: Int[Tensor, "states slots"] | None = None
    tokens: Int[Tensor, " slots"] | None = None


@dataclass(frozen=True)
class Schedule:
    """A schedule for targets of one length, whose slots fall into the same blocks.

    Attributes:
        name: what was asked for.
        used: what is done; differs from `name` where `enumerate` has too many states and becomes
            `stratified`.
        fixed: the states are the same at every step, so that what lies below the edited layer can be computed
            once.
        cycle: number of steps after which every kind of state has been seen; early stopping looks at their
            mean.
        draw: (step, generator) -> states.
        dealt: a step does not see all states in every context prefix: prefix c has, at step t, only state
            number (c + t) mod (number of states).
        rolled: the states of a step are those that the model itself, as edited so far, comes through while it
            decodes, most confident slot first: with the `right` tokens revealed, or with its `own`, right or
            wrong. `draw` has none then.
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


@dataclass(frozen=True)
class Slots:
    """A target's slots, by the blocks they fall into.

    Attributes:
        blocks: sizes of the blocks, in the order in which they are revealed.
    """

    blocks: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.blocks)

    def opened(self, k: int) -> tuple[int, int, int]:
        """The open block once k tokens are revealed: its first slot, its size, and how many of it are
        revealed.
        """
        start = 0
        for size in self.blocks:
            if k < start + size:
                return start, size, k - start
            start += size
        raise ValueError(f"{k} of {start} tokens revealed: no slot is left")

    def inside(self, k: int) -> list[bool]:
        """Which slots are those of the open block once k tokens are revealed."""
        start, size, _ = self.opened(k)
        return [start <= i < start + size for i in range(len(self))]

    def ways(self, k: int) -> int:
        """In how many states k tokens are revealed."""
        _, size, shown = self.opened(k)
        return math.comb(size, shown)

    @property
    def states(self) -> int:
        """How many states there are."""
        return sum(2**size - 1 for size in self.blocks)

    def at(self, k: int, slots: Sequence[int]) -> tuple[list[bool], list[bool]]:
        """The state with these slots of the open block revealed, counted from its first: what shows, and what
        is read.
        """
        start, _, _ = self.opened(k)
        shown = [i < start or i - start in slots for i in range(len(self))]
        return shown, [inside and not s for inside, s in zip(self.inside(k), shown)]


Maker = Callable[[Slots, int], Schedule]
SCHEDULES: Registry[Maker] = Registry("state schedule")


def schedule(name: str, length: int | Sequence[int], max_states: int = MAX_STATES) -> Schedule:
    """The schedule called `name` for targets of `length` tokens.

    Args:
        length: the number of tokens, all in one block; or the sizes of the blocks they fall into
            (`Attention.blocks`).
        max_states: the most states that one step may hold; `enumerate` becomes `stratified` beyond it.

    Raises:
        UnknownNameError: for a name that is not known.
        HyperParameterError: if length or max_states is less than 1.
    """
    make = SCHEDULES[name]
    slots = Slots((length,) if isinstance(length, int) else tuple(length))
    if min(slots.blocks, default=0) < 1 or max_states < 1:
        raise HyperParameterError(
            f"a schedule needs a target of at least one token (got {length}) and max_states >= 1 (got"
            f" {max_states})"
        )
    return make(slots, max_states)


def _states(pairs: Sequence[tuple[list[bool], list[bool]]], weights: Sequence[float] | None = None) -> States:
    """States from what each shows and where it is open; equally heavy by default."""
    shown, scored = (torch.tensor(column) for column in zip(*pairs))
    n = len(pairs)
    return States(shown, scored, torch.full((n,), 1 / n) if weights is None else torch.tensor(weights))


def random_state(slots: Slots, k: int, generator: torch.Generator) -> tuple[list[bool], list[bool]]:
    """A state with k tokens revealed: which slots show theirs, and which are read."""
    _, size, shown = slots.opened(k)
    return slots.at(k, torch.randperm(size, generator=generator)[:shown].tolist())


@SCHEDULES.register("full_mask")
def full_mask(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """Nothing revealed: the plain transfer of ROME and MEMIT to a masked model.

    In blocks: each block with nothing of it revealed, as heavy as it has slots, so that every slot weighs the
    same.
    """
    starts = itertools.accumulate(slots.blocks[:-1], initial=0)
    states = _states([slots.at(k, ()) for k in starts], [size / len(slots) for size in slots.blocks])
    return Schedule("full_mask", "full_mask", True, 1, lambda step, generator: states)


@SCHEDULES.register("cycle")
def cycle(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """The paper's: at step t one state with t mod N tokens revealed, drawn anew (arXiv 2606.03924)."""
    length = len(slots)

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step."""
        return _states([random_state(slots, step % length, generator)])

    return Schedule("cycle", "cycle", length == 1, length, draw)


@SCHEDULES.register("uniform")
def uniform(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """One state a step, the number of revealed tokens drawn from U{0..N-1}."""
    length = len(slots)

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step."""
        k = int(torch.randint(length, (1,), generator=generator))
        return _states([random_state(slots, k, generator)])

    return Schedule("uniform", "uniform", length == 1, length, draw)


def _spaced(length: int, most: int) -> list[int]:
    """Numbers of revealed tokens, spread evenly over 0..N-1 where not all of them fit."""
    return torch.linspace(0, length - 1, min(length, most)).round().int().tolist()


@SCHEDULES.register("stratified")
def stratified(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """One state for each number k of revealed tokens, drawn anew each step; k = 0 always among them.

    For targets longer than `max_states` the numbers k are spread evenly over 0..N-1.
    """
    counts = _spaced(len(slots), max_states)

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step."""
        return _states([random_state(slots, k, generator) for k in counts])

    return Schedule("stratified", "stratified", len(slots) == 1, 1, draw)


@SCHEDULES.register("enumerate")
def enumerate_all(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """All states, weight 1 / (N C(n, m)) with m of the open block's n slots revealed: the exact any-order
    objective.

    Beyond `max_states` it becomes `stratified` with one draw of states that is kept for all steps.
    """
    if slots.states > max_states:
        return _frozen_draw("enumerate", stratified(slots, max_states))
    states = _states(
        [slots.at(k, some) for k in range(len(slots)) for some in _subsets(slots, k)],
        [1 / (len(slots) * slots.ways(k)) for k in range(len(slots)) for _ in _subsets(slots, k)],
    )
    return Schedule("enumerate", "enumerate", True, 1, lambda step, generator: states)


def _subsets(slots: Slots, k: int) -> Iterator[tuple[int, ...]]:
    """What may be revealed of the open block once k tokens are."""
    _, size, shown = slots.opened(k)
    return itertools.combinations(range(size), shown)


@SCHEDULES.register("left_to_right")
def left_to_right(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """The N prefixes, each scored on the next slot only: what an autoregressive model's teacher forcing
    covers.
    """
    length = len(slots)
    revealed = torch.ones(length, length).tril(-1).bool()
    states = States(revealed, torch.eye(length).bool(), torch.full((length,), 1 / length))
    return Schedule("left_to_right", "left_to_right", True, 1, lambda step, generator: states)


@SCHEDULES.register("spread")
def spread(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """A fixed set of states dealt out over the context prefixes and steps: no more forwards than `full_mask`.

    The set holds rounds of N states, one for each number k = 0..N-1 of revealed tokens, so that over a cycle
    every k weighs the same in every prefix, after N steps already; in round r stands the r-th of the states
    with k revealed, in random order. As many rounds as make all states equally frequent within their k, at
    most max_states / N (at least one).
    """
    counts = _spaced(len(slots), max_states)
    rounds = max(1, min(max_states // len(counts), math.lcm(*(slots.ways(k) for k in counts))))
    kept: list[States] = []

    def draw(step: int, generator: torch.Generator) -> States:
        """The set, the same at every step."""
        if not kept:
            sets = [_shuffled(slots, k, rounds, generator) for k in counts]
            kept.append(_states([states[r] for r in range(rounds) for states in sets]))
        return kept[0]

    return Schedule("spread", "spread", True, len(counts), draw, dealt=True)


@SCHEDULES.register("confidence")
def confidence(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """The N states met when the right tokens are revealed in the edited model's own order, most confident
    slot first.
    """
    return _rolled("confidence", slots, max_states, "right")


@SCHEDULES.register("on_policy")
def on_policy(slots: Slots, max_states: int = MAX_STATES) -> Schedule:
    """The N states met when the edited model decodes by itself: its own tokens are shown, and may be
    wrong.
    """
    return _rolled("on_policy", slots, max_states, "own")


def _rolled(name: str, slots: Slots, max_states: int, tokens: str) -> Schedule:
    if len(slots) == 1:  # there is nothing to roll out: the plain edit
        return Schedule(name, name, True, 1, full_mask(slots, max_states).draw)

    def draw(step: int, generator: torch.Generator) -> States:
        """Not without a model.

        Raises:
            HyperParameterError: always.
        """
        raise HyperParameterError(
            f"the states of {name!r} are those a model decodes through: they cannot be drawn without one"
        )

    return Schedule(name, name, False, 1, draw, rolled=tokens, most=max_states)


def _shuffled(
    slots: Slots, k: int, n: int, generator: torch.Generator
) -> list[tuple[list[bool], list[bool]]]:
    """n states with k tokens revealed: without repetition as far as there are so many, in random order."""
    total = slots.ways(k)
    if total > 64 * n:  # too many to list: random ones hardly repeat
        return [random_state(slots, k, generator) for _ in range(n)]
    every = [slots.at(k, some) for some in _subsets(slots, k)]
    order = torch.randperm(total, generator=generator).tolist()
    return [every[order[i % total]] for i in range(n)]


def _frozen_draw(name: str, source: Schedule) -> Schedule:
    """`source` with the states of its first draw kept, so that what lies below the edit is computed once."""
    kept: list[States] = []

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step."""
        if not kept:
            kept.append(source.draw(0, generator))
        return kept[0]

    return Schedule(name, source.used, True, source.cycle, draw)
