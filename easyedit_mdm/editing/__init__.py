"""Request -> key -> value -> update: locate-then-edit, written once for both paradigms."""

from easyedit_mdm.editing.edit import Edit, LowRank
from easyedit_mdm.editing.history import History
from easyedit_mdm.editing.hparams import MethodHyperParams, ROMEMDMHyperParams, StateHyperParams
from easyedit_mdm.editing.methods import METHODS
from easyedit_mdm.editing.request import EditRequest

__all__ = [
    "METHODS",
    "Edit",
    "EditRequest",
    "History",
    "LowRank",
    "MethodHyperParams",
    "ROMEMDMHyperParams",
    "StateHyperParams",
]
