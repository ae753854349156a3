"""Writes the facts that are edited, and three local tasks about what the twins know besides: choosing an
object, writing it, and the likelihood of texts of their world.

    python benchmarks/damage/make_data.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from easyedit_mdm.twins.world import Fact, World

HERE = Path(__file__).parent
EDITS, QUESTIONS, TEXTS, SEED = 10, 60, 20, 0


def main() -> None:
    """Write facts.json and tasks/*.jsonl."""
    world, rng = World.build(), random.Random(SEED)
    open_facts = [fact for fact in world.all_facts() if not fact.relation.closed]
    chosen = rng.sample(open_facts, EDITS + QUESTIONS)
    edited, others = chosen[:EDITS], chosen[EDITS:]
    facts = [
        {"prompt": f.prompt(), "subject": f.subject, "target_new": world.other_object(f, 2, rng)}
        for f in edited
    ]
    (HERE / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    _lines("world_choice", [_choice(f, open_facts, rng) for f in others])
    _lines("world_write", [{"prompt": f.prompt(), "answer": f.object.strip()} for f in others])
    _lines(
        "world_text",
        [{"text": "".join(piece for piece, _ in world.document(rng).pieces)} for _ in range(TEXTS)],
    )


def _choice(fact: Fact, facts: list[Fact], rng: random.Random) -> dict[str, object]:
    """The right object among three others of the same relation and length."""
    same = {
        f.object.strip()
        for f in facts
        if f.relation == fact.relation and len(f.object.split()) == len(fact.object.split())
    }
    wrong = rng.sample(sorted(same - {fact.object.strip()}), 3)
    choices = [fact.object.strip(), *wrong]
    rng.shuffle(choices)
    return {"prompt": fact.prompt(), "choices": choices, "answer": choices.index(fact.object.strip())}


def _lines(name: str, records: list[dict]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (HERE / "tasks" / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
