"""The table of methods: EasyEdit's `alg_name` -> how it edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.models import Adapter


@dataclass(frozen=True)
class Method:
    """One editing method.

    Attributes:
        name: its `alg_name`.
        hparams: its hyperparameter class, with EasyEdit's `from_hparams`.
        make: (adapter, requests, hyperparameters) -> the edit; the model is left as it was.
        stands_for: the EasyEdit method whose place it takes in runners that know only EasyEdit's names.
        batchable: many requests give one edit (EasyEdit's `batch_edit`); otherwise one request each.
    """

    name: str
    hparams: type[ROMEMDMHyperParams]
    make: Callable[[Adapter, Sequence[EditRequest], ROMEMDMHyperParams], Edit]
    stands_for: str
    batchable: bool = False


METHODS: Registry[Method] = Registry("editing method", not_yet=("MEMIT_MDM", "AlphaEdit_MDM", "EMMET_MDM", "R-ROME_MDM"))
