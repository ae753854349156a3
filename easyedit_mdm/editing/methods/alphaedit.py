"""AlphaEdit for both paradigms (Fang et al., arXiv 2410.02355): MEMIT's update, kept out of what the layer's
keys span.

With U an orthonormal basis of the directions in which C has (nearly) no energy, P = U U^T, K_0 the keys of
the edits that the model carries already, and ridge L2,

    dW = R K^T P (K K^T P + K_0 K_0^T P + L2 I)^-1          (equation 14)
       = R B^T (L2 I + B_all B_all^T)^-1 U^T,    B = U^T K,    B_all = U^T [K, K_0].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.history import History
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.batch import (
    BatchHyperParams,
    ClosedForm,
    System,
    block_values,
    edit_batch,
    pivots,
    remembered,
)
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.errors import HyperParameterError, StatisticsError
from easyedit_mdm.models import Adapter
from easyedit_mdm.statistics import SecondMoments


@dataclass
class AlphaEditMDMHyperParams(BatchHyperParams):
    """AlphaEdit_MDM's hyperparameters: see `BatchHyperParams`; `mom2_update_weight` and `mom2_eps` have no
    part in it.

    Attributes:
        nullspace_threshold: eigenvalues of C below it belong to the null space.
        nullspace_scale: `absolute`, as in EasyEdit, or `relative` to the largest eigenvalue.
        L2: ridge of the solution.
    """

    nullspace_threshold: int | float = 2e-2
    nullspace_scale: str = "absolute"
    L2: int | float = 1.0
    mom2_eps: float = 0.0
    mom2_update_weight: int | float = 0

    ALG_NAME: ClassVar[str] = "AlphaEdit_MDM"

    def validate(self) -> None:
        """As `BatchHyperParams.validate`."""
        super().validate()
        if self.nullspace_scale not in ("absolute", "relative"):
            raise HyperParameterError(
                f"nullspace_scale={self.nullspace_scale!r} is not one of absolute, relative"
            )
        self.check_numbers(nullspace_threshold=0, L2=0)
        for name in ("mom2_eps", "mom2_update_weight"):
            if getattr(self, name):
                raise HyperParameterError(
                    f"{name}={getattr(self, name)!r}: AlphaEdit_MDM does not use it; nullspace_threshold and"
                    " L2 take its place"
                )


def null_space(moments: SecondMoments, threshold: int | float, scale: str) -> Float[Tensor, "inner free"]:
    """An orthonormal basis of the directions whose eigenvalue lies below the threshold.

    Raises:
        StatisticsError: if there is none.
    """
    values, vectors = moments.spectrum
    limit = threshold * float(values[-1]) if scale == "relative" else threshold
    free = vectors[:, values < limit]
    if not free.shape[1]:
        raise StatisticsError(
            f"no eigenvalue of {len(values)} lies below {limit:.3g} (the smallest is {float(values[0]):.3g},"
            f" the largest {float(values[-1]):.3g}): the null space is empty; raise nullspace_threshold, or"
            " use nullspace_scale: relative"
        )
    return free


def projected(hparams: AlphaEditMDMHyperParams, carried: dict[str, Tensor] | None = None) -> ClosedForm:
    """The closed form, for a model that carries edits with some keys already, by site."""
    earlier = carried or {}

    def closed_form(system: System) -> tuple[Float[Tensor, "width columns"], Float[Tensor, "columns inner"]]:
        """R and the rest."""
        basis = null_space(system.moments, hparams.nullspace_threshold, hparams.nullspace_scale).to(
            system.keys.device
        )
        known = earlier.get(system.site.name)
        own = basis.T @ system.keys
        every = own if known is None else torch.cat([own, basis.T @ known.to(own)], dim=1)
        matrix = every @ every.T + hparams.L2 * torch.eye(len(every), dtype=own.dtype, device=own.device)
        factor, wrong = torch.linalg.cholesky_ex(matrix)
        if int(wrong):
            raise StatisticsError(
                f"AlphaEdit's system at layer {system.site.layer} is singular with L2={hparams.L2}: use a"
                " positive L2"
            )
        system.figures["denominator"] = pivots(factor)
        return system.residual, torch.cholesky_solve(own, factor).T @ basis.T

    return closed_form


def alphaedit(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: AlphaEditMDMHyperParams,
    values: Sequence[Optimised] | None = None,
    history: History | None = None,
) -> Edit:
    """Make (not apply) one edit of all requests.

    Args:
        history: keys of the edits that the model carries; it belongs to whoever edits in sequence, and is
            added to here.
    """
    carried, finish = remembered(adapter, hparams, history)
    return edit_batch(adapter, requests, hparams, projected(hparams, carried), values, finish)


def alphaedit_values(
    adapter: Adapter, requests: Sequence[EditRequest], hparams: AlphaEditMDMHyperParams
) -> list[Optimised]:
    """The optimised values of requests, each as if it were alone, in a model that carries no edits."""
    return block_values(adapter, requests, hparams, projected(hparams))


METHODS.register("AlphaEdit_MDM")(
    Method(
        "AlphaEdit_MDM",
        AlphaEditMDMHyperParams,
        alphaedit,
        alphaedit_values,
        stands_for="AlphaEdit",
        batchable=True,
        sequential=True,
        closed_form=projected,
    )
)
