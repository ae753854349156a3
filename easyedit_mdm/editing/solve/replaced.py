"""Values that stand in place of what a site gives: GRACE's, optimised over states of the target.

    loss(v) = sum_S w_S mean_{i not in S} -log p(y_i | prompt, y_S; site(x_t) = v)

at one token t of the prompt, the states S being those of a schedule. On an autoregressive model it is the
mean next-token loss of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.facts import Fact, fact_generator
from easyedit_mdm.editing.solve.card import Outcome
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.editing.solve.rows import Rows, build_rows
from easyedit_mdm.errors import HyperParameterError, OptimisationError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.hooks import changing_output, frozen


@dataclass(frozen=True)
class Training:
    """How values are optimised.

    Attributes:
        schedule, max_states: of states (`easyedit_mdm.denoising.SCHEDULES`).
        steps, lr: of Adam.
        max_rows: rows of one forward pass.
        seed: of drawn states.
    """

    schedule: str
    max_states: int
    steps: int
    lr: float
    max_rows: int
    seed: int


def replacing_values(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    initial: Float[Tensor, "facts width"],
    training: Training,
) -> tuple[Float[Tensor, "facts width"], list[Outcome]]:
    """Optimise one value a fact, which stands in place of the site's output at the fact's token.

    Args:
        initial: what to start from.

    Raises:
        HyperParameterError: for a schedule whose states are the model's own roll-outs.
        OptimisationError: if a loss is not a number.
    """
    plans = [Plan.of(adapter, fact, training.schedule, training.max_states) for fact in facts]
    if any(plan.rolled for plan in plans):
        raise HyperParameterError(
            f"state_schedule={training.schedule!r} asks the model for states while values are optimised,"
            " which is not offered for a value that replaces; use stratified or enumerate"
        )
    values = initial.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([values], lr=training.lr)
    generators = [fact_generator(fact, training.seed) for fact in facts]
    outcomes = [Outcome(schedule=plan.used) for plan in plans]
    rows: Rows | None = None
    with frozen(adapter):
        for step in range(training.steps):
            if rows is None or not all(plan.fixed for plan in plans):
                states = {i: plan.draw(step, generators[i]) for i, plan in enumerate(plans)}
                rows = build_rows(adapter, dict(enumerate(facts)), states, "slot", plans[0].dealt, step)
                rows = rows.take(~rows.anchor)  # there is no KL term
            optimizer.zero_grad()
            some = rows.take(rows.counting(step)) if plans[0].dealt else rows
            _note(_losses(adapter, site, some, values, training.max_rows), some, outcomes, adapter, step)
            optimizer.step()
    return values.detach(), outcomes


def _losses(
    adapter: Adapter, site: Site, rows: Rows, values: Float[Tensor, "facts width"], max_rows: int
) -> Float[Tensor, " facts"]:
    """Each fact's loss; gradients go into the values."""
    total = torch.zeros(len(values), device=rows.ids.device)
    for chunk, length, slots in rows.chunks(max_rows):
        part = rows.take(chunk).cut(length, slots)

        def replaced(out: Tensor, part: Rows = part) -> Tensor:
            """The site's output with each row's value at its token."""
            index = torch.arange(len(part), device=out.device)
            own = values[part.fact.to(values.device)].to(out)
            return out.index_put((index, part.site.to(out.device)), own)

        with changing_output(adapter.module(site.name), replaced):
            logits = adapter.token_logits(part.ids, part.mask, at=part.at, canvas=part.canvas)
        right = logits.float().log_softmax(-1).gather(-1, part.tokens[..., None])[..., 0]
        each = -(right * part.weights).sum(-1)
        each.sum().backward()
        total = total.index_add(0, part.fact, each.detach())
    return total


def _note(losses: Tensor, rows: Rows, outcomes: Sequence[Outcome], adapter: Adapter, step: int) -> None:
    counts = torch.bincount(rows.fact.cpu(), minlength=len(outcomes)).tolist()
    for number, (loss, count) in enumerate(zip(losses.tolist(), counts)):
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise OptimisationError(
                f"the loss of fact {number} is {loss} at step {step}: the optimisation left the finite"
                " numbers (edit_lr, model weights or dtype?). No weight was changed."
            )
        outcome = outcomes[number]
        outcome.losses.append(loss)
        outcome.steps += 1
        outcome.forwards += count
        outcome.layer_passes += count * adapter.layers
