"""MEMIT and EMMET for both paradigms.

With keys K, residuals R and second moments C of a layer,

    MEMIT (arXiv 2210.07229, eq. 14):  dW = R K^T (lambda C + K K^T)^-1
    EMMET (arXiv 2403.14236, eq. 8):   dW = R (K^T C'^-1 K + mu I)^-1 K^T C'^-1,  C' = lambda C

MEMIT is the least squares of all facts and C. EMMET writes every fact to the letter if mu = 0.

By Woodbury's identity both are R (K^T A + nu I)^-1 A^T with A = C^-1 K, and nu = lambda or lambda mu: C is
factored once, and a batch of n facts costs an n x n system.

With `keep_edits` the keys K_0 of the edits that the model carries stand beside K, with residuals of 0:

    dW = R K^T (lambda C + K_0 K_0^T + K K^T)^-1,

the least squares that also leave earlier edits alone (the K_p of AlphaEdit, arXiv 2410.02355, without its
projection).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
from easyedit_mdm.errors import StatisticsError
from easyedit_mdm.models import Adapter

Carried = Mapping[str, Float[Tensor, "inner _"]]
NONE: Carried = MappingProxyType({})


@dataclass
class SquaresHyperParams(BatchHyperParams):
    """What MEMIT_MDM's and EMMET_MDM's hyperparameters have in common: see `BatchHyperParams`.

    Attributes:
        keep_edits: whether the keys of the edits that the model carries are kept where they are, in a
            sequence; off as in EasyEdit.
    """

    keep_edits: bool = False


@dataclass
class MEMITMDMHyperParams(SquaresHyperParams):
    """MEMIT_MDM's hyperparameters: see `SquaresHyperParams`."""

    ALG_NAME: ClassVar[str] = "MEMIT_MDM"


@dataclass
class EMMETMDMHyperParams(SquaresHyperParams):
    """EMMET_MDM's hyperparameters: see `SquaresHyperParams`.

    Attributes:
        emmet_lambda: mu; 0 makes every fact an equality, which linearly dependent keys make impossible.
    """

    emmet_lambda: int | float = 0.1

    ALG_NAME: ClassVar[str] = "EMMET_MDM"

    def validate(self) -> None:
        """As `BatchHyperParams.validate`."""
        super().validate()
        self.check_numbers(emmet_lambda=0)


def least_squares(eps: int | float, nu: int | float, carried: Carried = NONE) -> ClosedForm:
    """R (K^T C^-1 K + nu I)^-1 K^T C^-1, with C ridged by `eps`; `carried`: keys, by site, that are to stay
    where they are.
    """

    def closed_form(system: System) -> tuple[Float[Tensor, "width columns"], Float[Tensor, "columns inner"]]:
        """R and the rest.

        Raises:
            StatisticsError: if the system is singular.
        """
        known = carried.get(system.site.name, system.keys[:, :0])
        keys = torch.cat([system.keys, known.to(system.keys)], dim=1)
        solved = system.moments.solve(keys, eps)
        gram = keys.T @ solved
        gram = (gram + gram.T) / 2 + nu * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, wrong = torch.linalg.cholesky_ex(gram)
        least = 1e-13 * gram.diagonal().max()  # pivots this small are rounding errors of a singular matrix
        if int(wrong) or not (factor.diagonal() ** 2 > least).all():
            raise StatisticsError(
                f"the system of {len(gram)} keys at layer {system.site.layer} is singular (statistics of"
                f" {system.moments.tokens} tokens): the keys are linearly dependent. Use a positive weight"
                " (mom2_update_weight, emmet_lambda) or fewer facts a batch"
            )
        system.figures["denominator"] = pivots(factor)
        return system.residual, torch.cholesky_solve(solved.T, factor)[: system.keys.shape[1]]

    return closed_form


def memit(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: MEMITMDMHyperParams,
    values: Sequence[Optimised] | None = None,
    history: History | None = None,
) -> Edit:
    """Make (not apply) one edit of all requests, by least squares."""
    return _edit(adapter, requests, hparams, memit_form, values, history)


def memit_form(hparams: MEMITMDMHyperParams, carried: Carried = NONE) -> ClosedForm:
    """MEMIT's: nu = lambda."""
    return least_squares(hparams.mom2_eps, hparams.mom2_update_weight, carried)


def emmet_form(hparams: EMMETMDMHyperParams, carried: Carried = NONE) -> ClosedForm:
    """EMMET's: nu = lambda mu."""
    return least_squares(hparams.mom2_eps, hparams.mom2_update_weight * hparams.emmet_lambda, carried)


def _edit(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: SquaresHyperParams,
    form: Callable[..., ClosedForm],
    values: Sequence[Optimised] | None,
    history: History | None,
) -> Edit:
    if not hparams.keep_edits:
        return edit_batch(adapter, requests, hparams, form(hparams), values)
    carried, finish = remembered(adapter, hparams, history)
    return edit_batch(adapter, requests, hparams, form(hparams, carried), values, finish)


def memit_values(
    adapter: Adapter, requests: Sequence[EditRequest], hparams: MEMITMDMHyperParams
) -> list[Optimised]:
    """The optimised values of requests, each as if it were alone."""
    return block_values(adapter, requests, hparams, memit_form(hparams))


def emmet_values(
    adapter: Adapter, requests: Sequence[EditRequest], hparams: EMMETMDMHyperParams
) -> list[Optimised]:
    """The optimised values of requests, each as if it were alone."""
    return block_values(adapter, requests, hparams, emmet_form(hparams))


def emmet(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: EMMETMDMHyperParams,
    values: Sequence[Optimised] | None = None,
    history: History | None = None,
) -> Edit:
    """Make (not apply) one edit of all requests, each an equality (up to `emmet_lambda`)."""
    return _edit(adapter, requests, hparams, emmet_form, values, history)


METHODS.register("MEMIT_MDM")(
    Method(
        "MEMIT_MDM",
        MEMITMDMHyperParams,
        memit,
        memit_values,
        stands_for="MEMIT",
        batchable=True,
        sequential=True,
        closed_form=memit_form,
    )
)
METHODS.register("EMMET_MDM")(
    Method(
        "EMMET_MDM",
        EMMETMDMHyperParams,
        emmet,
        emmet_values,
        stands_for="EMMET",
        batchable=True,
        sequential=True,
        closed_form=emmet_form,
    )
)
