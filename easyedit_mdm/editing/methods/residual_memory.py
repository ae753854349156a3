"""A residual memory in the style of TimeROME-DLM (arXiv 2606.12841), for both paradigms: no weight changes.

With keys K (a row a fact, or a state of one) and residuals R of all facts that the model carries,

    W = K^T (K K^T + ridge I)^-1 R,    output(x) += alpha top_q(x W)

at the site, at every forward pass; top_q keeps the share q of the entries that are largest by magnitude. With
top_q = 1 it is a change of the site's weight by alpha W^T.

The paper's code is not public. What it leaves open is chosen here: the site is the MLP's down-projection, so
that x is what enters it; a fact's residual is the optimised delta of `easyedit_mdm.editing.solve.value`,
where the paper speaks of a residual that needs no gradient; the layer is set by hand, with the temporal trace
(docs/tracing.md) as its guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.edit.attached import ResidualMemory
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest, check_requests
from easyedit_mdm.editing.solve.card import card
from easyedit_mdm.editing.solve.keys import key_columns
from easyedit_mdm.editing.solve.rank_one import site_values
from easyedit_mdm.editing.solve.sites import check_modules, one_map
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.models import Adapter


@dataclass
class ResidualMemoryHyperParams(ROMEMDMHyperParams):
    """TimeROME-style's hyperparameters: those of ROME_MDM that find keys and values, and

    Attributes:
        ridge: of the memory's system, in the units of |k|^2.
        alpha: what the recalled residual is multiplied by.
        top_q: share of the recalled entries that are added; 1: all.
        batch_size: requests a batch, for EasyEdit's `batch_edit`.
    """

    ridge: int | float = 1e-4
    alpha: int | float = 1.0
    top_q: int | float = 1.0
    batch_size: int = 1

    ALG_NAME: ClassVar[str] = "TimeROME-style"
    KEY_STATES: ClassVar[tuple[str, ...]] = ("full_mask", "average", "per_state")

    def validate(self) -> None:
        """As `ROMEMDMHyperParams.validate`."""
        super().validate()
        self.check_numbers(ridge=0, alpha=0, top_q=0)
        self.check_numbers(batch_size=1, whole=True)
        if not 0 < self.top_q <= 1:
            raise HyperParameterError(f"top_q={self.top_q!r} must lie above 0 and be at most 1")
        if self.mom2_adjustment:
            raise HyperParameterError(
                "mom2_adjustment is on: TimeROME-style solves with the facts' own keys and uses no second"
                " moments; turn it off"
            )


def residual_memory(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: ResidualMemoryHyperParams,
    values: Sequence[Optimised] | None = None,
) -> Edit:
    """Make (not apply) one edit of all requests.

    Args:
        values: the requests', where they have been optimised already.

    Raises:
        RequestError: for a request that cannot be carried out.
        HyperParameterError: at the experts of a mixture, which share no input.
        OptimisationError: if the optimisation breaks down.
    """
    check_requests(requests)
    check_modules(adapter, hparams)
    site = one_map(adapter, hparams)
    outcomes = list(values or site_values(adapter, requests, hparams))
    facts = [tokenise(adapter, request, hparams) for request in requests]
    columns = key_columns(adapter, site, facts, hparams)
    deltas = torch.stack([outcome.delta for outcome in outcomes]).float().cpu()
    memory = ResidualMemory(
        site.name,
        {"keys": columns.keys.T.float().cpu().contiguous(), "residuals": deltas[columns.fact.cpu()]},
        {"ridge": float(hparams.ridge), "alpha": float(hparams.alpha), "top_q": float(hparams.top_q)},
    )
    return Edit([], card(requests, facts, hparams, outcomes, {}), [memory])


METHODS.register("TimeROME-style")(
    Method(
        "TimeROME-style",
        ResidualMemoryHyperParams,
        residual_memory,
        site_values,
        stands_for="ROME",
        batchable=True,
    )
)
