"""What an adapted model must do before anything is edited in it: five gates, each against the model that it
was made of.

1. `first_slot`: loss of an answer's first slot, at most 0.3 nats above the teacher's, on facts about held-out
   subjects.
2. `known_facts`: at least 0.8 of the one-token facts that the teacher knows (held-out subjects, never trained
   on).
3. `codes`: four random words that stand in the prompt, written again in N steps, all four right: 0.9.
4. `steps`: N steps write at least as many right tokens as one step, less 0.05 (the codes, and longer facts
   that the teacher writes).
5. `samples`: a page of text, for a person to judge.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm.denoising import DecodeConfig, decode
from easyedit_mdm.evaluation.multi_step import score_prompts
from easyedit_mdm.evaluation.records import Score
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.geometry import right_padded, similar
from easyedit_mdm.models.prompts import encode, target_ids
from easyedit_mdm.training.corpus import facts_of, words_of
from easyedit_mdm.training.splits import held_out_subjects, same_name

NEEDED = {"first_slot": 0.3, "known_facts": 0.8, "codes": 0.9, "steps": -0.05}
OPENINGS = (
    "The capital of France is",
    "Water is made of",
    "In the morning, she",
    "The history of the city begins",
    "A good teacher",
    "The largest planet in the solar system is",
    "Once upon a time, there was",
    "To make a cup of tea,",
    "The mother tongue of Victor Hugo is",
    "Computers are used to",
    "He opened the door and",
    "The river flows through the valley and",
)
ROWS = 32


@dataclass(frozen=True)
class GateFact:
    """A prompt and its answer, with the answer's tokens as they stand after the prompt."""

    source: str
    prompt: str
    answer: str
    tokens: tuple[int, ...]


def gate_facts(
    data_dir: str | Path, tokenizer_of: Adapter, limit: int = 100, seed: int = 0
) -> list[GateFact]:
    """Facts about held-out subjects: known_1000, LRE, CounterFact's true ones and KAMEL's test files, `limit`
    of each.

    Raises:
        DataError: for files that are missing or broken.
    """
    held_out = held_out_subjects(data_dir)
    chosen = []
    for source, facts in facts_of(data_dir).items():
        mine = [fact for fact in facts if same_name(fact.subject) in held_out]
        for fact in random.Random(f"{seed}/{source}").sample(mine, min(limit, len(mine))):
            tokens = target_ids(tokenizer_of, fact.openings[0], fact.object)
            chosen.append(GateFact(source, fact.openings[0], fact.object, tuple(tokens.tolist())))
    return chosen


@torch.no_grad()
def first_slots(adapter: Adapter, facts: Sequence[GateFact]) -> list[tuple[float, bool]]:
    """For each fact: loss (nats) of the answer's first token, all N slots masked, and whether it is
    likeliest.
    """
    rows = [
        [*encode(adapter, fact.prompt.rstrip()), *adapter.hidden.slots(len(fact.tokens)).tolist()]
        for fact in facts
    ]
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(facts)
    for group in similar([len(row) for row in rows], ROWS, adapter.device):
        ids, mask = right_padded([torch.tensor(rows[i]) for i in group], adapter.ids.pad, adapter.device)
        at = torch.tensor([[len(rows[i]) - len(facts[i].tokens)] for i in group], device=ids.device)
        logits = adapter.token_logits(ids, mask, at=at)[:, 0].float()
        losses = -logits.log_softmax(-1)
        for row, i in enumerate(group):
            token = facts[i].tokens[0]
            scores[i] = (float(losses[row, token]), int(losses[row].argmin()) == token)
    return scores


def codes(adapter: Adapter, count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts with a code of four words in them, and the codes; each word is one token, in no trained
    list.
    """
    words = words_of(adapter.tokenizer, 0)
    rng = random.Random(seed)
    answers = [" ".join(rng.sample(words, 4)) for _ in range(count)]
    return [
        f"The code of the safe is {code}. Do not forget it. The code of the safe is" for code in answers
    ], answers


def measure_gates(
    model: Adapter, teacher: Adapter, data_dir: str | Path, limit: int = 100, seed: int = 0
) -> dict[str, Any]:
    """All gates.

    Args:
        model: the adapted model.
        teacher: the autoregressive one that it was made of.
        limit: facts of each source, and codes.

    Returns:
        `{gate: {"value": v, "needed": w, "passed": bool, "n": n, ...}}`, and the page of samples as
        `samples`. An autoregressive model has no one step, and no gate `steps`.

    Raises:
        DataError: for files that are missing or broken.
    """
    facts = gate_facts(data_dir, teacher, limit, seed)
    own, taught = first_slots(model, facts), first_slots(teacher, facts)
    known = [i for i, fact in enumerate(facts) if len(fact.tokens) == 1 and taught[i][1]]
    gap = sum(a - b for (a, _), (b, _) in zip(own, taught)) / len(facts)
    kept = [own[i][1] for i in known]
    longer = [fact for fact, (_, right) in zip(facts, taught) if right and 2 <= len(fact.tokens) <= 8]
    written = _written(teacher, [f.prompt for f in longer], [f.answer for f in longer])
    longer = [fact for fact, record in zip(longer, written) if record["exact"]]
    prompts, answers = codes(teacher, max(1, limit // 2), seed)
    copied, copied_by_teacher = _written(model, prompts, answers), _written(teacher, prompts, answers)
    spoken = _written(model, [f.prompt for f in longer], [f.answer for f in longer])
    report = {
        "first_slot": _gate(
            "first_slot",
            gap,
            len(facts),
            model=_mean([a for a, _ in own]),
            teacher=_mean([b for b, _ in taught]),
        ),
        "known_facts": _gate("known_facts", _mean(kept), len(known), by_source=_by_source(facts, known, own)),
        "codes": _gate(
            "codes",
            _mean([r["exact"] for r in copied]),
            len(copied),
            **_scores(copied),
            teacher=_mean([r["exact"] for r in copied_by_teacher]),
        ),
        "samples": page(model),
    }
    if model.denoises:
        both = copied + spoken
        steps = _mean([r["token_acc"] for r in both]) - _mean([r["one_step"] for r in both])
        more = {"n": len(spoken), **_scores(spoken)}
        report["steps"] = _gate("steps", steps, len(both), longer_facts=more)
    return report


def _gate(name: str, value: float, n: int, **more: Any) -> dict[str, Any]:
    passed = value <= NEEDED[name] if name == "first_slot" else value >= NEEDED[name]
    return {"value": value, "needed": NEEDED[name], "passed": bool(n and passed), "n": n, **more}


def _written(adapter: Adapter, prompts: Sequence[str], answers: Sequence[str]) -> list[Score]:
    """Records of the multi-step metric, rows of like length together."""
    scores: list[Score] = [{} for _ in prompts]
    for group in similar([len(prompt) for prompt in prompts], ROWS, adapter.device):
        records = score_prompts(
            adapter, [prompts[i] for i in group], [answers[i] for i in group], DecodeConfig()
        )
        for i, record in zip(group, records):
            scores[i] = record
    return scores


def _scores(records: Sequence[Score]) -> dict[str, float]:
    """Exact after N steps; share of tokens after N steps, and, where there is such a thing, after one."""
    one_step = [r["one_step"] for r in records if "one_step" in r]
    return {
        "exact": _mean([r["exact"] for r in records]),
        "tokens_n_steps": _mean([r["token_acc"] for r in records]),
        **({"tokens_one_step": _mean(one_step)} if len(one_step) == len(records) else {}),
    }


def _by_source(
    facts: Sequence[GateFact], known: Sequence[int], own: Sequence[tuple[float, bool]]
) -> dict[str, dict[str, Any]]:
    right: dict[str, list[bool]] = {}
    for i in known:
        right.setdefault(facts[i].source, []).append(own[i][1])
    return {source: {"value": _mean(values), "n": len(values)} for source, values in right.items()}


def _mean(values: Sequence[Any]) -> float:
    return sum(map(float, values)) / len(values) if values else 0.0


def page(model: Adapter, tokens: int = 32) -> list[dict[str, str]]:
    """What the model writes after each of `OPENINGS`: `tokens` tokens, one a step."""
    prompts = [torch.tensor(encode(model, opening)) for opening in OPENINGS]
    paths = decode(model, prompts, [tokens] * len(prompts))
    texts = [model.tokenizer.decode(path.tokens.tolist(), skip_special_tokens=True) for path in paths]
    return [{"prompt": opening, "text": text} for opening, text in zip(OPENINGS, texts)]
