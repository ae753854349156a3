"""The states of one fact, whose slots may fall into other blocks after each of its context prefixes.

In a block-causal model that counts blocks from the row's start, the prompt's tail shares its block with the
first slots, so the length of a prefix decides where the target crosses an edge. Prefixes after which the
slots fall into the same blocks form a group with one schedule. Wherever blocks do not depend on the prefix
there is one group.

With `open_canvas` a group has a second schedule: of the target's slots and the one behind them, which is to
hold the end-of-text token, on a canvas longer than that. The slots that follow are not read, since a text is
cut off at its end. But a sampler may have ended it there before the target is written. So a random number of
them, from none to all, show the end-of-text token, unless the schedule is of states in which a sampler has
not come so far: `full_mask` and `left_to_right`. The canvas with nothing shown, where a sampler begins, is
among the states of every schedule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from easyedit_mdm.denoising.states import MAX_STATES, Schedule, States, schedule
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.hparams import StateHyperParams
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.models import Adapter

_NOTHING_BEHIND = ("full_mask", "left_to_right")


@dataclass(frozen=True)
class Group:
    """Context prefixes of one fact, by number, and the blocks that slots fall into after each of them.

    Attributes:
        blocks: of the target's slots.
        longer: of the slots of the open canvas; empty where there is none.
    """

    contexts: tuple[int, ...]
    blocks: tuple[int, ...]
    longer: tuple[int, ...] = ()


def groups(adapter: Adapter, fact: Fact, open_canvas: int = 0) -> list[Group]:
    """The groups of a fact's context prefixes; the bare prompt is the first of the first.

    Args:
        open_canvas: its slots; 0: there is none. It has at least one more than the target.
    """
    length = len(fact.target)
    slots = max(open_canvas, length + 1) if open_canvas else length
    by_blocks: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(fact.contexts):
        by_blocks.setdefault(adapter.blocks(len(prompt.ids), slots), []).append(number)
    return [
        Group(tuple(contexts), _first(blocks, length), blocks if open_canvas else ())
        for blocks, contexts in by_blocks.items()
    ]


def _first(blocks: Sequence[int], slots: int) -> tuple[int, ...]:
    """The blocks of the first so many slots."""
    ends = list(itertools.accumulate(blocks))
    return tuple(min(end, slots) - start for start, end in zip([0, *ends], ends) if start < slots)


def ended(adapter: Adapter, fact: Fact, group: Group, name: str, max_states: int) -> Schedule:
    """The schedule called `name` on the open canvas of a group.

    Raises:
        HyperParameterError: if the model has no end-of-text token.
    """
    if adapter.ids.eos is None:
        raise HyperParameterError(
            f"open_canvas: {adapter.name} has no end-of-text token that could stand behind the target"
        )
    read = len(fact.target) + 1
    # nothing is written in blocks behind that of the end, and a causal row is read up to its end
    ends = list(itertools.accumulate(group.longer)) if adapter.denoises else [read]
    slots = next(end for end in ends if end >= read)
    last = max((end for end in ends if end < read), default=0)
    source = schedule(name, _first(group.longer, read), max_states)
    tokens = fact.target.new_full((slots,), adapter.ids.eos)
    tokens[: read - 1] = fact.target
    kept: list[States] = []

    def draw(step: int, generator: torch.Generator) -> States:
        """States of one step; of a fixed schedule the same at every step."""
        if kept:
            return kept[0]
        states = source.draw(step, generator)
        n = len(states.revealed)
        behind = torch.zeros(n, slots - read, dtype=torch.bool)
        reached = states.scored[:, last:].any(1)  # the last block is open
        if name in _NOTHING_BEHIND:
            reached[:] = False
        # a sampler begins with nothing shown: always among fixed states, every other time among drawn ones
        begins = (reached & ~states.revealed[:, last:].any(1)).nonzero()[:1, 0]
        if source.fixed or step % 2 == 0:
            reached[begins] = False
        for shown in (behind[i] for i in reached.nonzero()[:, 0].tolist()):
            many = int(torch.randint(slots - read + 1, (1,), generator=generator))
            shown[torch.randperm(slots - read, generator=generator)[:many]] = True
        revealed = torch.cat([states.revealed, behind], dim=1)
        scored = torch.cat([states.scored, torch.zeros_like(behind)], dim=1)
        drawn = replace(states, revealed=revealed, scored=scored, tokens=tokens)
        if source.fixed:
            kept.append(drawn)
        return drawn

    return replace(source, draw=draw)


@dataclass(frozen=True)
class Plan:
    """One schedule for each group of a fact, with an open canvas two; what is said of them as a whole is
    meant as in `Schedule`.

    Attributes:
        longer: the schedules on the open canvas, a group each; empty where there is none.
    """

    groups: tuple[Group, ...]
    schedules: tuple[Schedule, ...]
    longer: tuple[Schedule, ...] = ()

    @classmethod
    def of(
        cls, adapter: Adapter, fact: Fact, name: str, max_states: int = MAX_STATES, open_canvas: int = 0
    ) -> Plan:
        """The schedule called `name` for a fact.

        Raises:
            HyperParameterError: for an open canvas, if the model has no end-of-text token.
        """
        some = tuple(groups(adapter, fact, open_canvas))
        # where each slot sees the slots on its left, a target has one state
        name = name if adapter.denoises else "full_mask"
        longer = [ended(adapter, fact, group, name, max_states) for group in some] if open_canvas else []
        return cls(some, tuple(schedule(name, group.blocks, max_states) for group in some), tuple(longer))

    @classmethod
    def asked(cls, adapter: Adapter, fact: Fact, hparams: StateHyperParams) -> Plan:
        """That of the hyperparameters.

        Raises:
            HyperParameterError: see `of`.
        """
        return cls.of(adapter, fact, hparams.state_schedule, hparams.max_states, hparams.open_canvas)

    @property
    def _all(self) -> tuple[Schedule, ...]:
        return self.schedules + self.longer

    @property
    def used(self) -> str:
        """What is done, and where it differs what was asked for."""
        name, used = self.schedules[0].name, list(dict.fromkeys(s.used for s in self._all))
        return name if used == [name] else f"{' and '.join(used)} (asked for {name})"

    @property
    def fixed(self) -> bool:
        """Whether the states are the same at every step."""
        return all(s.fixed for s in self._all)

    @property
    def cycle(self) -> int:
        """Steps after which every kind of state has been seen."""
        return max(math.lcm(*(s.cycle for s in some)) for some in (self.schedules, self.longer) if some)

    @property
    def dealt(self) -> bool:
        """Whether states are dealt out over the prefixes."""
        return self.schedules[0].dealt

    @property
    def rolled(self) -> bool:
        """Whether a model has to be asked for the states."""
        return bool(self.schedules[0].rolled)

    def draw(self, step: int, generator: torch.Generator) -> list[tuple[tuple[int, ...], States]]:
        """The states of one step, beside the numbers of the prefixes that they stand after. With an open
        canvas those of the target's own slots weigh one half, those of the open canvas the other.
        """
        own = [s.draw(step, generator) for s in self.schedules]
        contexts = [group.contexts for group in self.groups]
        if not self.longer:
            return list(zip(contexts, own))
        both = own + [s.draw(step, generator) for s in self.longer]
        return [(c, replace(s, weights=s.weights / 2)) for c, s in zip(contexts * 2, both)]
