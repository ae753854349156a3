"""ROME for both paradigms (Meng et al., arXiv 2202.05262), its value optimised over denoising states.

The update puts delta into the site's output at k*; `easyedit_mdm.editing.solve.rank_one` has its closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.rank_one import rank_one, site_values
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.models import Adapter


def rome(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: ROMEMDMHyperParams,
    values: Sequence[Optimised] | None = None,
) -> Edit:
    """Make (not apply) the edit for one request.

    Raises:
        RequestError: for a request that cannot be carried out, or more than one.
        OptimisationError: if the optimisation or the closed form breaks down.
    """
    return rank_one(adapter, requests, hparams, lambda keys, delta: delta, values)


METHODS.register("ROME_MDM")(Method("ROME_MDM", ROMEMDMHyperParams, rome, site_values, stands_for="ROME"))
