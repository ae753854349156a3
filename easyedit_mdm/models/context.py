"""Tokens that stand before every row: what an in-context edit puts there (`editing.edit.attached.Context`).

They are kept with the transformers model, so that two adapters of one model, and a copy of it, agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

_CONTEXT = "_easyedit_mdm_context"


def context_of(native: nn.Module) -> Int[Tensor, " tokens"] | None:
    """The tokens that stand before every row of a model, or None."""
    return native.__dict__.get(_CONTEXT)


def put_context(native: nn.Module, ids: Int[Tensor, " tokens"] | None) -> None:
    """Put tokens before every row from now on; None: none."""
    if ids is None:
        native.__dict__.pop(_CONTEXT, None)
    else:
        native.__dict__[_CONTEXT] = ids


@contextmanager
def without_context(native: nn.Module) -> Iterator[None]:
    """No tokens stand before the rows inside the block."""
    ids = context_of(native)
    put_context(native, None)
    try:
        yield
    finally:
        put_context(native, ids)


def behind_context(
    ids: Int[Tensor, " tokens"], rows: Int[Tensor, "rows length"], mask: Int[Tensor, "rows length"]
) -> tuple[Int[Tensor, "rows longer"], Int[Tensor, "rows longer"]]:
    """Rows and their mask with the tokens between what a row has of padding on the left and the row."""
    count = len(ids)
    before = ids.to(rows).expand(len(rows), -1)
    longer = torch.cat([before, rows], dim=1)
    seen = torch.cat([torch.ones_like(before).to(mask), mask], dim=1)
    padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    column = torch.arange(longer.shape[1], device=rows.device).expand_as(longer)
    inside = torch.where(column < padding + count, column - padding, column)
    source = torch.where(column < padding, column + count, inside)
    return longer.gather(1, source), seen.gather(1, source)
