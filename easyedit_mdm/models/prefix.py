"""What a causal model makes of the columns before an edit, which nothing that stands later can change:
computed once, and kept.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        return Prefix(
            self.layer,
            self.columns,
            [k[index.to(k.device)] for k in self.keys],
            [v[index.to(v.device)] for v in self.values],
        )


def can_keep(adapter: Adapter) -> bool:
    """Whether an adapter's model takes keys and values of earlier columns from this module."""
    return not adapter.denoises and not adapter.spec.absolute_positions


@torch.no_grad()
def read_prefix(
    adapter: Adapter,
    layer: int,
    hidden: Float[Tensor, "rows columns width"],
    mask: Int[Tensor, "rows length"],
) -> Prefix:
    """Run the layers from `layer` up on the first columns, given their residual stream there.

    Args:
        mask: of the whole rows, padded on the left as far as these columns go.
    """
    columns = hidden.shape[1]
    attention = adapter.sight(mask)[:, :, :columns, :columns]
    layers = range(layer, adapter.layers)
    pairs = adapter.stack.keys_and_values(hidden, layers, attention, geometry.positions(mask)[:, :columns])
    return Prefix(layer, columns, [pairs[i][0] for i in layers], [pairs[i][1] for i in layers])


def logits_after(
    adapter: Adapter,
    prefix: Prefix,
    hidden: Float[Tensor, "rows rest width"],
    mask: Int[Tensor, "rows length"],
    at: Int[Tensor, "rows slots"],
) -> Float[Tensor, "rows slots vocab"]:
    """`token_logits` at columns `at` of rows whose first columns are kept in `prefix`; `hidden` enters layer
    `prefix.layer` in the others.
    """
    layers = range(prefix.layer, adapter.layers)
    earlier = {i: pair for i, pair in zip(layers, zip(prefix.keys, prefix.values))}
    attention = adapter.sight(mask)[:, :, prefix.columns :]
    states = adapter.stack.run_after(
        earlier, hidden, layers, attention, geometry.positions(mask)[:, prefix.columns :]
    )
    where = geometry.sources(at, mask) - prefix.columns
    normed = adapter.stack.normed(geometry.gather_rows(states, where))
    return adapter.stack.logits(normed).to(mask.device)
