"""What is to be edited, in words: prompt, subject and target. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easyedit_mdm.errors import RequestError


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
        """From EasyEdit's request (`prompt`, `subject`, `target_new`); the prompt holds the subject, or `{}`
        in its place.

        Raises:
            RequestError: if a part is missing or empty, or the subject is not in the prompt.
        """
        if isinstance(request, EditRequest):
            return request
        values = {}
        for key in ("prompt", "subject", "target_new"):
            value = request.get(key)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(
                    f"{key} is {value!r}: an edit needs a prompt, a subject and a target that are not empty"
                )
            values[key] = value
        prompt, subject = values["prompt"], values["subject"]
        if "{}" not in prompt:
            if subject not in prompt:
                raise RequestError(
                    f"subject {subject!r} is not in prompt {prompt!r}: write it as the prompt has it"
                    " ({} stands for it)"
                )
            prompt = prompt.replace(subject, "{}", 1)
        return cls(prompt, subject, values["target_new"])

    @property
    def prompt(self) -> str:
        """The prompt with its subject."""
        return self.template.replace("{}", self.subject, 1)
