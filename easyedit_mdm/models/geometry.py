"""Attention masks and positions: the only place that knows how a batch is padded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.models.attention import Attention


def visible(
    ids: Int[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"] | Bool[Tensor, "rows length"] | None,
) -> Int[Tensor, "rows length"]:
    """The attention mask as integers, all ones where none is given."""
    return (
        torch.ones_like(ids)
        if attention_mask is None
        else attention_mask.to(device=ids.device, dtype=torch.long)
    )


def positions(mask: Int[Tensor, "rows length"]) -> Int[Tensor, "rows length"]:
    """Positions counted from each row's first visible token, so that padding on the left moves nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def see_all(mask: Int[Tensor, "rows length"], dtype: torch.dtype) -> Float[Tensor, "rows 1 length length"]:
    """Additive mask under which every token sees every visible token.

    Finite minima instead of -inf: a row of padding must not turn into NaN. Float, not bool: older eager
    attention adds it.
    """
    blocked = (1 - mask)[:, None, None, :].to(dtype) * torch.finfo(dtype).min
    return blocked.expand(-1, 1, mask.shape[1], -1)


def see_left(mask: Int[Tensor, "rows length"], dtype: torch.dtype) -> Float[Tensor, "rows 1 length length"]:
    """Additive mask under which every token sees the visible tokens up to and with itself."""
    length = mask.shape[1]
    hidden = (
        torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
        | (mask == 0)[:, None, None, :]
    )
    return hidden.to(dtype) * torch.finfo(dtype).min


def canvas_of(
    ids: Int[Tensor, "rows length"], mask: Int[Tensor, "rows length"], slot: int
) -> Int[Tensor, " rows"]:
    """First column of each row's canvas where nobody says: its first hidden slot, or, where it has none, the
    end of the row.
    """
    hidden = (ids == slot) & mask.bool()
    return torch.where(hidden.any(-1), hidden.long().argmax(-1), ids.shape[1])


def in_canvas(mask: Int[Tensor, "rows length"], canvas: Int[Tensor, " rows"]) -> Bool[Tensor, "rows length"]:
    """Which columns stand in the canvas, given the first of each row's."""
    return torch.arange(mask.shape[1], device=mask.device) >= canvas.to(mask.device)[:, None]


def ranks(
    mask: Int[Tensor, "rows length"],
    attention: Attention,
    canvas: Int[Tensor, " rows"] | None = None,
    hidden: Bool[Tensor, "rows length"] | None = None,
) -> Int[Tensor, "rows length"]:
    """A number for each column: a token sees the visible tokens whose rank is at most its own.

    Full attention: 0 everywhere. Block-causal: the block's number. A causal context counts 0, 1, 2, ... and
    the blocks of the canvas go on from there. Where masks come last, known tokens are counted, and the hidden
    slots after them.

    Args:
        canvas: the first column of each row's canvas; needed where `attention.asks_for_canvas`.
        hidden: which columns are hidden slots; needed where `attention.asks_for_hidden`.
    """
    before = mask.cumsum(-1) - mask  # visible tokens on a column's left
    if attention.masks_last:
        unknown = mask * (torch.zeros_like(mask) if hidden is None else hidden.long())
        known = mask - unknown
        first = known.cumsum(-1) - known
        return torch.where(unknown.bool(), known.sum(-1, keepdim=True) + unknown.cumsum(-1) - unknown, first)
    prompt = torch.zeros_like(before[:, :1])
    inside = torch.zeros_like(mask, dtype=torch.bool)
    if canvas is not None:
        inside = in_canvas(mask, canvas)
        prompt = (mask * ~inside).sum(-1, keepdim=True)
    number, first = torch.zeros_like(before), torch.zeros_like(prompt)
    if attention.block is not None:
        origin = prompt if attention.edges == "canvas" else torch.zeros_like(prompt)
        number = (before - origin).div(attention.block, rounding_mode="floor")
        first = (prompt - origin).div(attention.block, rounding_mode="floor")
    return number if attention.context == "blocks" else torch.where(inside, prompt + number - first, before)


def see_ranked(
    mask: Int[Tensor, "rows length"], ranks: Int[Tensor, "rows length"], dtype: torch.dtype
) -> Float[Tensor, "rows 1 length length"]:
    """Additive mask under which a token sees every visible token of its own rank or a lower one; finite and
    float as in `see_all`.
    """
    hidden = (ranks[:, None, :] > ranks[:, :, None]) | (mask == 0)[:, None, :]
    return hidden[:, None].to(dtype) * torch.finfo(dtype).min


def sources(at: Int[Tensor, "rows slots"], mask: Int[Tensor, "rows length"]) -> Int[Tensor, "rows slots"]:
    """Where a shifted model predicts the tokens at `at`: one to the left, but never left of the row's first
    token.
    """
    first = mask.argmax(-1, keepdim=True)
    return torch.maximum(at - 1, first)


def gather_rows(
    values: Float[Tensor, "rows length width"], at: Int[Tensor, "rows slots"]
) -> Float[Tensor, "rows slots width"]:
    """`values[r, at[r, s]]`."""
    return values.gather(1, at.to(values.device)[:, :, None].expand(-1, -1, values.shape[-1]))


# tokens whose time one more pass costs: on a CPU, calling the operations; elsewhere, reading the weights
_PASS = {"cpu": 32}
_PASS_ELSEWHERE = 256


def similar(lengths: Sequence[int], most: int, device: torch.device | str = "cpu") -> Iterator[list[int]]:
    """Numbers of rows of similar length, the longest first, up to `most` at a time: passes over them take the
    least time, a pass costing what its tokens and its padding cost, and some more.

    Args:
        device: where the passes run.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    more = _PASS.get(torch.device(device).type, _PASS_ELSEWHERE)
    # where a pass may begin: at the first row of each length
    starts = [k for k, i in enumerate(order) if k == 0 or lengths[i] != lengths[order[k - 1]]]
    ends = [*starts[1:], len(order)]
    best: list[tuple[float, int]] = [(0.0, 0)]  # time up to a start, and the start before it
    for end in ends if order else ():
        best.append(
            min(
                (best[k][0] + (end - start) * lengths[order[start]] + more * -(-(end - start) // most), k)
                for k, start in enumerate(starts[: len(best)])
            )
        )
    cuts, k = [len(order)], len(best) - 1
    while k > 0:
        k = best[k][1]
        cuts.append(starts[k])
    for start, end in itertools.pairwise(reversed(cuts)):
        for first in range(start, end, most):
            yield order[first : min(first + most, end)]


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
