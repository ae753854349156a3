"""The causal mask that EasyEdit's UnKE asks transformers for, and that transformers 5.24 no longer has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def causal_attention_mask(
    attention_mask: Shaped[Tensor, "batch key"] | None,
    input_shape: Sequence[int],
    inputs_embeds: Float[Tensor, "batch query hidden"],
    past_key_values_length: int,
) -> Float[Tensor, "batch 1 query key"]:
    """An additive mask: 0 where a query may look, the dtype's least number elsewhere.

    A query sees the keys up to its own place, and no padding.

    Args:
        attention_mask: 1 for a token and 0 for padding, over past and present keys; `None` means no padding.
        input_shape: batch and number of queries.
        inputs_embeds: gives dtype and device.
        past_key_values_length: how many keys lie before the first query.
    """
    batch, queries = input_shape
    keys = queries + past_key_values_length
    key = torch.arange(keys, device=inputs_embeds.device)
    seen = (key <= key[past_key_values_length:, None]).expand(batch, 1, queries, keys)
    if attention_mask is not None:
        seen = seen & (attention_mask[:, None, None, :] != 0).to(seen.device)
    hidden = torch.finfo(inputs_embeds.dtype).min
    return torch.zeros(seen.shape, dtype=inputs_embeds.dtype, device=seen.device).masked_fill(~seen, hidden)
