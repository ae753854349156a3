"""r-ROME for both paradigms (Gupta et al., arXiv 2403.07175): one k* everywhere.

ROME's code averages keys over context prefixes for u, but divides by the bare prompt's key, and measures the
residual against the bare prompt's value; the tiny denominators that come of it are what collapses models.
Here key and value are the means over prefixes (`key_average: single`) or the bare prompt's (`prompt`)
throughout:

    dW = (v* - W k*) u^T / (k* . u),    u = C^-1 k* / ||C^-1 k*||,    v* = v_0 + delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.keys import Keys
from easyedit_mdm.editing.solve.rank_one import rank_one, site_values
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.models import Adapter


@dataclass
class RROMEMDMHyperParams(ROMEMDMHyperParams):
    """R-ROME_MDM's hyperparameters: ROME_MDM's, where `key_average` is `single` (means over prefixes) or
    `prompt` (the bare prompt).
    """

    ALG_NAME: ClassVar[str] = "R-ROME_MDM"
    KEY_AVERAGES: ClassVar[tuple[str, ...]] = ("single", "prompt")


def r_rome(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: RROMEMDMHyperParams,
    values: Sequence[Optimised] | None = None,
) -> Edit:
    """Make (not apply) the edit for one request.

    Raises:
        RequestError: for a request that cannot be carried out, or more than one.
        OptimisationError: if the optimisation or the closed form breaks down.
    """

    def residual(keys: Keys, delta: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
        """v* less what the key gives now."""
        now = keys.values.mean(0) if hparams.key_average == "single" else keys.values[0]
        return keys.initial + delta - now

    return rank_one(adapter, requests, hparams, residual, values)


METHODS.register("R-ROME_MDM")(
    Method("R-ROME_MDM", RROMEMDMHyperParams, r_rome, site_values, stands_for="R-ROME")
)
