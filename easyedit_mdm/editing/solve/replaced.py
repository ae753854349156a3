"""Values that stand in place of what a site gives: GRACE's, optimised over states of the target.

    L(v) = sum_S w_S  mean_{prefixes}  mean_{i not in S}  -log p(y_i | prompt, y_S; site(x_t) = v)

at one token t of the prompt, the states S being those of a schedule. On an autoregressive model it is the
mean next-token loss of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.hparams import StateHyperParams
from easyedit_mdm.editing.solve.card import Outcome, note_losses
from easyedit_mdm.editing.solve.losses import StateLosses
from easyedit_mdm.editing.solve.rows import Rows
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.hooks import changing_output, frozen


class _Replaced(StateLosses):
    """The losses of facts with a value each in place of the site's output."""

    def __init__(
        self,
        adapter: Adapter,
        site: Site,
        facts: Sequence[Fact],
        values: Float[Tensor, "facts width"],
        hparams: StateHyperParams,
    ):
        super().__init__(adapter, facts, hparams, site.layer)
        self.module, self.values = adapter.module(site.name), values

    def _each(self, rows: Rows, below: Tensor | None) -> Float[Tensor, " rows"]:
        """As `StateLosses`."""
        with self._inserted(rows.fact.tolist(), rows.fact_at):
            return super()._each(rows, below)

    def _inserted(self, facts: Sequence[int], at: Int[Tensor, " rows"]) -> AbstractContextManager[None]:
        """Each row's value at its token."""
        return changing_output(self.module, partial(self._replaced, list(facts), at))

    def _replaced(self, facts: list[int], at: Tensor, out: Tensor) -> Tensor:
        index = torch.arange(len(facts), device=out.device)
        return out.index_put((index, at.to(out.device)), self.values[facts].to(out))


def replacing_values(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    initial: Float[Tensor, "facts width"],
    hparams: StateHyperParams,
    steps: int,
    lr: float,
) -> tuple[Float[Tensor, "facts width"], list[Outcome]]:
    """Optimise one value a fact, which stands in place of the site's output at the fact's token.

    Args:
        initial: what to start from.
        steps, lr: of Adam; all facts are optimised at once, and none ends sooner.

    Raises:
        OptimisationError: if a loss is not a number.
    """
    values = initial.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([values], lr=lr)
    losses = _Replaced(adapter, site, facts, values, hparams)
    with frozen(adapter):
        for step in range(steps):
            optimizer.zero_grad()
            step_losses = losses.backward(step, range(len(facts)), torch.ones(len(facts)))
            note_losses(losses.outcomes, step_losses, step, f"edit_lr={lr}")
            for outcome in losses.outcomes:
                outcome.steps += 1
            optimizer.step()
    return values.detach(), losses.outcomes
