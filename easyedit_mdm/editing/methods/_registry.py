"""The table of methods: EasyEdit's `alg_name` -> how it edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.history import History
from easyedit_mdm.editing.hparams import MethodHyperParams
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.batch import BatchHyperParams, ClosedForm
from easyedit_mdm.editing.solve.chunks import CHUNK, edit_in_chunks, fill
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.errors import HyperParameterError
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
        closed_form: hyperparameters -> the closed form of one layer, for a method of
            `easyedit_mdm.editing.solve.batch`: many thousand facts can then be edited in chunks.
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
    closed_form: Callable[..., ClosedForm] | None = None

    def edit(
        self,
        adapter: Adapter,
        requests: Sequence[EditRequest],
        hparams: MethodHyperParams,
        history: History | None = None,
        values: Sequence[Optimised] | None = None,
    ) -> Edit:
        """Make the edit, with the history if the method has a use for it; its card says whether a guard
        looked at it. It is made for the model without the tokens that an in-context edit puts before rows.

        Args:
            values: of the requests, where they have been optimised already, for a method that has any.
        """
        more: dict[str, Any] = {"history": history} if self.sequential else {}
        more |= {} if values is None else {"values": values}
        with without_context(adapter.native):
            return _unguarded(self.make(adapter, requests, hparams, **more), hparams)

    def edit_in_chunks(
        self,
        adapter: Adapter,
        requests: Sequence[EditRequest],
        hparams: MethodHyperParams,
        folder: str | Path,
        size: int = CHUNK,
    ) -> Edit:
        """One edit of thousands of facts, their values kept in a folder; see
        `easyedit_mdm.editing.solve.chunks`.

        Raises:
            HyperParameterError: for a method that cannot.
            EditError, OptimisationError, StatisticsError, RequestError: see `edit_in_chunks`.
        """
        form = self._form(hparams)
        with without_context(adapter.native):
            edit = edit_in_chunks(adapter, requests, cast(BatchHyperParams, hparams), form, folder, size)
            return _unguarded(edit, hparams)

    def make_values(
        self,
        adapter: Adapter,
        requests: Sequence[EditRequest],
        hparams: MethodHyperParams,
        folder: str | Path,
        size: int = CHUNK,
    ) -> None:
        """Make the values that `edit_in_chunks` misses, beside other processes; raises as it does."""
        self._form(hparams)
        with without_context(adapter.native):
            fill(adapter, requests, cast(BatchHyperParams, hparams), folder, size)

    def _form(self, hparams: MethodHyperParams) -> ClosedForm:
        if self.closed_form is None:
            able = ", ".join(name for name in METHODS if METHODS[name].closed_form is not None)
            raise HyperParameterError(f"{self.name} does not edit in chunks; these methods do: {able}")
        return self.closed_form(hparams)

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
