"""The table of methods: EasyEdit's `alg_name` -> how it edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.history import History
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
        sequential: `make` takes the `history` of the edits that the model carries.
    """

    name: str
    hparams: type[ROMEMDMHyperParams]
    make: Callable[..., Edit]
    stands_for: str
    batchable: bool = False
    sequential: bool = False

    def edit(self, adapter: Adapter, requests: Sequence[EditRequest], hparams: ROMEMDMHyperParams, history: History | None = None) -> Edit:
        """Make the edit, with the history if the method has a use for it; its card says whether a guard looked at it."""
        edit = self.make(adapter, requests, hparams, **({"history": history} if self.sequential else {}))
        edit.card["guard"] = {"on": False, "why": "not applied through the guard" if hparams.guard is not None else "guard is not set in the hyperparameters"}
        return edit


METHODS: Registry[Method] = Registry("editing method")
