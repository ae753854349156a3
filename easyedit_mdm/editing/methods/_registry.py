"""The table of methods: EasyEdit's `alg_name` -> how it edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.history import History
from easyedit_mdm.editing.hparams import MethodHyperParams
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.context import without_context


@dataclass(frozen=True)
class Method:
    """One editing method.

    Attributes:
        name: its `alg_name`.
        hparams: its hyperparameter class, with EasyEdit's `from_hparams`.
        make: (adapter, requests, hyperparameters) -> the edit; the model is left as it was. `values`: those
            of the requests, where they have been optimised already.
        values: (adapter, requests, hyperparameters) -> the optimised values of requests, each as if it were
            alone; None for a method that optimises no values, whose `make` takes none.
        stands_for: the EasyEdit method whose place it takes in runners that know only EasyEdit's names.
        batchable: many requests give one edit (EasyEdit's `batch_edit`); otherwise one request each.
        sequential: `make` takes the `history` of the edits that the model carries.
    """

    name: str
    hparams: type[MethodHyperParams]
    make: Callable[..., Edit]
    values: Callable[..., list[Optimised]] | None = None
    stands_for: str = field(kw_only=True)
    batchable: bool = False
    sequential: bool = False

    def edit(
        self,
        adapter: Adapter,
        requests: Sequence[EditRequest],
        hparams: MethodHyperParams,
        history: History | None = None,
    ) -> Edit:
        """Make the edit, with the history if the method has a use for it; its card says whether a guard
        looked at it. It is made for the model without the tokens that an in-context edit puts before rows.
        """
        more = {"history": history} if self.sequential else {}
        with without_context(adapter.native):
            return _unguarded(self.make(adapter, requests, hparams, **more), hparams)

    def edit_each(
        self, adapter: Adapter, requests: Sequence[EditRequest], hparams: MethodHyperParams
    ) -> list[Edit]:
        """One edit a request, each for the model as it is now; values, where the method has any, are
        optimised together, which is several times faster.
        """
        with without_context(adapter.native):
            if self.values is None:
                return [_unguarded(self.make(adapter, [request], hparams), hparams) for request in requests]
            values = self.values(adapter, requests, hparams)
            return [
                _unguarded(self.make(adapter, [request], hparams, values=[value]), hparams)
                for request, value in zip(requests, values, strict=True)
            ]


def _unguarded(edit: Edit, hparams: MethodHyperParams) -> Edit:
    """The edit, whose card says that no guard has looked at it so far."""
    why = (
        "not applied through the guard"
        if hparams.guard is not None
        else "guard is not set in the hyperparameters"
    )
    edit.card["guard"] = {"on": False, "why": why}
    return edit


METHODS: Registry[Method] = Registry("editing method")
