"""Facts to edit many of, one a subject, apart for choosing and for reporting; and what is measured of an
edited model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from easyedit_mdm import score_prompts
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.models import Adapter
from easyedit_mdm.twins.benchmark import Case, split_facts
from easyedit_mdm.twins.world import RELATIONS, Fact, World

COMPOSITIONAL = [i for i, relation in enumerate(RELATIONS) if not relation.closed]
NEIGHBOURS = 2
UNTOUCHED = 100


@dataclass(frozen=True)
class Pool:
    """Edits in order, and facts of subjects that none of them names."""

    cases: list[Case]
    untouched: list[Fact]


def pools(world: World, longest: int = 8) -> dict[str, Pool]:
    """`validation`: 64 edits, of the validation split's 40 subjects and 24 of the closed split's.

    `test`: 200 edits, of the test split's 120 subjects, the 56 that no split names, the 16 other ones of the
    closed split, and, to make 200, of 8 validation subjects in another relation. Targets have 1 to `longest`
    tokens in turn.
    """
    splits = split_facts(world)
    named = {fact.subject for facts in splits.values() for fact in facts}
    closed = [_relation(world, f.subject, i) for i, f in enumerate(splits["closed"])]
    unnamed = [_relation(world, s, i) for i, s in enumerate(s for s in world.subjects if s not in named)]
    extra = [world.facts[f.subject][(RELATIONS.index(f.relation) + 1) % 4] for f in splits["validation"][:8]]
    chosen = {
        "validation": splits["validation"] + closed[:24],
        "test": splits["test"] + unnamed + closed[24:] + extra,
    }
    return {name: _pool(world, name, facts, longest) for name, facts in chosen.items()}


def _relation(world: World, subject: str, number: int) -> Fact:
    return world.facts[subject][COMPOSITIONAL[number % len(COMPOSITIONAL)]]


def _pool(world: World, name: str, facts: list[Fact], longest: int) -> Pool:
    edited, subjects = {(f.subject, f.relation.name) for f in facts}, {f.subject for f in facts}
    cases = []
    for i, fact in enumerate(facts):
        length = 1 + i % longest
        rng = random.Random(f"{world.settings.seed}/{fact.subject}/{fact.relation.name}/{length}")
        near = [n for n in world.neighbours(fact, 99) if (n.subject, n.relation.name) not in edited]
        cases.append(Case(fact, world.other_object(fact, length, rng), tuple(near[:NEIGHBOURS])))
    others = [f for f in world.all_facts() if f.subject not in subjects]
    random.Random(f"{name}/untouched").shuffle(others)
    return Pool(cases, others[:UNTOUCHED])


class Judge:
    """Scores of an edited model, a value a fact."""

    def __init__(self, model: Adapter, pool: Pool):
        self.model, self.pool = model, pool
        self.alone = self.written(pool.untouched)
        near = [n for case in pool.cases for n in case.neighbours]
        self.near = dict(zip([n.prompt() for n in near], self.written(near)))

    def written(self, facts: Sequence[Fact]) -> list[list[int]]:
        """What the model writes of some facts now."""
        if not facts:
            return []
        scores = score_prompts(self.model, [f.prompt() for f in facts], [f.object for f in facts])
        return [s["tokens"] for s in scores]

    def targets(self, cases: Sequence[Case], decode: DecodeConfig = DecodeConfig()) -> list[bool]:
        """Whether the targets of some edits are written."""
        asked = [c.fact.prompt() for c in cases]
        return [bool(s["exact"]) for s in score_prompts(self.model, asked, [c.target for c in cases], decode)]

    def __call__(self, cases: Sequence[Case]) -> dict[str, list[float]]:
        """Everything, of some edits that the model carries."""
        found = {"exact": self.targets(cases)}
        if self.model.masked:
            found["one_step"] = self.targets(cases, DecodeConfig(steps=1))
        asked = [c.fact.paraphrase(0) for c in cases]
        scores = score_prompts(self.model, asked, [c.target for c in cases])
        found["paraphrase"] = [bool(s["exact"]) for s in scores]
        near = [n for case in cases for n in case.neighbours]
        found["neighbours"] = [
            share(self.near[n.prompt()], w) for n, w in zip(near, self.written(near), strict=True)
        ]
        found["untouched"] = [
            share(a, b) for a, b in zip(self.alone, self.written(self.pool.untouched), strict=True)
        ]
        return {name: [float(v) for v in values] for name, values in found.items()}


def share(before: Sequence[int], now: Sequence[int]) -> float:
    """Of equal tokens."""
    return sum(a == b for a, b in zip(before, now, strict=True)) / len(before)


def shortened(pool: Pool, n: int) -> Pool:
    """The first `n` edits."""
    return replace(pool, cases=pool.cases[:n])
