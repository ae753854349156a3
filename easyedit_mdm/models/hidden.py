"""What a hidden slot shows, as data: a mask, or a random token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Hidden:
    """What stands in a slot that is still to be written.

    Attributes:
        token: the same token in each (the mask; where nothing sees the slot, padding); None for noise.
        vocabulary: noise is uniform over the ids below this one (DiffusionGemma, as its own sampler draws).
    """

    token: int | None
    vocabulary: int = 0

    @property
    def noise(self) -> bool:
        """Whether it is a random token, which nothing tells from a written one."""
        return self.token is None

    def slots(self, count: int, draw: int = 0) -> Int[Tensor, " count"]:
        """Some hidden slots.

        Args:
            draw: number of the draw of noise: the same number gives the same tokens, whatever else is drawn.
        """
        if self.token is not None:
            return torch.full((count,), self.token)
        return torch.randint(self.vocabulary, (count,), generator=torch.Generator().manual_seed(draw))

    def around(
        self, tokens: Int[Tensor, " slots"], shown: Bool[Tensor, " slots"], draw: int = 0
    ) -> Int[Tensor, " slots"]:
        """A canvas that shows some of the tokens. `draw`: see `slots`."""
        return torch.where(shown, tokens, self.slots(len(tokens), draw).to(tokens.device))
