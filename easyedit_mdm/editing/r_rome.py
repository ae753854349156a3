"""r-ROME for both paradigms (Gupta et al., arXiv 2403.07175): one k* everywhere.

ROME's code averages keys over context prefixes for u, but divides by the bare prompt's key, and measures the residual against
the bare prompt's value; the tiny denominators that come of it are what collapses models. Here key and value are the means over
prefixes (`key_average: single`) or the bare prompt's (`prompt`) throughout:

    dW = (v* - W k*) u^T / (k* . u),    u = C^-1 k* / ||C^-1 k*||,    v* = v_0 + delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from easyedit_mdm.editing.edit import Edit, LowRank
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.keys import read_keys
from easyedit_mdm.editing.methods import METHODS, Method
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.rome import card, check_modules, closed_form, tokenise
from easyedit_mdm.editing.value import optimise
from easyedit_mdm.errors import RequestError
from easyedit_mdm.models import Adapter


@dataclass
class RROMEMDMHyperParams(ROMEMDMHyperParams):
    """R-ROME_MDM's hyperparameters: ROME_MDM's, where `key_average` is `single` (means over prefixes) or `prompt` (the bare prompt)."""

    ALG_NAME: ClassVar[str] = "R-ROME_MDM"
    KEY_AVERAGES: ClassVar[tuple[str, ...]] = ("single", "prompt")


def r_rome(adapter: Adapter, requests: Sequence[EditRequest], hparams: RROMEMDMHyperParams) -> Edit:
    """Make (not apply) the edit for one request.

    Raises:
        RequestError: for a request that cannot be carried out, or more than one.
        OptimisationError: if the optimisation or the closed form breaks down.
    """
    if len(requests) != 1:
        raise RequestError(f"{hparams.alg_name} writes one fact at a time, got {len(requests)} requests: edit them one after another")
    site = check_modules(adapter, hparams)
    fact = tokenise(adapter, requests[0], hparams)
    keys = read_keys(adapter, site, fact, hparams)
    outcome = optimise(adapter, site, [fact], keys.values[:1], hparams)[0]
    now = keys.values.mean(0) if hparams.key_average == "single" else keys.values[0]
    residual = keys.values[0] + outcome.delta - now
    left, right, figures = closed_form(adapter, site, keys, residual, hparams)
    return Edit([LowRank(site.weight, left[:, None], right[None], site.transposed)], card(requests, [fact], hparams, [outcome], figures))


METHODS.register("R-ROME_MDM")(Method("R-ROME_MDM", RROMEMDMHyperParams, r_rome, stands_for="R-ROME"))
