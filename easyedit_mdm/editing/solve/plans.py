"""The states of one fact, whose slots may fall into other blocks after each of its context prefixes.

In a block-causal model that counts blocks from the row's start, the prompt's tail shares its block with the
first slots, so the length of a prefix decides where the target crosses an edge. Prefixes after which the
slots fall into the same blocks form a group with one schedule. Wherever blocks do not depend on the prefix
there is one group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from easyedit_mdm.denoising.states import MAX_STATES, Schedule, States, schedule
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.models import Adapter


@dataclass(frozen=True)
class Group:
    """Context prefixes of one fact, by number, and the blocks that the target's slots fall into after each of
    them.
    """

    contexts: tuple[int, ...]
    blocks: tuple[int, ...]


def groups(adapter: Adapter, fact: Fact) -> list[Group]:
    """The groups of a fact's context prefixes; the bare prompt is the first of the first."""
    length = len(fact.target)
    by_blocks: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(fact.contexts):
        by_blocks.setdefault(adapter.blocks(len(prompt.ids), length), []).append(number)
    return [Group(tuple(contexts), blocks) for blocks, contexts in by_blocks.items()]


@dataclass(frozen=True)
class Plan:
    """One schedule for each group of a fact; what is said of them as a whole is meant as in `Schedule`."""

    groups: tuple[Group, ...]
    schedules: tuple[Schedule, ...]

    @classmethod
    def of(cls, adapter: Adapter, fact: Fact, name: str, max_states: int = MAX_STATES) -> Plan:
        """The schedule called `name` for a fact."""
        some = tuple(groups(adapter, fact))
        # where each slot sees the slots on its left, a target has one state
        name = name if adapter.denoises else "full_mask"
        return cls(some, tuple(schedule(name, group.blocks, max_states) for group in some))

    @property
    def used(self) -> str:
        """What is done, and where it differs what was asked for."""
        name, used = self.schedules[0].name, list(dict.fromkeys(s.used for s in self.schedules))
        return name if used == [name] else f"{' and '.join(used)} (asked for {name})"

    @property
    def fixed(self) -> bool:
        """Whether the states are the same at every step."""
        return all(s.fixed for s in self.schedules)

    @property
    def cycle(self) -> int:
        """Steps after which every kind of state has been seen."""
        return math.lcm(*(s.cycle for s in self.schedules))

    @property
    def dealt(self) -> bool:
        """Whether states are dealt out over the prefixes."""
        return self.schedules[0].dealt

    @property
    def rolled(self) -> bool:
        """Whether a model has to be asked for the states."""
        return bool(self.schedules[0].rolled)

    def draw(self, step: int, generator: torch.Generator) -> list[tuple[tuple[int, ...], States]]:
        """The states of one step, beside the numbers of the prefixes that they stand after."""
        return [(group.contexts, s.draw(step, generator)) for group, s in zip(self.groups, self.schedules)]
