"""What is to be edited: prompt, subject and target, checked and tokenised in context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from easyedit_mdm.errors import RequestError
from easyedit_mdm.models import Adapter


@dataclass(frozen=True)
class EditRequest:
    """One fact to write.

    Attributes:
        template: the prompt with `{}` where the subject stands.
        subject: the subject.
        target_new: what is to follow the prompt.
    """

    template: str
    subject: str
    target_new: str

    @classmethod
    def of(cls, request: EditRequest | Mapping[str, Any]) -> EditRequest:
        """From EasyEdit's request (`prompt`, `subject`, `target_new`); the prompt holds the subject, or `{}` in its place.

        Raises:
            RequestError: if a part is missing or empty, or the subject is not in the prompt.
        """
        if isinstance(request, EditRequest):
            return request
        values = {}
        for key in ("prompt", "subject", "target_new"):
            value = request.get(key)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"{key} is {value!r}: an edit needs a prompt, a subject and a target that are not empty")
            values[key] = value
        prompt, subject = values["prompt"], values["subject"]
        if "{}" not in prompt:
            if subject not in prompt:
                raise RequestError(f"subject {subject!r} is not in prompt {prompt!r}: the edit is made at the subject's token")
            prompt = prompt.replace(subject, "{}", 1)
        return cls(prompt, subject, values["target_new"])

    @property
    def prompt(self) -> str:
        """The prompt with its subject."""
        return self.template.replace("{}", self.subject, 1)


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and the position where the fact is read and written."""

    ids: Int[Tensor, " length"]
    site: int


def encode(adapter: Adapter, text: str) -> list[int]:
    """Token ids of a prompt, with whatever the tokenizer puts in front of every text (BOS or nothing).

    Raises:
        RequestError: if the model has no tokenizer.
    """
    if adapter.tokenizer is None:
        raise RequestError(f"{adapter.name} has no tokenizer: load it from a folder that has one, or pass tokenizer=")
    return list(adapter.tokenizer(text)["input_ids"])


def target_ids(adapter: Adapter, prompt: str, target: str) -> Int[Tensor, " tokens"]:
    """The target's tokens as they stand after the prompt, one space between them; the same ids edit and score.

    Where the prompt's own last tokens would change with the target behind them, the target is tokenised by itself.

    Raises:
        RequestError: if the target has no tokens.
    """
    before = encode(adapter, prompt.rstrip())
    both = encode(adapter, f"{prompt.rstrip()} {target.strip()}")
    ids = both[len(before) :] if both[: len(before)] == before else _alone(adapter, target)
    if not ids:
        raise RequestError(f"target {target!r} has no tokens after {prompt!r}")
    return torch.tensor(ids)


def _alone(adapter: Adapter, target: str) -> list[int]:
    return list(adapter.tokenizer(" " + target.strip(), add_special_tokens=False)["input_ids"])


def locate(adapter: Adapter, request: EditRequest, context: str = "{}", fact_token: str = "subject_last") -> Prompt:
    """Tokenise the prompt within a context prefix and find the token of the subject that `fact_token` names.

    Args:
        context: a template with one `{}` for the prompt.
        fact_token: `subject_last`, `subject_first`, `subject_first_after_last`, or `last` (of the prompt).

    Raises:
        RequestError: if the token does not exist.
    """
    text = context.replace("{}", request.prompt.rstrip(), 1)
    start = context.index("{}") + request.template.index("{}")
    ids, first, last = _span(adapter, text, start, start + len(request.subject))
    site = {"subject_last": last, "subject_first": first, "subject_first_after_last": last + 1, "last": len(ids) - 1}[fact_token]
    if site >= len(ids):
        raise RequestError(f"fact_token {fact_token!r} lies behind the end of {text!r}")
    return Prompt(torch.tensor(ids), site)


def _span(adapter: Adapter, text: str, start: int, end: int) -> tuple[list[int], int, int]:
    """Token ids of `text`, and the first and last token that overlap characters start..end-1."""
    tok = adapter.tokenizer
    if tok is None:
        encode(adapter, text)
    if getattr(tok, "is_fast", False):
        encoded = tok(text, return_offsets_mapping=True)
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start and b > a and text[a:b].strip()]
        if inside:
            return list(encoded["input_ids"]), inside[0], inside[-1]
    ids = encode(adapter, text)
    return ids, len(encode(adapter, text[:start].rstrip())) if text[:start].strip() else 0, len(encode(adapter, text[:end])) - 1


def anchor(request: EditRequest) -> EditRequest:
    """The KL anchor of ROME: "{subject} is a"."""
    return EditRequest("{} is a", request.subject, request.target_new)
