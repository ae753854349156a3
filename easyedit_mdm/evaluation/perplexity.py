"""Perplexity of held-out text, before and after editing: what an edit does to everything else.

For a masked model the pseudo-perplexity of Salazar et al. (arXiv 1910.14659): exp of the mean over tokens of
-log p(token | all others), each token masked in turn. For a causal model exp of the mean next-token loss. The
two are not comparable with each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from easyedit_mdm.errors import RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.prompts import encode


@torch.no_grad()
def perplexity(
    adapter: Adapter, texts: Sequence[str], max_tokens: int = 64, max_rows: int = 128
) -> dict[str, float | int]:
    """Perplexity of some texts, each cut to `max_tokens` tokens.

    Returns:
        `value`, and `n`, the number of tokens that were predicted (a causal model does not predict a text's
        first).

    Raises:
        RequestError: if there is nothing to predict.
    """
    rows = list(
        _rows(
            adapter,
            [torch.tensor(encode(adapter, text)[: min(max_tokens, adapter.max_positions)]) for text in texts],
        )
    )
    if not rows:
        raise RequestError("no text with a token to predict")
    total, count = 0.0, 0
    for start in range(0, len(rows), max_rows):
        part = rows[start : start + max_rows]
        ids, mask = right_padded([row for row, _, _ in part], adapter.ids.pad, adapter.device)
        most = max(len(at) for _, at, _ in part)
        at = torch.stack([torch.nn.functional.pad(at, (0, most - len(at))) for _, at, _ in part]).to(
            ids.device
        )
        right = torch.stack(
            [torch.nn.functional.pad(right, (0, most - len(right)), value=-1) for _, _, right in part]
        ).to(ids.device)
        canvas = torch.zeros_like(ids[:, 0]) if adapter.hidden.noise else None  # the whole text
        log_probs = adapter.token_logits(ids, mask, at=at, canvas=canvas).float().log_softmax(-1)
        own = log_probs.gather(-1, right.clamp(min=0).to(log_probs.device)[..., None])[..., 0]
        counted = (right >= 0).to(own.device)
        total -= float(own[counted].sum())
        count += int(counted.sum())
    return {"value": math.exp(total / count), "n": count}


def _rows(adapter: Adapter, texts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(row, positions that are read, right tokens there): a row for each token of a masked model's text, one
    a text for a causal one.
    """
    for ids in texts:
        if not adapter.denoises:
            if len(ids) > 1:
                yield ids, torch.arange(1, len(ids)), ids[1:]
            continue
        for i in range(len(ids)):
            row = ids.clone()
            row[i] = adapter.hidden.slots(1, i)[0]
            yield row, torch.tensor([i]), ids[i : i + 1]
