"""What a causal model makes of the columns before an edit, which nothing that stands later can change: computed once, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.models import geometry
from easyedit_mdm.models.adapter import Adapter


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first `columns` columns of some rows, in every layer from `layer` up.

    Attributes:
        keys, values: layers (from `layer`) x rows x heads x columns x head size.
    """

    layer: int
    columns: int
    keys: list[Float[Tensor, "rows heads columns size"]]
    values: list[Float[Tensor, "rows heads columns size"]]

    def take(self, index: Tensor) -> Prefix:
        """That of some of the rows."""
        return Prefix(self.layer, self.columns, [k[index.to(k.device)] for k in self.keys], [v[index.to(v.device)] for v in self.values])


def can_keep(adapter: Adapter) -> bool:
    """Whether an adapter's model takes keys and values of earlier columns from this module."""
    return not adapter.masked and not adapter.spec.absolute_positions


@torch.no_grad()
def read_prefix(adapter: Adapter, layer: int, hidden: Float[Tensor, "rows columns width"], mask: Int[Tensor, "rows length"]) -> Prefix:
    """Run the layers from `layer` up on the first columns, given their residual stream there.

    Args:
        mask: of the whole rows, padded on the left as far as these columns go.
    """
    from transformers import DynamicCache

    cache, columns = DynamicCache(), hidden.shape[1]
    stack = adapter._stack(layer, adapter.layers, entered=True)
    stack(
        inputs_embeds=hidden, attention_mask=mask[:, :columns], position_ids=geometry.positions(mask)[:, :columns], past_key_values=cache,
        use_cache=True, return_dict=True,
    )  # fmt: skip
    pairs = [_pair(cache, i) for i in range(layer, adapter.layers)]
    return Prefix(layer, columns, [k for k, _ in pairs], [v for _, v in pairs])


def logits_after(
    adapter: Adapter, prefix: Prefix, hidden: Float[Tensor, "rows rest width"], mask: Int[Tensor, "rows length"], at: Int[Tensor, "rows slots"]
) -> Float[Tensor, "rows slots vocab"]:
    """`token_logits` at columns `at` of rows whose first columns are kept in `prefix`; `hidden` enters layer `prefix.layer` in the others."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(prefix.layer):  # the length of what came before is read off layer 0, which does not run
        nothing = hidden.new_zeros(1, 1, prefix.columns, 1)
        cache.update(nothing, nothing, i)
    for i, (keys, values) in enumerate(zip(prefix.keys, prefix.values), start=prefix.layer):
        cache.update(keys, values, i)
    stack = adapter._stack(prefix.layer, adapter.layers, entered=True)
    states = stack(
        inputs_embeds=hidden, attention_mask=mask, position_ids=geometry.positions(mask)[:, prefix.columns :], past_key_values=cache, use_cache=True,
        return_dict=True,
    )[0]  # fmt: skip
    where = geometry.sources(at, mask) - prefix.columns
    return adapter.module(adapter.spec.paths.head)(geometry.gather_rows(states, where)).to(mask.device)


def _pair(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]  # transformers before 4.56
