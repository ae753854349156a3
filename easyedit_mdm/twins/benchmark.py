"""Edits to make in the twins' world, split into validation and test, and written in the formats that people
use.

Each fact is edited to one target of every length, so that lengths are compared on the same subjects. No two
facts of a split, and no two splits, share a subject.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_mdm.common.files import write_text
from easyedit_mdm.twins.world import RELATIONS, Fact, World

SIZES = {"test": 120, "validation": 40, "closed": 40}


@dataclass(frozen=True)
class Case:
    """One edit: a fact of the world, and the object it is to have instead."""

    fact: Fact
    target: str
    neighbours: tuple[Fact, ...]

    @property
    def length(self) -> int:
        """Tokens of the target."""
        return len(self.target.split())

    def request(self) -> dict[str, str]:
        """As EasyEdit takes it."""
        return {"prompt": self.fact.prompt(), "subject": self.fact.subject, "target_new": self.target}


def split_facts(world: World) -> dict[str, list[Fact]]:
    """Facts by split, one a subject: `test` and `validation` of the compositional relations in turn, `closed`
    of the closed-list one.
    """
    subjects = list(world.subjects)
    random.Random(f"{world.settings.seed}/split").shuffle(subjects)
    given = iter(subjects)
    compositional = [i for i, relation in enumerate(RELATIONS) if not relation.closed]
    closed = [i for i, relation in enumerate(RELATIONS) if relation.closed]
    splits = {}
    for name, size in SIZES.items():
        numbers = closed if name == "closed" else compositional
        splits[name] = [
            world.facts[subject][numbers[i % len(numbers)]]
            for i, subject in enumerate(itertools.islice(given, size))
        ]
    return splits


def cases(world: World, split: str) -> list[Case]:
    """All edits of a split: every fact to one target of every length, drawn by the world's seed."""
    made = []
    for fact in split_facts(world)[split]:
        neighbours = tuple(world.neighbours(fact, 5))
        for length in range(1, world.settings.max_length + 1):
            rng = random.Random(f"{world.settings.seed}/{fact.subject}/{length}")
            made.append(Case(fact, world.other_object(fact, length, rng), neighbours))
    return made


def remaining_entropy(world: World, closed: bool) -> dict[int, list[float]]:
    """Entropy (bits) of the tokens still hidden, given k revealed ones at random places: by object length,
    for k = 0..N-1.

    Compositional objects: from the number of parts at each position. Closed list: over the list's objects of
    that length.
    """
    table = {}
    for length in range(1, world.settings.max_length + 1):
        table[length] = [
            sum(
                _closed_entropy(world, s, length) if closed else _part_entropy(world, s, length) for s in sets
            )
            / len(sets)
            for sets in (list(itertools.combinations(range(length), k)) for k in range(length))
        ]
    return table


def _part_entropy(world: World, revealed: tuple[int, ...], length: int) -> float:
    return sum(math.log2(world.settings.branching[p]) for p in range(length) if p not in revealed)


def _closed_entropy(world: World, revealed: tuple[int, ...], length: int) -> float:
    groups: dict[tuple[str, ...], int] = defaultdict(int)
    objects = [o.split() for o in world.closed if len(o.split()) == length]
    for parts in objects:
        groups[tuple(parts[p] for p in revealed)] += 1
    return sum(n * math.log2(n) for n in groups.values()) / len(objects)


def write_benchmark(folder: str | Path, world: World | None = None) -> list[Path]:
    """Write every split as `counterfact-SPLIT.json` (EasyEdit's records), `counterfact-rome-SPLIT.json`
    (ROME's schema) and `zsre-SPLIT.json` (the file that `run_zsre_llama2.py` reads). zsRE's portability
    question takes one hop from the new object.
    """
    world = world or World.build()
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for split in SIZES:
        rows = list(enumerate(cases(world, split)))
        for name, make in (("counterfact", _counterfact), ("counterfact-rome", _rome), ("zsre", _zsre)):
            path = out / f"{name}-{split}.json"
            write_text(path, json.dumps([make(i, case, world) for i, case in rows], indent=1) + "\n")
            written.append(path)
    return written


def _questions(fact: Fact) -> list[str]:
    return [fact.prompt(i) for i, phrasing in enumerate(fact.relation.phrasings) if phrasing.endswith("?")]


def _near(case: Case, i: int) -> Fact:
    return case.neighbours[i % len(case.neighbours)] if case.neighbours else case.fact


def _counterfact(i: int, case: Case, world: World) -> dict[str, Any]:
    near = _near(case, i)
    return {
        "case_id": i, "prompt": case.fact.prompt(), "target_new": case.target, "subject": case.fact.subject,
        "ground_truth": case.fact.object,
        "rephrase_prompt": case.fact.paraphrase(i % 2), "locality_prompt": near.prompt(),
        "locality_ground_truth": near.object,
        "n_tokens": case.length,
    }  # fmt: skip


def _rome(i: int, case: Case, world: World) -> dict[str, Any]:
    relation = case.fact.relation
    index = RELATIONS.index(relation)
    first = case.target.split()[0]
    sharing = [
        world.facts[s][index] for s in world.subjects if world.facts[s][index].object.split()[0] == first
    ][:5]
    return {
        "case_id": i, "n_tokens": case.length,
        "requested_rewrite": {
            "prompt": relation.phrasings[0].replace("{s}", "{}"), "relation_id": relation.name,
            "subject": case.fact.subject,
            "target_new": {"str": case.target, "id": case.target}, "target_true": {"str": case.fact.object,
                "id": case.fact.object},
        },
        "paraphrase_prompts": [case.fact.paraphrase(0), case.fact.paraphrase(1)],
        "neighborhood_prompts": [n.prompt() for n in case.neighbours],
        "attribute_prompts": [f.prompt() for f in sharing],
        "generation_prompts": [f"{case.fact.subject} is a", case.fact.prompt(1)],
    }  # fmt: skip


def _zsre(i: int, case: Case, world: World) -> dict[str, Any]:
    near, question, relation = _near(case, i), _questions(case.fact)[0], case.fact.relation
    return {
        "subject": case.fact.subject, "src": question, "pred": case.fact.object,
        "rephrase": case.fact.paraphrase(i % 2), "alt": case.target,
        "answers": [case.fact.object], "loc": f"nq question: {_questions(near)[0]}", "loc_ans": near.object,
        "cond": f"{case.fact.object} >> {case.target} || {question}", "n_tokens": case.length,
        "portability": {
            "Recalled Relation": f"({relation.name})",
            "New Question": relation.hop.format(s=case.fact.subject),
            "New Answer": world.kind(relation, case.target),
        },
    }  # fmt: skip
