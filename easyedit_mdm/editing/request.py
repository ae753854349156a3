"""What is to be edited: prompt, subject and target, checked and tokenised in context."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from easyedit_mdm.common.requests import EditRequest
from easyedit_mdm.errors import RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import Prompt, encode, span, target_ids

__all__ = ["EditRequest", "Prompt", "anchor", "check_requests", "encode", "locate", "target_ids"]


def locate(
    adapter: Adapter, request: EditRequest, context: str = "{}", fact_token: str = "subject_last"
) -> Prompt:
    """Tokenise the prompt within a context prefix and find the token of the subject that `fact_token` names.

    Args:
        context: a template with one `{}` for the prompt.
        fact_token: `subject_last`, `subject_first`, `subject_first_after_last`, or `last` (of the prompt).

    Raises:
        RequestError: if the token does not exist.
    """
    text = context.replace("{}", request.prompt.rstrip(), 1)
    start = context.index("{}") + request.template.index("{}")
    ids, first, last = span(adapter, text, start, start + len(request.subject))
    at = {
        "subject_last": last,
        "subject_first": first,
        "subject_first_after_last": last + 1,
        "last": len(ids) - 1,
    }[fact_token]
    if at >= len(ids):
        raise RequestError(f"fact_token {fact_token!r} lies behind the end of {text!r}")
    return Prompt(torch.tensor(ids), at)


def anchor(request: EditRequest) -> EditRequest:
    """The KL anchor of ROME: "{subject} is a"."""
    return EditRequest("{} is a", request.subject, request.target_new)


def check_requests(requests: Sequence[EditRequest]) -> None:
    """A batch is one system of equations: two requests for the same subject and prompt cannot both be in it.

    Raises:
        RequestError: naming both targets, or for an empty batch.
    """
    if not requests:
        raise RequestError("no requests: a batch needs at least one")
    seen: dict[tuple[str, str], str] = {}
    for request in requests:
        key = (" ".join(request.template.lower().split()), request.subject.strip())
        target = request.target_new.strip()
        if key in seen:
            what = "twice" if seen[key] == target else f"with two targets, {seen[key]!r} and {target!r},"
            raise RequestError(
                f"{request.prompt!r} stands {what} in one batch: keep one of them, or edit them one after"
                " another"
            )
        seen[key] = target
