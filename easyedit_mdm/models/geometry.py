"""Attention masks and positions: the only place that knows how a batch is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def visible(
    ids: Int[Tensor, "rows length"], attention_mask: Int[Tensor, "rows length"] | Bool[Tensor, "rows length"] | None
) -> Int[Tensor, "rows length"]:
    """The attention mask as integers, all ones where none is given."""
    return torch.ones_like(ids) if attention_mask is None else attention_mask.to(device=ids.device, dtype=torch.long)


def positions(mask: Int[Tensor, "rows length"]) -> Int[Tensor, "rows length"]:
    """Positions counted from each row's first visible token, so that padding on the left moves nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def see_all(mask: Int[Tensor, "rows length"], dtype: torch.dtype) -> Float[Tensor, "rows 1 length length"]:
    """Additive mask under which every token sees every visible token.

    Finite minima instead of -inf: a row of padding must not turn into NaN. Float, not bool: older eager attention adds it.
    """
    blocked = (1 - mask)[:, None, None, :].to(dtype) * torch.finfo(dtype).min
    return blocked.expand(-1, 1, mask.shape[1], -1)


def see_left(mask: Int[Tensor, "rows length"], dtype: torch.dtype) -> Float[Tensor, "rows 1 length length"]:
    """Additive mask under which every token sees the visible tokens up to and with itself."""
    length = mask.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1) | (mask == 0)[:, None, None, :]
    return hidden.to(dtype) * torch.finfo(dtype).min


def sources(at: Int[Tensor, "rows slots"], mask: Int[Tensor, "rows length"]) -> Int[Tensor, "rows slots"]:
    """Where a shifted model predicts the tokens at `at`: one to the left, but never left of the row's first token."""
    first = mask.argmax(-1, keepdim=True)
    return torch.maximum(at - 1, first)


def gather_rows(values: Float[Tensor, "rows length width"], at: Int[Tensor, "rows slots"]) -> Float[Tensor, "rows slots width"]:
    """`values[r, at[r, s]]`."""
    return values.gather(1, at.to(values.device)[:, :, None].expand(-1, -1, values.shape[-1]))


_WORTH_A_PASS = 32


def similar(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of rows of similar length, the longest first, up to `most` at a time: little of a pass is padding."""
    order, start = sorted(range(len(lengths)), key=lambda i: -lengths[i]), 0
    for end in range(1, len(order) + 1):
        # fewer rows than these are not worth a pass of their own
        shorter = end < len(order) and end - start >= _WORTH_A_PASS and lengths[order[end]] < 0.8 * lengths[order[start]]
        if end == len(order) or end - start == most or shorter:
            yield order[start:end]
            start = end


def right_padded(
    rows: list[Int[Tensor, " _"]], pad: int, device: torch.device | str
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
    """Stack rows of unequal length: ids filled up with `pad` on the right, and the attention mask."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
