"""Facts to trace: read from files, found in a prompt's tokens, and checked: only what a model knows can be
traced in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from easyedit_mdm.denoising import decode
from easyedit_mdm.errors import DataError, RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import encode, span, target_ids

# where in a row a token stands; a subject of one token is its last, and a subject that ends the prompt stays
# the subject
CLASSES = {
    "before": "before the subject",
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "further": "further tokens",
    "last": "last token",
    "slots": "answer's slots",
}
BATCH = 64


@dataclass(frozen=True)
class TracedFact:
    """A prompt with its subject in it, and the answer that follows."""

    prompt: str
    subject: str
    answer: str

    def parts(self) -> tuple[str, int]:
        """The prompt's text, and where the subject begins in it.

        Raises:
            RequestError: if a part is empty, or the subject is not in the prompt.
        """
        for name, text in vars(self).items():
            if not text.strip():
                raise RequestError(
                    f"{name} is {text!r}: a fact has a prompt, a subject and an answer that are not empty"
                )
        start = self.prompt.find("{}" if "{}" in self.prompt else self.subject)
        if start < 0:
            raise RequestError(
                f"subject {self.subject!r} is not in prompt {self.prompt!r}: it is the subject that is"
                " corrupted"
            )
        return self.prompt.replace("{}", self.subject, 1).rstrip(), start


@dataclass(frozen=True)
class Placed:
    """A fact as tokens of one model.

    Attributes:
        ids: the prompt.
        first, end: the subject's tokens are first..end-1.
        answer: the answer's tokens as they stand after the prompt.
    """

    fact: TracedFact
    ids: Int[Tensor, " prompt"]
    first: int
    end: int
    answer: Int[Tensor, " slots"]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.ids) + len(self.answer)

    def classes(self, slots: int) -> list[str]:
        """The class (a key of `CLASSES`) of every token of the prompt and of the first `slots` slots."""
        names = (
            ["before"] * self.first
            + ["subject_middle"] * (self.end - self.first)
            + ["further"] * (len(self.ids) - self.end)
            + ["slots"] * slots
        )
        names[self.first] = "subject_first"
        names[self.end - 1] = "subject_last"
        if self.end < len(self.ids):
            names[len(self.ids) - 1] = "last"
        return names


def place(adapter: Adapter, fact: TracedFact) -> Placed:
    """Tokenise a fact, and find its subject.

    Raises:
        RequestError: if the subject is not in the prompt, or prompt and answer do not fit into the model.
    """
    text, start = fact.parts()
    ids, first, last = span(adapter, text, start, start + len(fact.subject))
    placed = Placed(fact, torch.tensor(ids), first, last + 1, target_ids(adapter, text, fact.answer))
    if placed.length > adapter.max_positions:
        raise RequestError(
            f"{fact.prompt!r} and {fact.answer!r} take {placed.length} tokens; {adapter.name} has"
            f" {adapter.max_positions} positions"
        )
    return placed


@dataclass
class Checked:
    """Which facts every one of some models knows.

    Attributes:
        facts: those that all know, in the order they were asked.
        asked: how many were asked before enough were known.
        known: how many of them each model knows, by its name.
        unknown: `{"prompt", "answer", "written": {model: text}}` of each fact that some model does not know.
        unusable: `{"prompt", "reason"}` of each fact that cannot be asked.
    """

    facts: list[TracedFact] = field(default_factory=list)
    asked: int = 0
    known: dict[str, int] = field(default_factory=dict)
    unknown: list[dict[str, Any]] = field(default_factory=list)
    unusable: list[dict[str, str]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As it goes into records; the facts themselves stand with their traces."""
        return {
            "asked": self.asked,
            "known": self.known,
            "known_by_all": len(self.facts),
            "unknown": self.unknown,
            "unusable": self.unusable,
        }


def check_known(
    adapters: Sequence[Adapter], facts: Sequence[TracedFact], limit: int | None = None, progress: bool = True
) -> Checked:
    """Ask facts until `limit` are known to all models: written exactly, over as many slots as the answer has
    tokens, greedily.

    Args:
        adapters: models of different names.
        limit: how many known facts are wanted; None asks all.

    Raises:
        DataError: if none is known, naming some and what was written instead.
    """
    if not facts:
        raise DataError(
            "there are no facts to trace: each needs a prompt, its subject and the answer as it is"
            " (ground_truth)"
        )
    checked = Checked(known={adapter.name: 0 for adapter in adapters})
    bar = tqdm(total=len(facts), desc="asking what is known", unit="fact", disable=not progress, leave=False)
    with bar:
        for start in range(0, len(facts), BATCH):
            for fact, written in _ask(adapters, facts[start : start + BATCH], checked):
                if limit is not None and len(checked.facts) == limit:
                    break
                _note(checked, fact, written)
                bar.update()
            if limit is not None and len(checked.facts) == limit:
                break
    if not checked.facts:
        examples = [
            f"{u['prompt']!r} gives {u['written']}, not {u['answer']!r}" for u in checked.unknown[:3]
        ] + [u["reason"] for u in checked.unusable[:3]]
        reasons = "; ".join(examples)
        raise DataError(
            f"none of {len(facts)} facts is known, so there is nothing to trace: {reasons}. Give facts"
            " (--known) that the model writes itself"
        )
    return checked


def _ask(
    adapters: Sequence[Adapter], facts: Sequence[TracedFact], checked: Checked
) -> list[tuple[TracedFact, dict[str, tuple[bool, str]]]]:
    """What each model writes after each fact that it can be asked: whether it is right, and the text."""
    usable: list[tuple[TracedFact, list[Placed]]] = []
    for fact in facts:
        try:
            usable.append((fact, [place(adapter, fact) for adapter in adapters]))
        except RequestError as reason:
            checked.unusable.append({"prompt": fact.prompt, "reason": str(reason)})
    written: list[dict[str, tuple[bool, str]]] = [{} for _ in usable]
    for i, adapter in enumerate(adapters):
        asked = [places[i] for _, places in usable]
        paths = decode(adapter, [p.ids for p in asked], [len(p.answer) for p in asked]) if asked else []
        for into, placed, path in zip(written, asked, paths):
            text = adapter.tokenizer.decode(path.tokens.tolist(), skip_special_tokens=True).strip()
            into[adapter.name] = (bool(torch.equal(path.tokens[: len(placed.answer)], placed.answer)), text)
    return [(fact, texts) for (fact, _), texts in zip(usable, written)]


def _note(checked: Checked, fact: TracedFact, written: dict[str, tuple[bool, str]]) -> None:
    checked.asked += 1
    for name, (right, _) in written.items():
        checked.known[name] += right
    if all(right for right, _ in written.values()):
        checked.facts.append(fact)
    else:
        wrong = {name: text for name, (right, text) in written.items() if not right}
        checked.unknown.append({"prompt": fact.prompt, "answer": fact.answer, "written": wrong})


def own_answer(adapter: Adapter, prompt: str, tokens: int = 1) -> str:
    """What the model itself writes over `tokens` slots after the prompt, greedily: the answer where none was
    given.

    Raises:
        RequestError: if that is no text.
    """
    path = decode(adapter, [torch.tensor(encode(adapter, prompt.rstrip()))], [tokens])[0]
    text = adapter.tokenizer.decode(path.tokens.tolist(), skip_special_tokens=True).strip()
    if not text:
        raise RequestError(
            f"after {prompt!r} {adapter.name} writes nothing that could be traced: give the answer with"
            " --target"
        )
    return text


def read_facts(file: str | Path) -> tuple[list[TracedFact], list[dict[str, Any]]]:
    """Facts of a JSON list, and the records that hold none, each with its place in the file and the reason.

    A record is ROME's known_1000 (`prompt`, `subject`, `attribute`), EasyEdit's request (`prompt`, `subject`,
    `ground_truth`: the answer that is true, not `target_new`), or ROME's CounterFact (`requested_rewrite`
    with `target_true`).

    Raises:
        DataError: if the file cannot be read, is not a JSON list, or holds no fact.
    """
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read as JSON ({error}): give a list of facts, as ROME's known_1000.json"
        ) from error
    if not isinstance(records, list):
        raise DataError(
            f"{file} holds {type(records).__name__}, not a list of facts: give a file as ROME's"
            " known_1000.json"
        )
    facts, skipped = [], []
    for number, record in enumerate(records):
        try:
            facts.append(_fact_of(record))
        except RequestError as reason:
            skipped.append({"record": number, "reason": str(reason)})
    if not facts:
        raise DataError(
            f"{file} has no fact among {len(records)} records; the first:"
            f" {skipped[0]['reason'] if skipped else 'the list is empty'}"
        )
    return facts, skipped


def _fact_of(record: Any) -> TracedFact:
    if not isinstance(record, dict):
        raise RequestError(
            f"the record is {type(record).__name__}, not an object with prompt, subject and attribute"
        )
    inner = record.get("requested_rewrite")
    part = inner if isinstance(inner, dict) else record
    true = part.get("target_true")
    given = next((part[key] for key in ("attribute", "ground_truth", "target_true") if key in part), None)
    answer = true.get("str") if isinstance(true, dict) else given
    answer = answer[0] if isinstance(answer, list) and answer else answer
    texts = {
        "prompt": part.get("prompt"),
        "subject": part.get("subject"),
        "attribute (or ground_truth)": answer,
    }
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise RequestError(
                f"{name} is {value!r}: a fact to trace needs prompt, subject and the answer that is true"
            )
    prompt, subject, answer = (str(value).strip() for value in texts.values())
    fact = TracedFact(prompt.replace("{}", subject, 1), subject, answer)
    fact.parts()  # says what is wrong with it
    return fact
