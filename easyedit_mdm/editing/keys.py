"""Keys: what enters the edited linear map at the subject's token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.rows import Fact
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.hooks import reading_input, reading_output


@dataclass(frozen=True)
class Keys:
    """Keys and values of one fact at the site, in float32.

    Attributes:
        keys: one a context prefix; the first is the bare prompt's.
        values: the site's output for each.
    """

    keys: Float[Tensor, "contexts inner"]
    values: Float[Tensor, "contexts width"]

    @property
    def mean(self) -> Float[Tensor, " inner"]:
        """k*: the mean over context prefixes."""
        return self.keys.mean(0)


@torch.no_grad()
def read_keys(adapter: Adapter, site: Site, fact: Fact) -> Keys:
    """Keys under the prompt followed, for a masked model, by one mask for each target token (the state with nothing revealed)."""
    n = len(fact.target)
    tail = torch.full((n,), adapter.ids.mask) if adapter.masked else fact.target
    rows = [torch.cat([p.ids, tail]) for p in fact.contexts]
    ids, mask = right_padded(rows, adapter.ids.pad, adapter.device)
    module = adapter.module(site.name)
    with reading_input(module) as inputs, reading_output(module) as outputs:
        adapter.hidden_before(site.layer + 1, ids, mask)
    index = torch.arange(len(rows))
    at = torch.tensor([p.site for p in fact.contexts])
    pick = [t[index.to(t.device), at.to(t.device)].float() for t in (inputs[0], outputs[0])]
    return Keys(*pick)
