"""WISE's side memory as an attachment: changes of one linear map that answer only for the inputs that they
were trained for (Wang et al., arXiv 2405.14768).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from easyedit_mdm.editing.edit.attached import KINDS, Answer, Attached, check_widths
from easyedit_mdm.errors import EditError

MERGES = ("ties", "retrieve")


@KINDS.register("side memory")
class SideMemory(Attached):
    """A knowledge shard: a change `delta` (width x inner) of the module's weight, and the activation above
    which it answers,

        output(x) += delta x   where ||delta x|| > threshold,

    for every input x of the module. `merge` says what the shards of several edits do together; that of the
    last edit counts. `ties`: they become one change, which answers above the lowest of their thresholds.
    `retrieve`: each stands by itself, and of those above their own threshold the one with the largest
    ||delta x|| answers. `density`: the share of a shard's entries that merging keeps.
    """

    KIND = "side memory"
    TENSORS = ("delta",)
    SETTINGS = ("threshold", "density", "merge")

    def _check_parts(self) -> None:
        self._matrices("delta")
        self._numbers("threshold", "density")
        if self.settings["merge"] not in MERGES:
            raise EditError(f"merge={self.settings['merge']!r} of a {self.KIND} is none of {MERGES}")

    def check(self, native: nn.Module, module: nn.Module) -> None:
        """As `Attached.check`."""
        width, inner = self.tensors["delta"].shape
        check_widths(self, module, inner, width)

    @classmethod
    def joined(cls, parts: Sequence[Attached]) -> Answer:
        """As `Attached.joined`."""
        deltas = [part.tensors["delta"].float() for part in parts]
        thresholds = [float(part.settings["threshold"]) for part in parts]
        if parts[-1].settings["merge"] == "ties":
            deltas, thresholds = [ties(deltas, parts[-1].settings["density"])], [min(thresholds)]
        return _Routed(deltas, thresholds)


def ties(deltas: Sequence[Float[Tensor, "width inner"]], density: float) -> Float[Tensor, "width inner"]:
    """Several changes as one (TIES, Yadav et al., arXiv 2306.01708).

    Of each change the largest entries by magnitude are kept, a share `density` of all. Each entry takes the
    sign of the sum, and is the mean of the changes that have this sign.
    """
    trimmed = torch.stack([_largest(delta, density) for delta in deltas])
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == sign
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(delta: Float[Tensor, "width inner"], density: float) -> Float[Tensor, "width inner"]:
    number = int(density * delta.numel())
    if number >= delta.numel():
        return delta
    at = delta.abs().flatten().topk(number).indices
    trimmed = torch.zeros_like(delta).flatten()
    trimmed[at] = delta.flatten()[at]
    return trimmed.view_as(delta)


@dataclass
class _Routed:
    """Shards, each with the activation above which it answers."""

    deltas: list[Tensor]
    thresholds: list[float]

    def __call__(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """The module's output, with the answer of one shard where one is above its threshold."""
        answer = torch.zeros(leaving.shape, dtype=torch.float32, device=leaving.device)
        largest = answer.new_zeros(answer.shape[:-1])
        for delta, threshold in zip(self.deltas, self.thresholds):
            added = (entering.float() @ delta.to(entering.device).T).to(leaving.device)
            size = added.norm(dim=-1)
            answers = (size > threshold) & (size > largest)
            answer = torch.where(answers[..., None], added, answer)
            largest = torch.where(answers, size, largest)
        return leaving + answer.to(leaving)
