"""The value optimisation: the vector that, written at the site, makes the model say the target.

    loss(delta) = sum_S w_S mean_{contexts} mean_{i not in S} -log p(y_i | prompt, y_S; delta)
                  + kl_factor KL(p_delta(. | anchor) || p(. | anchor)) + v_weight_decay ||delta|| / ||v_0||^2

is ROME's equation (4) (arXiv 2202.05262), its first term taken over the states S of a schedule; with
`full_mask`, or on an autoregressive model, it is ROME's own. delta is kept within clamp_norm_factor ||v_0||.
ROME puts delta in at the subject's token alone, but its rank-one update dW = delta r^T also adds (r . k)
delta at every other position, k being what enters the map there; with `optimise_through: weights` the loss is
that of the model so changed. Facts that share one update dW = sum_f delta_f r_f^T see all of it, and are
optimised jointly. The optimisation is batched over facts; a fact that has converged leaves the
batch. What lies below delta is computed once where the states stay the same from step to step: all layers up
to the edited one, whose own output delta is added to, wherever the site's output goes into the residual
stream as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.denoising import States
from easyedit_mdm.editing.facts import Fact, fact_generator
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.solve.card import Outcome
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.editing.solve.rollout import states_met
from easyedit_mdm.editing.solve.rows import Rows, build_rows
from easyedit_mdm.errors import OptimisationError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.hooks import (
    added_at,
    adding_at,
    frozen,
    reach_of,
    reaches_of,
    reading_input,
    spread_all_over,
    spread_over,
    writing_all_through,
    writing_through,
)
from easyedit_mdm.models.prefix import Prefix, can_keep, logits_after, read_prefix

_DRAWS = 10_000  # of noise that a fact's rows of one step have to themselves


@dataclass
class Optimised(Outcome):
    """The outcome for one fact.

    Attributes:
        delta: what is to be added to the site's output.

    `layer_passes` counts the layers above the edit at every step; those up to it once, or at every step where
    states are drawn anew; all of them in a roll-out, a row a slot. A row of which a causal model runs only a
    part counts whole.
    """

    delta: Float[Tensor, " width"] = field(kw_only=True)


def optimise(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    initial: Float[Tensor, "facts width"],
    hparams: ROMEMDMHyperParams,
    rights: Float[Tensor, "facts inner"] | None = None,
    together: bool = False,
    price: Float[Tensor, "facts facts"] | None = None,
) -> list[Optimised]:
    """Optimise one delta a fact, `facts_per_batch` at a time; a batch that does not fit into memory is
    halved.

    What is drawn at random for a fact depends on the seed and on the fact alone, so that the company it is
    edited in changes nothing.

    Args:
        initial: v_0 of each fact, against whose norm delta is clamped: the site's output, or its block's, for
            the bare prompt.
        rights: the r of each fact's update delta r^T, through which delta is then optimised; None: as an
            activation at the site.
        together: the model carries the updates of all facts, not each row its own fact's alone. All facts
            are then optimised at once, and end together.
        price: what the updates cost elsewhere; sum_fg price_fg (delta_f . delta_g) / (||v_0f|| ||v_0g||) is
            added to the loss.

    Raises:
        OptimisationError: if a loss is not a number; no weight has been touched.
    """
    if together:
        return _optimise(adapter, site, facts, initial, hparams, rights, together, price)
    done: list[Optimised] = []
    size = min(hparams.facts_per_batch, len(facts))
    while len(done) < len(facts):
        part = slice(len(done), len(done) + size)
        try:
            done += _optimise(
                adapter,
                site,
                facts[part],
                initial[part],
                hparams,
                None if rights is None else rights[part],
                price=None if price is None else price[part, part],
            )
        except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
            if size == 1 or not _out_of_memory(error):
                raise
            size = (size + 1) // 2
        if adapter.device.type == "cuda":
            torch.cuda.empty_cache()
    return done


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(
        error
    )


def _optimise(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    initial: Float[Tensor, "facts width"],
    hparams: ROMEMDMHyperParams,
    rights: Float[Tensor, "facts inner"] | None = None,
    together: bool = False,
    price: Float[Tensor, "facts facts"] | None = None,
) -> list[Optimised]:
    plans = [Plan.asked(adapter, fact, hparams) for fact in facts]
    deltas = [torch.zeros_like(v, requires_grad=True) for v in initial]
    done = [Optimised(delta=d, schedule=p.used) for d, p in zip(deltas, plans)]
    recent: list[deque[float]] = [
        deque(maxlen=1 if hparams.early_stop_on == "drawn" else p.cycle) for p in plans
    ]
    optimizer = torch.optim.Adam(deltas, lr=hparams.v_lr)
    rates = _rates(optimizer, hparams)
    kind = (
        _CausalForward if rights is None and can_keep(adapter) else _Forward
    )  # the weights change what stands before the subject, too
    forward = kind(adapter, site, facts, plans, hparams, rights, together)
    forward.price = None if price is None else price.to(initial)
    active = list(range(len(facts)))
    with frozen(adapter):
        for step in range(hparams.v_num_grad_steps):
            optimizer.zero_grad()
            last = step == hparams.v_num_grad_steps - 1
            losses = forward.losses(step, active, deltas, initial, backward=not last)
            going = _record(losses, active, done, recent, hparams, step)
            active = active if together and going else going
            if last or not active:
                break
            for i in set(range(len(facts))) - set(active):
                deltas[i].grad = None  # converged: Adam leaves it alone
            optimizer.step()
            rates.step()
            _clamp([deltas[i] for i in active], initial[active], hparams.clamp_norm_factor)
            for i in active:
                done[i].steps += 1
    for i, (forwards, layer_passes) in enumerate(forward.count.T.tolist()):
        done[i].delta = deltas[i].detach()
        done[i].forwards, done[i].layer_passes = forwards, layer_passes
    return done


def _rates(
    optimizer: torch.optim.Optimizer, hparams: ROMEMDMHyperParams
) -> torch.optim.lr_scheduler.LRScheduler:
    if hparams.v_lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=max(1, hparams.v_num_grad_steps - 1)
        )
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _record(
    losses: Tensor,
    active: list[int],
    done: list[Optimised],
    recent: list[deque],
    hparams: ROMEMDMHyperParams,
    step: int,
) -> list[int]:
    """Note the losses; the facts that go on are those whose mean over a full cycle is not below the
    threshold.
    """
    going = []
    for i, loss in zip(active, losses.tolist()):
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise OptimisationError(
                f"the loss of fact {i} is {loss} at step {step}: the optimisation left the finite numbers"
                f" (v_lr={hparams.v_lr}, model weights or dtype?). No weight was changed."
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


@dataclass(frozen=True)
class Below:
    """What enters a layer in some rows; in a causal model only from the subject's token on, the rest being
    kept.
    """

    hidden: Float[Tensor, "rows length width"]
    prefix: Prefix | None = None

    @property
    def start(self) -> int:
        """The first column of `hidden`."""
        return 0 if self.prefix is None else self.prefix.columns

    def take(self, index: Tensor) -> Below:
        """That of some of the rows."""
        return Below(self.hidden[index], None if self.prefix is None else self.prefix.take(index))

    def logits(self, adapter: Adapter, layer: int, rows: Rows) -> Float[Tensor, "rows slots vocab"]:
        """The logits at the columns that the rows are read at."""
        if self.prefix is None:
            return adapter.token_logits(
                rows.ids, rows.mask, at=rows.at, layer=layer, hidden=self.hidden, canvas=rows.canvas
            )
        return logits_after(adapter, self.prefix, self.hidden, rows.mask, rows.at)


class _Forward:
    """Losses of the active facts, with the rows and what lies below the edit kept for as long as they stay
    the same.

    `layer` is the first that is run anew at every step: the one above the site where delta can be added to
    the stream between them, otherwise the site's own.
    """

    def __init__(
        self,
        adapter: Adapter,
        site: Site,
        facts: Sequence[Fact],
        plans: list[Plan],
        hparams: ROMEMDMHyperParams,
        rights: Float[Tensor, "facts inner"] | None = None,
        together: bool = False,
    ):
        self.adapter, self.site, self.facts, self.plans = adapter, site, facts, plans
        self.hparams, self.rights, self.together = hparams, rights, together
        self.above = adapter.ends_block(site)
        self.layer = site.layer + self.above
        self.generators = [fact_generator(fact, hparams.seed) for fact in facts]
        self.fixed = all(plan.fixed for plan in plans)
        self.kept: tuple[list[int], Rows, Tensor] | None = None
        self.anchors: Float[Tensor, "facts vocab"] | None = None
        self.price: Float[Tensor, "facts facts"] | None = None
        self.count = torch.zeros(
            2, len(facts), dtype=torch.long, device=adapter.device
        )  # forwards, layer-passes

    def _counted(self, rows: Rows, layers: int, forwards: int = 0) -> None:
        """Note that rows went through some layers."""
        each = torch.tensor([[forwards], [layers]], device=self.count.device)
        self.count.index_add_(1, rows.fact, each.expand(2, len(rows)))

    def losses(
        self,
        step: int,
        active: list[int],
        deltas: list[Tensor],
        initial: Float[Tensor, "facts width"],
        backward: bool,
    ) -> Float[Tensor, " active"]:
        """Total loss of each active fact; gradients go into the deltas."""
        place = torch.zeros(len(self.facts), dtype=torch.long, device=self.count.device)
        place[active] = torch.arange(len(active), device=place.device)
        total = torch.zeros(len(active), device=self.count.device)
        for rows, below in self._passes(step, active, deltas):
            stacked = torch.stack([deltas[i] for i in active])
            loss = self._chunk(rows, below, stacked, place)
            if backward:
                loss.sum().backward()
            total += loss.detach().to(total.device)
            self._counted(rows, self.adapter.layers - self.layer, 1)
        stacked = torch.stack([deltas[i] for i in active])
        size = initial[active].norm(dim=1)
        decay = self.hparams.v_weight_decay * stacked.norm(dim=1) / size**2
        if self.price is not None:
            scaled = stacked / size[:, None]
            decay = decay + (scaled * (self.price[active][:, active] @ scaled)).sum(1)
        if backward:
            decay.sum().backward()
        return total + decay.detach().to(total.device)

    def _passes(self, step: int, active: list[int], deltas: list[Tensor]) -> Iterator[tuple[Rows, Below]]:
        """The rows of one step, pass by pass, each with the input of `layer`."""
        rows, below = self._rows(step, active, deltas)
        for chunk, length, slots in rows.chunks(self.hparams.max_rows):
            yield rows.take(chunk).cut(length, slots), Below(below[chunk, :length])

    def _rows(self, step: int, active: list[int], deltas: list[Tensor]) -> tuple[Rows, Tensor]:
        """The rows of one step and the input of `layer` in each."""
        if self.kept is None or not self.fixed:
            self.kept = self._build(step, active, deltas)
        known, rows, below = self.kept
        if known != active:
            going = torch.isin(rows.fact, torch.tensor(active, device=rows.fact.device))
            rows, below = rows.take(going), below[going]
            self.kept = (list(active), rows, below)
        counting = rows.counting(step)
        return (
            (rows.take(counting), below[counting])
            if any(self.plans[i].dealt for i in active)
            else (rows, below)
        )

    def _build(self, step: int, active: list[int], deltas: list[Tensor]) -> tuple[list[int], Rows, Tensor]:
        """All rows of some facts. Kept where the rows are, whatever device the lower layers are on."""
        states = {i: self.plans[i].draw(step, self.generators[i]) for i in active if not self.plans[i].rolled}
        states |= self._rolled([i for i in active if self.plans[i].rolled], deltas)
        rows = build_rows(
            self.adapter,
            {i: self.facts[i] for i in active},
            states,
            self.hparams.kl_position,
            self.plans[active[0]].dealt,
            step * _DRAWS,
        )
        self._counted(rows, self.layer)
        module = self.adapter.module(self.site.name)
        through = (
            self.rights if self.above else None
        )  # otherwise the site runs at every step, and is hooked there
        last = (len(self.facts),) if self.together else ()
        reach = rows.reach = (
            None if through is None else torch.zeros(*rows.ids.shape, *last, device=rows.ids.device)
        )
        with torch.no_grad():
            below: Tensor | None = None
            for chunk, length, slots in rows.chunks(self.hparams.max_rows):
                part = rows.take(chunk).cut(length, slots)
                reading: AbstractContextManager[list[Tensor]] = (
                    nullcontext([]) if through is None else reading_input(module)
                )
                with reading as entering:
                    hidden = self.adapter.hidden_before(
                        self.layer, part.ids, part.mask, canvas=part.canvas
                    ).to(rows.ids.device)
                below = hidden.new_zeros(*rows.ids.shape, hidden.shape[-1]) if below is None else below
                below[chunk, :length] = hidden
                if (
                    through is not None and reach is not None
                ):  # what enters the edited map lies below the edit, and stays
                    arriving = (
                        reaches_of(entering[0], through)
                        if self.together
                        else reach_of(entering[0], through[part.fact.to(through.device)])
                    )
                    reach[chunk, :length] = arriving.to(reach.device)
        return list(active), rows, cast(Tensor, below)  # there is at least the anchor's row

    def _rolled(
        self, facts: list[int], deltas: list[Tensor]
    ) -> dict[int, list[tuple[tuple[int, ...], States]]]:
        """The states that the model comes through after each group's first prefix."""
        met = states_met(
            self.adapter, self.site, self.facts, self.plans, facts, deltas, self.rights, self.together
        )
        for i, groups in met.items():  # a row for each slot in turn
            self.count[1, i] += self.adapter.layers * len(self.facts[i].target) * len(groups)
        return met

    def _chunk(
        self, rows: Rows, below: Below, deltas: Float[Tensor, "active width"], place: Tensor
    ) -> Float[Tensor, " active"]:
        """NLL and KL of some rows, added up by fact."""
        logits = self._logits(rows, below, deltas, deltas[place[rows.fact].to(deltas.device)])
        log_probs = logits.float().log_softmax(-1)
        right = log_probs.gather(-1, rows.tokens.to(log_probs.device)[..., None])[..., 0]
        each = -(right * rows.weights.to(right.device)).sum(-1)
        anchors = rows.anchor.to(each.device).nonzero()[:, 0]
        if self.hparams.kl_factor and len(anchors):
            each = each.index_add(
                0,
                anchors,
                self.hparams.kl_factor * self._kl(rows.fact.to(each.device)[anchors], log_probs[anchors, 0]),
            )
        return torch.zeros(len(deltas), device=each.device).index_add(
            0, place[rows.fact].to(each.device), each
        )

    def _logits(
        self,
        rows: Rows,
        below: Below,
        deltas: Float[Tensor, "active width"],
        added: Float[Tensor, "rows width"],
    ) -> Float[Tensor, "rows slots vocab"]:
        """The logits at the slots with the deltas in; `added` is that of each row's own fact."""
        at = rows.fact_at - below.start
        if not self.above:
            module = self.adapter.module(self.site.name)
            rights = None if self.rights is None else self.rights[rows.fact.to(self.rights.device)]
            with (
                adding_at(module, at, added)
                if rights is None or self.rights is None
                else writing_all_through(module, self.rights, deltas)
                if self.together
                else writing_through(module, rights, added)
            ):
                return below.logits(self.adapter, self.layer, rows)
        if rows.reach is None:
            hidden = added_at(below.hidden, at, added)
        elif self.together:
            hidden = spread_all_over(below.hidden, rows.reach, deltas)
        else:
            hidden = spread_over(below.hidden, rows.reach, added)
        return replace(below, hidden=hidden).logits(self.adapter, self.layer, rows)

    def _kl(
        self, facts: Int[Tensor, " anchors"], now: Float[Tensor, "anchors vocab"]
    ) -> Float[Tensor, " anchors"]:
        """KL(current || initial) at the anchors. The first step, delta being 0, sets the initial ones."""
        if self.anchors is None:
            self.anchors = torch.full((len(self.facts), now.shape[1]), torch.nan, device=now.device)
        unset = self.anchors[facts, :1].isnan()
        self.anchors[facts] = torch.where(unset, now.detach(), self.anchors[facts])
        return (now.exp() * (now - self.anchors[facts])).sum(-1)


class _CausalForward(_Forward):
    """The same for causal models: what stands before the subject's last token is run through all layers
    once.
    """

    def _passes(self, step: int, active: list[int], deltas: list[Tensor]) -> Iterator[tuple[Rows, Below]]:
        """As in any model; rows of a pass are shifted so that the subject's tokens stand in one column."""
        if self.kept is None:
            _, rows, below = self._build(step, active, deltas)
            chunks = rows.chunks(self.hparams.max_rows, by_rest=True)
            self.parts = [
                self._aligned(rows.take(chunk).cut(length, slots), below[chunk, :length])
                for chunk, length, slots in chunks
            ]
            self.kept = (list(active), rows, below[:0])
        if self.kept[0] != active:
            going = torch.tensor(active, device=self.count.device)
            index = [torch.isin(rows.fact, going).nonzero()[:, 0] for rows, _ in self.parts]
            self.parts = [
                (rows.take(some), below.take(some))
                for (rows, below), some in zip(self.parts, index)
                if len(some)
            ]
            self.kept = (list(active), *self.kept[1:])
        yield from self.parts

    def _aligned(self, rows: Rows, below: Tensor) -> tuple[Rows, Below]:
        """Rows of one pass, and what of them is computed anew at every step: the columns from the subject's
        last token on.
        """
        shifted = rows.aligned(self.adapter.ids.pad)
        start = int(shifted.fact_at[0])
        if start == 0:
            return rows, Below(below)
        self._counted(rows, self.adapter.layers - self.layer)
        shift = (shifted.fact_at - rows.fact_at).tolist()
        hidden = below.new_zeros(len(rows), shifted.ids.shape[1], below.shape[-1])
        for row, (by, length) in enumerate(zip(shift, rows.mask.sum(1).tolist())):
            hidden[row, by : by + length] = below[row, :length]
        return shifted, Below(
            hidden[:, start:], read_prefix(self.adapter, self.layer, hidden[:, :start], shifted.mask)
        )
