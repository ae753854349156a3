"""What an edit does to one weight: low-rank factors, or the exact change."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.errors import EditError


@dataclass(frozen=True)
class LowRank:
    """A change of one weight, `left @ right`, stored outputs x inputs (its transpose where `transposed`)."""

    name: str
    left: Float[Tensor, "outputs rank"]
    right: Float[Tensor, "rank inputs"]
    transposed: bool = False

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The change in the shape in which the weight is stored, in float32."""
        change = self.left.float() @ self.right.float()
        return change.T if self.transposed else change

    @property
    def shape(self) -> tuple[int, int]:
        """The shape in which the weight is stored."""
        shape = (self.left.shape[0], self.right.shape[1])
        return shape[::-1] if self.transposed else shape

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the change is made of."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True)
class Exact:
    """A change of one weight that has no low rank, in the shape in which the weight is stored."""

    name: str
    delta: Float[Tensor, "rows columns"]
    transposed: bool = False

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The change in float32."""
        return self.delta.float()

    @property
    def shape(self) -> tuple[int, int]:
        """The shape in which the weight is stored."""
        return (self.delta.shape[0], self.delta.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the change is made of."""
        return {"delta": self.delta}


Change = LowRank | Exact


def added(weight: Float[Tensor, "rows columns"], change: Change) -> Float[Tensor, "rows columns"]:
    """W + D, added in float32 and rounded to the weight's dtype; the weight itself stays as it is.

    Raises:
        EditError: if the sum does not fit that dtype.
    """
    value = (weight.detach().float() + change.dense().detach().to(weight.device)).to(weight.dtype)
    if not value.isfinite().all():
        why = "it already holds NaN or infinity"
        if weight.isfinite().all():
            why = f"the sum is too large for {weight.dtype}"
        raise EditError(f"{change.name} cannot be changed: {why}; no weight was changed")
    return value
