"""The loss of facts over the states of their targets, in a model whose weights are being trained.

    L_f = sum_S w_S  mean_{prefixes}  mean_{i not in S}  -log p(y_i | prompt, y_S)

is the first term of the value optimisation's loss (`solve.value`); on an autoregressive model it is the mean
negative log-likelihood of the target's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.editing.facts import Fact, fact_generator
from easyedit_mdm.editing.hparams import StateHyperParams
from easyedit_mdm.editing.solve.card import Outcome
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.editing.solve.rollout import states_met
from easyedit_mdm.editing.solve.rows import Rows, build_rows
from easyedit_mdm.models import Adapter

_DRAWS = 10_000  # of noise that a fact's rows of one step have to themselves


class StateLosses:
    """Losses of facts, and their gradients in whatever asks for one.

    What is drawn for a fact depends on the seed and on the fact alone. Rows of facts whose states stay the
    same from step to step are kept, with the input of the lowest layer that is trained.

    Args:
        first: the lowest layer with something that is trained.
        at_prompt: every token of the target is read at the first slot, as EasyEdit's `prompt_last` does.

    Attributes:
        outcomes: schedule and cost of each fact, to which the caller adds losses and steps.
    """

    def __init__(
        self,
        adapter: Adapter,
        facts: Sequence[Fact],
        hparams: StateHyperParams,
        first: int = 0,
        at_prompt: bool = False,
    ):
        self.adapter, self.facts, self.hparams = adapter, facts, hparams
        self.first, self.at_prompt = first, at_prompt
        self.plans = [Plan.asked(adapter, fact, hparams) for fact in facts]
        self.outcomes = [Outcome(schedule=plan.used) for plan in self.plans]
        self._generators = [fact_generator(fact, hparams.seed) for fact in facts]
        self._kept: dict[tuple[int, ...], list[tuple[Rows, Tensor | None]]] = {}

    @property
    def cycle(self) -> int:
        """Steps after which every kind of state of every fact has been seen."""
        return max(plan.cycle for plan in self.plans)

    def backward(
        self, step: int, some: Sequence[int], shares: Float[Tensor, " some"]
    ) -> Float[Tensor, " some"]:
        """The losses of some facts (by number) at a step. The gradient of their sum, weighted by `shares`, is
        added up pass by pass.
        """
        place = torch.zeros(len(self.facts), dtype=torch.long, device=self.adapter.device)
        place[list(some)] = torch.arange(len(some), device=place.device)
        shares = shares.to(place.device)
        total = torch.zeros(len(some), device=place.device)
        for rows, below in self._passes(step, tuple(some)):
            each, owner = self._each(rows, below), place[rows.fact]
            (each * shares[owner]).sum().backward()
            total.index_add_(0, owner, each.detach().to(total.dtype))
            self._count(rows.fact, self.adapter.layers - self.first, 1)
        return total

    def forget(self) -> None:
        """Drop the rows that are kept from step to step."""
        self._kept.clear()

    def _passes(self, step: int, some: tuple[int, ...]) -> Iterator[tuple[Rows, Tensor | None]]:
        """The rows of one step, pass by pass, each with the input of the lowest trained layer."""
        passes = self._kept.get(some)
        if passes is None:
            passes = list(self._built(step, some))
            if all(self.plans[i].fixed for i in some):
                self._kept[some] = passes
        for rows, below in passes:
            counting = rows.counting(step)
            if counting.all():
                yield rows, below
            elif counting.any():
                yield rows.take(counting), None if below is None else below[counting]

    def _built(self, step: int, some: tuple[int, ...]) -> Iterator[tuple[Rows, Tensor | None]]:
        rolled = [i for i in some if self.plans[i].rolled]
        states = {i: self.plans[i].draw(step, self._generators[i]) for i in some if i not in rolled}
        met = states_met(self.adapter, None, self.facts, self.plans, rolled, inserted=self._inserted)
        for i, groups in met.items():  # a row for each slot in turn
            passes = self.adapter.layers * len(self.facts[i].target) * len(groups)
            self.outcomes[i].layer_passes += passes
        facts, dealt = {i: self.facts[i] for i in some}, self.plans[some[0]].dealt
        rows = build_rows(self.adapter, facts, states | met, None, dealt, step * _DRAWS)
        if self.at_prompt:
            rows = replace(rows, at=rows.canvas[:, None].expand_as(rows.at))
        for chunk, length, slots in rows.chunks(self.hparams.max_rows):
            part = rows.take(chunk).cut(length, slots)
            yield part, self._below(part)

    def _inserted(self, facts: Sequence[int], at: Int[Tensor, " rows"]) -> AbstractContextManager[None]:
        """What is in the model while it decodes, in a row for each of these facts (by number), with the fact
        at these columns: the trained weights are in it already.
        """
        return nullcontext()

    def _below(self, rows: Rows) -> Tensor | None:
        """The input of the lowest trained layer."""
        if not self.first:
            return None
        self._count(rows.fact, self.first)
        with torch.no_grad():
            return self.adapter.hidden_before(self.first, rows.ids, rows.mask, canvas=rows.canvas)

    def _each(self, rows: Rows, below: Tensor | None) -> Float[Tensor, " rows"]:
        """The loss of each row, weighted as it counts in its fact's."""
        logits = self.adapter.token_logits(
            rows.ids, rows.mask, at=rows.at, layer=self.first, hidden=below, canvas=rows.canvas
        )
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        right = log_probs.gather(-1, rows.tokens[..., None])[..., 0]
        return -(right * rows.weights).sum(-1)

    def _count(self, owners: Int[Tensor, " rows"], layers: int, forwards: int = 0) -> None:
        """Note that rows went through some layers."""
        for i in owners.tolist():
            self.outcomes[i].layer_passes += layers
            self.outcomes[i].forwards += forwards
