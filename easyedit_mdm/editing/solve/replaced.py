"""Values that stand in place of what a site gives: GRACE's, optimised over states of the target.

    L(v) = sum_S w_S  mean_{prefixes}  mean_{i not in S}  -log p(y_i | prompt, y_S; site(x_t) = v)

at one token t of the prompt, the states S being those of a schedule. On an autoregressive model it is the
mean next-token loss of the target.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from statistics import fmean

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
        values: Sequence[Float[Tensor, " width"]],
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
        return out.index_put((index, at.to(out.device)), torch.stack([self.values[i] for i in facts]).to(out))


def replacing_values(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    initial: Float[Tensor, "facts width"],
    hparams: StateHyperParams,
    steps: int,
    lr: float,
    enough: float = 0.0,
) -> tuple[Float[Tensor, "facts width"], list[Outcome]]:
    """Optimise one value a fact, which stands in place of the site's output at the fact's token.

    Args:
        initial: what to start from.
        steps, lr: of Adam; all facts are optimised at once.
        enough: a fact is done when its mean loss over a cycle of states is below this; 0: never.

    Raises:
        OptimisationError: if a loss is not a number.
    """
    values = [value.clone().requires_grad_() for value in initial.detach()]
    optimizer = torch.optim.Adam(values, lr=lr)
    losses = _Replaced(adapter, site, facts, values, hparams)
    recent: list[deque[float]] = [deque(maxlen=plan.cycle) for plan in losses.plans]
    active = list(range(len(facts)))
    with frozen(adapter):
        for step in range(steps):
            optimizer.zero_grad()
            step_losses = losses.backward(step, active, torch.ones(len(active)))
            note_losses([losses.outcomes[i] for i in active], step_losses, step, f"edit_lr={lr}")
            for i, loss in zip(active, step_losses.tolist()):
                recent[i].append(loss)
            done = {i for i in active if len(recent[i]) == recent[i].maxlen and fmean(recent[i]) < enough}
            for i in done:
                values[i].grad = None  # Adam leaves it alone
            if done:
                losses.forget()  # rows of facts that are done
                active = [i for i in active if i not in done]
            if not active:
                break
            for i in active:
                losses.outcomes[i].steps += 1
            optimizer.step()
    return torch.stack(values).detach(), losses.outcomes
