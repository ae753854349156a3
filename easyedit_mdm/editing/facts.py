"""A fact as a model sees it: the request's tokens in every context prefix, and where the edit is made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from easyedit_mdm.editing.context import prefixes_of
from easyedit_mdm.editing.hparams import StateHyperParams
from easyedit_mdm.editing.request import EditRequest, Prompt, anchor, locate, target_ids
from easyedit_mdm.errors import RequestError
from easyedit_mdm.models import Adapter


@dataclass(frozen=True)
class Fact:
    """A request, tokenised.

    Attributes:
        contexts: the prompt in each context prefix; the first is bare.
        target: the target's tokens.
        anchor: the KL anchor.
    """

    contexts: list[Prompt]
    target: Int[Tensor, " slots"]
    anchor: Prompt


def tokenise(adapter: Adapter, request: EditRequest, hparams: StateHyperParams) -> Fact:
    """Tokenise a request in every context prefix. A method that has no `fact_token` gets the subject's last.

    Raises:
        RequestError: if the longest row exceeds the model's positions, or the target the metric's canvas.
    """
    templates = prefixes_of(adapter, hparams)
    if "{}" not in templates[:1]:
        templates = ["{}", *templates]
    target = target_ids(adapter, request.prompt, request.target_new)
    where = getattr(hparams, "fact_token", "subject_last")
    contexts = [locate(adapter, request, c, where) for c in templates]
    canvas = hparams.decode_config().canvas
    if canvas is not None and len(target) > canvas:
        raise RequestError(
            f"target {request.target_new!r} has {len(target)} tokens, more than the canvas of {canvas} "
            "masks (decode.canvas)"
        )
    slots = len(target)
    if hparams.open_canvas:  # of an autoregressive model's row nothing behind the end is needed
        slots = max(hparams.open_canvas if adapter.denoises else 0, slots + 1)
    longest = max(len(p.ids) for p in contexts) + slots
    if longest > adapter.max_positions:
        more = f" and an open canvas of {slots} slots" if hparams.open_canvas else ""
        raise RequestError(
            f"prompt and target {request.target_new!r} take {longest} tokens with the longest context "
            f"prefix{more}; {adapter.name} has {adapter.max_positions} positions"
        )
    where = "subject_last" if where == "last" else where
    return Fact(contexts, target, locate(adapter, anchor(request), "{}", where))


def fact_generator(fact: Fact, seed: int) -> torch.Generator:
    """The random numbers of one fact: the same whatever other facts it is edited with."""
    digest = hashlib.sha256(
        repr((seed, fact.contexts[0].ids.tolist(), fact.target.tolist())).encode()
    ).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
