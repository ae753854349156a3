"""An edit is an object, not a changed model: low-rank factors for each weight, and a card that says what they are."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from easyedit_mdm.common.fingerprints import tensor_sha256
from easyedit_mdm.errors import EditError, OptimisationError


@dataclass(frozen=True)
class LowRank:
    """A change of one weight, `left @ right`, for a weight stored outputs x inputs (its transpose where `transposed`)."""

    name: str
    left: Float[Tensor, "outputs rank"]
    right: Float[Tensor, "rank inputs"]
    transposed: bool = False

    def dense(self) -> Tensor:
        """The change in the shape in which the weight is stored, in float32."""
        change = self.left.float() @ self.right.float()
        return change.T if self.transposed else change


@dataclass
class Edit:
    """The result of a method.

    Attributes:
        changes: one change a weight.
        card: facts, method, hyperparameters, and figures of the optimisation.
    """

    changes: list[LowRank]
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._originals: "weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]]" = weakref.WeakKeyDictionary()
        self._edited: "weakref.WeakKeyDictionary[nn.Module, dict[str, str]]" = weakref.WeakKeyDictionary()
        for change in self.changes:
            if not (change.left.isfinite().all() and change.right.isfinite().all()):
                raise OptimisationError(f"the update of {change.name} holds NaN or infinity; no weight was changed")

    @torch.no_grad()
    def apply(self, model: nn.Module) -> dict[str, Tensor]:
        """Add the changes to the model's weights.

        Returns:
            the original weights, by parameter name (W + D - D is not W in floating point, so they are kept).

        Raises:
            EditError: if the edit is applied to this model already, or a weight is missing or of another shape. Nothing is
                changed then.
        """
        key = _identity(model)
        if key in self._originals:
            raise EditError("this edit is already applied to this model: revert it first")
        weights = dict(model.named_parameters())
        for change in self.changes:
            if change.name not in weights or weights[change.name].shape != change.dense().shape:
                found = tuple(weights[change.name].shape) if change.name in weights else "no such weight"
                raise EditError(f"the edit does not fit this model: {change.name} should be {tuple(change.dense().shape)}, found {found}")
            if weights[change.name].is_meta:
                raise EditError(f"{change.name} is offloaded and cannot be edited in place: load the model without offloading (device_map, max_memory)")
        originals = {change.name: weights[change.name].detach().clone() for change in self.changes}
        try:
            for change in self.changes:
                weight = weights[change.name]
                weight.copy_((weight.float() + change.dense().to(weight.device)).to(weight.dtype))
        except BaseException:
            _put_back(weights, originals)
            raise
        self._originals[key] = originals
        self._edited[key] = {name: tensor_sha256(weights[name]) for name in originals}
        return originals

    @torch.no_grad()
    def revert(self, model: nn.Module) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            EditError: if the edit is not applied to this model, or the weights have been changed since, by a later edit for
                example; nothing is changed then.
        """
        key = _identity(model)
        if key not in self._originals:
            raise EditError("this edit is not applied to this model")
        weights = dict(model.named_parameters())
        changed = [name for name, known in self._edited[key].items() if tensor_sha256(weights[name]) != known]
        if changed:
            raise EditError(f"{', '.join(changed)} has been changed since this edit was applied: revert later edits first")
        del self._edited[key]
        _put_back(weights, self._originals.pop(key))


def _identity(model: nn.Module) -> nn.Module:
    """The model that holds the weights: two adapters of one model are the same model."""
    return getattr(model, "native", model)


def _put_back(weights: dict[str, nn.Parameter], originals: dict[str, Tensor]) -> None:
    for name, value in originals.items():
        weights[name].data.copy_(value)
