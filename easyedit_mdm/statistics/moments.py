"""C = E[k k^T], in float64: what it says about itself, and what is solved with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.errors import StatisticsError

CHEAP_WIDTH = 2048  # eigenvalues of 12,288 dimensions (LLaDA-8B) take minutes, of 2,048 about a second


@dataclass
class SecondMoments:
    """Second moments of a site's keys.

    Attributes:
        moment: E[k k^T], float64, on the CPU.
        tokens: number of keys it is the mean of.
        settings: what it was made with (model, text, mask ratio, ...), as its file records it.
    """

    moment: Float[Tensor, "inner inner"]
    tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False)

    def ridged(self, eps: int | float = 0.0) -> Float[Tensor, "inner inner"]:
        """C + eps tr(C)/d_k I."""
        return self.moment + eps * self.moment.diagonal().mean() * torch.eye(
            len(self.moment), dtype=torch.float64
        )

    def solve(self, keys: Tensor, eps: int | float = 0.0) -> Tensor:
        """(C + eps tr(C)/d_k I)^-1 keys, by a Cholesky factor that is kept.

        Args:
            keys: one key (inner,) or several as columns (inner, keys); the result has their shape, device and
                dtype.

        Raises:
            StatisticsError: if C is singular: too few tokens for the dimension, or too small a vocabulary;
                raise either, or eps.
        """
        if eps not in self._factors:
            self._factors[eps] = cholesky(self.ridged(eps), self.tokens)
        columns = keys.detach().double().cpu().reshape(len(self.moment), -1)
        return (
            torch.cholesky_solve(columns, self._factors[eps]).reshape(keys.shape).to(keys.device, keys.dtype)
        )

    @cached_property
    def spectrum(self) -> tuple[Float[Tensor, " inner"], Float[Tensor, "inner inner"]]:
        """Eigenvalues in ascending order, none below 0, and eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.moment)
        return values.clamp(min=0), vectors

    @cached_property
    def eigenvalues(self) -> Float[Tensor, " inner"]:
        """In ascending order, none below 0."""
        return torch.linalg.eigvalsh(self.moment).clamp(min=0)

    def cheap_figures(self, eps: int | float = 0.0) -> dict[str, int | float]:
        """`figures` where eigenvalues cost little next to an edit; for wider keys the number of tokens alone
        (`stats` tells the rest).
        """
        return (
            self.figures(eps)
            if len(self.moment) <= CHEAP_WIDTH or "eigenvalues" in self.__dict__
            else {"tokens": self.tokens}
        )

    def figures(self, eps: int | float = 0.0) -> dict[str, int | float]:
        """How well the moments are conditioned.

        `condition`: largest over smallest eigenvalue with the ridge. `effective_rank`: exp of the entropy of
        the normalised eigenvalues (Roy and Vetterli, 2007); near d_k where all directions are used alike,
        small where few are.
        """
        values = self.eigenvalues
        ridge = eps * float(values.mean())
        share = values / values.sum().clamp(min=1e-300)
        entropy = -(share * share.clamp(min=1e-300).log()).sum()
        least = float(values[0]) + ridge
        return {
            "tokens": self.tokens,
            "condition": float(values[-1] + ridge) / least if least > 0 else float("inf"),
            "effective_rank": float(entropy.exp()),
        }


def cholesky(matrix: Float[Tensor, "inner inner"], tokens: int) -> Float[Tensor, "inner inner"]:
    """The Cholesky factor of a system made of second moments.

    Raises:
        StatisticsError: if it is singular, with the number of tokens behind the statistics.
    """
    try:
        return torch.linalg.cholesky(matrix)
    except torch.linalg.LinAlgError:
        raise StatisticsError(
            f"second moments of {tokens} tokens in {len(matrix)} dimensions are singular: "
            "use more tokens (mom2_n_tokens), more varied text, or a ridge (mom2_eps, such as 1e-6)"
        ) from None
