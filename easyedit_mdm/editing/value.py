"""The value optimisation: the vector that, written at the site, makes the model say the target.

    loss(delta) = sum_S w_S mean_{contexts} mean_{i not in S} -log p(y_i | prompt, y_S; delta)
                  + kl_factor KL(p_delta(. | anchor) || p(. | anchor)) + v_weight_decay ||delta|| / ||v_0||^2

is ROME's equation (4) (arXiv 2202.05262), its first term taken over the states S of a schedule; with `full_mask`, or on an
autoregressive model, it is ROME's own. delta is kept within clamp_norm_factor ||v_0||. The optimisation is batched over
facts; a fact that has converged leaves the batch. What lies below the edited layer is computed once where the states stay
the same from step to step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.denoising.states import Schedule, schedule
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.rows import Fact, Rows, build_rows
from easyedit_mdm.errors import OptimisationError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.hooks import changing_output, frozen


@dataclass
class Optimised:
    """The outcome for one fact.

    Attributes:
        delta: what is to be added to the site's output.
        losses: total loss before each step; for schedules that draw, of the states drawn.
        steps: optimiser steps taken.
        schedule: the schedule that was used, and the one asked for.
        forwards: rows that went through the layers from the edited one up.
    """

    delta: Float[Tensor, " width"]
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    schedule: str = ""
    forwards: int = 0


def optimise(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    initial: Float[Tensor, "facts width"],
    hparams: ROMEMDMHyperParams,
    generator: torch.Generator,
) -> list[Optimised]:
    """Optimise one delta a fact.

    Args:
        initial: v_0, the site's output for each fact's bare prompt.
        generator: for the schedules that draw states.

    Raises:
        OptimisationError: if a loss is not a number; no weight has been touched.
    """
    plans = [_schedule_for(adapter, fact, hparams) for fact in facts]
    deltas = [torch.zeros_like(v, requires_grad=True) for v in initial]
    done = [Optimised(d, schedule=_name(p)) for d, p in zip(deltas, plans)]
    recent = [deque(maxlen=p.cycle) for p in plans]
    optimizer = torch.optim.Adam(deltas, lr=hparams.v_lr)
    forward = _Forward(adapter, site, facts, plans, hparams, generator)
    active = list(range(len(facts)))
    with frozen(adapter):
        for step in range(hparams.v_num_grad_steps):
            optimizer.zero_grad()
            last = step == hparams.v_num_grad_steps - 1
            losses = forward.losses(step, active, deltas, initial, backward=not last)
            active = _record(losses, active, done, recent, hparams, step)
            if last or not active:
                break
            for i in set(range(len(facts))) - set(active):
                deltas[i].grad = None  # converged: Adam leaves it alone
            optimizer.step()
            _clamp([deltas[i] for i in active], initial[active], hparams.clamp_norm_factor)
            for i in active:
                done[i].steps += 1
    for i, outcome in enumerate(done):
        outcome.delta = deltas[i].detach()
        outcome.forwards = forward.count[i]
    return done


def _schedule_for(adapter: Adapter, fact: Fact, hparams: ROMEMDMHyperParams) -> Schedule:
    # an autoregressive model has one state a target: each slot sees the slots on its left
    return schedule(hparams.state_schedule if adapter.masked else "full_mask", len(fact.target), hparams.max_states)


def _name(plan: Schedule) -> str:
    return plan.used if plan.used == plan.name else f"{plan.used} (asked for {plan.name})"


def _record(losses: Tensor, active: list[int], done: list[Optimised], recent: list[deque], hparams: ROMEMDMHyperParams, step: int) -> list[int]:
    """Note the losses; the facts that go on are those whose mean over a full cycle is not below the threshold."""
    going = []
    for i, loss in zip(active, losses.tolist()):
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise OptimisationError(
                f"the loss of fact {i} is {loss} at step {step}: the optimisation left the finite numbers (v_lr={hparams.v_lr}, "
                "model weights or dtype?). No weight was changed."
            )
        done[i].losses.append(loss)
        recent[i].append(loss)
        full = len(recent[i]) == recent[i].maxlen
        if not (full and sum(recent[i]) / len(recent[i]) < hparams.early_stop_loss):
            going.append(i)
    return going


@torch.no_grad()
def _clamp(deltas: list[Tensor], initial: Float[Tensor, "facts width"], factor: float) -> None:
    for delta, v in zip(deltas, initial):
        most = factor * v.norm()
        delta.mul_((most / delta.norm().clamp(min=1e-30)).clamp(max=1.0))


class _Forward:
    """Losses of the active facts, with the rows and what lies below the edit kept for as long as they stay the same."""

    def __init__(
        self, adapter: Adapter, site: Site, facts: Sequence[Fact], plans: list[Schedule], hparams: ROMEMDMHyperParams, generator: torch.Generator
    ):
        self.adapter, self.site, self.facts, self.plans = adapter, site, facts, plans
        self.hparams, self.generator = hparams, generator
        self.fixed = all(plan.fixed for plan in plans)
        self.kept: tuple[list[int], Rows, Tensor] | None = None
        self.anchors: dict[int, Tensor] = {}
        self.count = [0] * len(facts)

    def losses(
        self, step: int, active: list[int], deltas: list[Tensor], initial: Float[Tensor, "facts width"], backward: bool
    ) -> Float[Tensor, " active"]:
        """Total loss of each active fact; gradients go into the deltas."""
        rows, below = self._rows(step, active)
        place = torch.zeros(len(self.facts), dtype=torch.long, device=rows.fact.device)
        place[active] = torch.arange(len(active), device=place.device)
        total = torch.zeros(len(active), device=rows.ids.device)
        for chunk in torch.arange(len(rows), device=rows.ids.device).split(self.hparams.max_rows):
            stacked = torch.stack([deltas[i] for i in active])
            loss = self._chunk(rows.take(chunk), below[chunk], stacked, place)
            if backward:
                loss.sum().backward()
            total += loss.detach().to(total.device)
        stacked = torch.stack([deltas[i] for i in active])
        decay = self.hparams.v_weight_decay * stacked.norm(dim=1) / initial[active].norm(dim=1) ** 2
        if backward:
            decay.sum().backward()
        for i in active:
            self.count[i] += int((rows.fact == i).sum())
        return total + decay.detach().to(total.device)

    def _rows(self, step: int, active: list[int]) -> tuple[Rows, Tensor]:
        if self.kept is not None and self.fixed:
            known, rows, below = self.kept
            if known != active:
                going = torch.isin(rows.fact, torch.tensor(active, device=rows.fact.device))
                rows, below = rows.take(going), below[going]
                self.kept = (list(active), rows, below)
            return rows, below
        states = {i: self.plans[i].draw(step, self.generator) for i in active}
        rows = build_rows(self.adapter, {i: self.facts[i] for i in active}, states, self.hparams.kl_position)
        with torch.no_grad():  # kept where the rows are, whatever device the lower layers are on
            parts = zip(rows.ids.split(self.hparams.max_rows), rows.mask.split(self.hparams.max_rows))
            below = torch.cat([self.adapter.hidden_before(self.site.layer, ids, mask).to(rows.ids.device) for ids, mask in parts])
        self.kept = (list(active), rows, below)
        return rows, below

    def _chunk(self, rows: Rows, below: Tensor, deltas: Float[Tensor, "active width"], place: Tensor) -> Float[Tensor, " active"]:
        """NLL and KL of some rows, added up by fact."""

        def add_delta(out: Tensor) -> Tensor:
            """delta at each row's site."""
            extra = torch.zeros_like(out)
            index = torch.arange(len(rows), device=out.device)
            extra[index, rows.site.to(out.device)] = deltas[place[rows.fact].to(deltas.device)].to(out.device, out.dtype)
            return out + extra

        with changing_output(self.adapter.module(self.site.name), add_delta):
            logits = self.adapter.token_logits(rows.ids, rows.mask, at=rows.at, layer=self.site.layer, hidden=below)
        log_probs = logits.float().log_softmax(-1)
        right = log_probs.gather(-1, rows.tokens.to(log_probs.device)[..., None])[..., 0]
        each = -(right * rows.weights.to(right.device)).sum(-1)
        each = each + self.hparams.kl_factor * self._kl(rows, log_probs)
        return torch.zeros(len(deltas), device=each.device).index_add(0, place[rows.fact].to(each.device), each)

    def _kl(self, rows: Rows, log_probs: Float[Tensor, "rows slots vocab"]) -> Float[Tensor, " rows"]:
        """KL(current || initial) in the anchor rows, 0 in the others. The first call, delta being 0, sets the initial ones."""
        out = torch.zeros(len(rows), device=log_probs.device)
        for row in rows.anchor.nonzero().flatten().tolist():
            now = log_probs[row, 0]
            initial = self.anchors.setdefault(int(rows.fact[row]), now.detach())
            out[row] = (now.exp() * (now - initial)).sum()
        return out
