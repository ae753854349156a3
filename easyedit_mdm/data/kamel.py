"""KAMEL's facts as edits: each fact gets another object of its relation, as many tokens long as its own.

KAMEL (Kalo and Fichtel, 2022) gives facts of Wikidata whose objects have any number of tokens. It has no
counterfactual targets and asks in questions; the targets are drawn here, and the cloze prompts and
paraphrases are in `kamel_templates.yaml`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

TEMPLATES = Path(__file__).with_name("kamel_templates.yaml")


class Unusable(Exception):
    """Why one record of a data file cannot be used; never leaves `load_cases`, which lists it as skipped."""


@dataclass(frozen=True)
class Template:
    """The prompts of one relation, `[S]` where the subject stands, the object to follow the end."""

    cloze: str
    paraphrase: str


@dataclass(frozen=True)
class Fact:
    """One fact with one answer. `names` are all the names of its object, case folded."""

    subject: str
    object: str
    names: frozenset[str]


@dataclass(frozen=True)
class Counterfact:
    """A fact, its prompts, and the object it is to have instead."""

    subject: str
    prompt: str
    paraphrase: str
    ground_truth: str
    target_new: str


def text(value: Any, field: str) -> str:
    """`value`, if it is a text that says something and that a tokenizer can take.

    Raises:
        Unusable: otherwise, naming the field.
    """
    if not isinstance(value, str):
        raise Unusable(
            f"{field} is missing" if value is None else f"{field} is not text but {type(value).__name__}"
        )
    if not value.strip():
        raise Unusable(f"{field} is empty")
    if not value.isascii() and any(
        "\ud800" <= c <= "\udfff" for c in value
    ):  # half a surrogate pair: JSON can write it, no tokenizer reads it
        raise Unusable(f"{field} is not valid Unicode")
    return value


@cache
def templates() -> Mapping[str, Template]:
    """The prompts by relation, such as `P19`."""
    return MappingProxyType(
        {
            relation: Template(**prompts)
            for relation, prompts in yaml.safe_load(TEMPLATES.read_text(encoding="utf-8")).items()
        }
    )


def fact(record: Any) -> Fact:
    """A line of KAMEL's files, parsed: of `test.jsonl`, where an object has an id and other names, or of
    `train.jsonl`, where it is a text.

    Raises:
        Unusable: if it has several answers, or lacks something.
    """
    if not isinstance(record, dict):
        raise Unusable(f"the record is not an object but {type(record).__name__}")
    subject = text(record.get("sub_label"), "sub_label")
    label = _only(record.get("obj_label"), "obj_label")
    if isinstance(label, str):
        label = {"chosen": label, "alternative": []}
    else:
        _only(record.get("obj_uri"), "obj_uri")
    if not isinstance(label, dict):
        raise Unusable(f"obj_label is not a list of objects but of {type(label).__name__}")
    chosen, rdf, others = text(label.get("chosen"), "chosen"), label.get("rdf"), label.get("alternative")
    if not isinstance(others, list) or not all(isinstance(name, str) for name in others):
        raise Unusable("alternative is not a list of texts")
    names = (
        [chosen, *others] if rdf is None else [chosen, text(rdf, "rdf"), *others]
    )  # numbers and years have no rdf
    return Fact(subject, chosen, frozenset(name.strip().casefold() for name in names))


def _only(value: Any, field: str) -> Any:
    if not isinstance(value, list):
        raise Unusable(
            f"{field} is missing" if value is None else f"{field} is not a list but {type(value).__name__}"
        )
    if len(value) != 1:
        raise Unusable("the fact has several answers" if value else f"{field} is empty")
    return value[0]


def lengths(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> list[int]:
    """Tokens of each answer as it stands after its prompt, counted as
    `easyedit_mdm.editing.request.target_ids` does.
    """
    if not prompts:
        return []
    stripped = list(dict.fromkeys(prompt.rstrip() for prompt in prompts))
    before = dict(zip(stripped, tokenizer(stripped)["input_ids"]))
    both = tokenizer([f"{prompt.rstrip()} {answer.strip()}" for prompt, answer in zip(prompts, answers)])[
        "input_ids"
    ]
    counted = []
    for prompt, ids, answer in zip(prompts, both, answers):
        prompt_ids = before[prompt.rstrip()]
        if list(ids[: len(prompt_ids)]) == list(prompt_ids):
            counted.append(len(ids) - len(prompt_ids))
        else:  # the prompt's last tokens are others with the answer behind them
            counted.append(len(tokenizer(" " + answer.strip(), add_special_tokens=False)["input_ids"]))
    return counted


def counterfacts(
    records: Sequence[Any], template: Template, tokenizer: Any, seed: str
) -> list[Counterfact | Unusable]:
    """One result for every record of one relation: the edit, or why there is none.

    Args:
        records: the parsed lines of the relation's file.
        tokenizer: counts the tokens, so the targets belong to it.
        seed: fixes the draws; each record draws by itself.
    """
    results: list[Counterfact | Unusable] = []
    facts: dict[int, Fact] = {}
    for number, record in enumerate(records):
        try:
            facts[number] = fact(record)
            results.append(Unusable("no other object of the relation has as many tokens"))
        except Unusable as reason:
            results.append(reason)
    prompts = {number: template.cloze.replace("[S]", one.subject, 1) for number, one in facts.items()}
    for number, target in _targets(facts, prompts, tokenizer, seed).items():
        one = facts[number]
        results[number] = Counterfact(
            one.subject,
            prompts[number],
            template.paraphrase.replace("[S]", one.subject, 1),
            one.object,
            target,
        )
    return results


def _targets(facts: dict[int, Fact], prompts: dict[int, str], tokenizer: Any, seed: str) -> dict[int, str]:
    """A target for every fact that can have one."""
    own = dict(zip(facts, lengths(tokenizer, list(prompts.values()), [one.object for one in facts.values()])))
    waiting = _choices(facts, prompts, own, tokenizer)
    for number, others in waiting.items():
        random.Random(f"{seed}/{number}").shuffle(others)
    targets: dict[int, str] = {}
    while waiting := {
        number: others for number, others in waiting.items() if others and number not in targets
    }:
        tried = {number: others.pop() for number, others in waiting.items()}
        # the choices were measured after another subject's prompt: measured again after the fact's own
        measured = lengths(tokenizer, [prompts[number] for number in tried], list(tried.values()))
        targets |= {
            number: name for (number, name), length in zip(tried.items(), measured) if length == own[number]
        }
    return targets


def _choices(
    facts: dict[int, Fact], prompts: dict[int, str], own: dict[int, int], tokenizer: Any
) -> dict[int, list[str]]:
    """For every fact the objects as long as its own that share no name with what is true of its subject."""
    names: dict[str, frozenset[str]] = defaultdict(frozenset)
    true: dict[str, frozenset[str]] = defaultdict(frozenset)  # two lines can be about one subject
    for one in facts.values():
        names[one.object] |= one.names
    for one in facts.values():
        true[one.subject] |= names[one.object]
    by_length: dict[int, list[str]] = defaultdict(list)
    for name, length in zip(names, lengths(tokenizer, list(prompts.values())[:1] * len(names), list(names))):
        by_length[length].append(name)
    return {
        n: [name for name in by_length[own[n]] if own[n] and not names[name] & true[one.subject]]
        for n, one in facts.items()
    }
