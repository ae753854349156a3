"""Training a side memory: a change of one linear map that says new targets at the fact's token and is small
everywhere else (WISE, Wang et al., arXiv 2405.14768, sections 2.3 and 2.4).

The loss of a row is

    L + max(0, out - alpha) + max(0, beta - in) + max(0, gamma - (in - out))

with L as in `solve.losses`, `in` the norm of what the memory adds at the fact's token, and `out` the mean of
such norms over the row's other tokens. (The paper takes other prompts for `out`, and EasyEdit, for facts with
a subject, the other tokens of the same one.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.editing.facts import Fact, fact_generator
from easyedit_mdm.editing.hparams import StateHyperParams
from easyedit_mdm.editing.solve.card import Outcome, note_losses
from easyedit_mdm.editing.solve.losses import StateLosses
from easyedit_mdm.editing.solve.rows import Rows
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.hooks import answering, frozen

_SETTLED, _LOW = 1e-4, 0.02  # EasyEdit's early stop: the loss has stopped falling, and is low


@dataclass
class SideHyperParams(StateHyperParams):
    """What training a side memory needs; EasyEdit's WISE has the first five under the same names.

    Attributes:
        edit_lr: rate of plain gradient descent.
        n_iter: the most steps.
        mask_ratio: share of the weight's entries that a shard may change, drawn from seed and facts.
        act_margin: alpha, beta and gamma of the loss.
        norm_constraint: the most that an entry may change; none if null or false.
        side_output: where the memory adds to the output while it is trained: at the `fact`'s token alone, as
            it will where other tokens stay below the threshold, or `everywhere`, as in EasyEdit.
    """

    edit_lr: float = 1.0
    n_iter: int = 70
    mask_ratio: float = 0.2
    act_margin: list[int | float] = field(default_factory=lambda: [5.0, 20.0, 10.0])
    norm_constraint: float | bool | None = 1.0
    side_output: str = "fact"


class _SideLosses(StateLosses):
    """Losses with the memory in, margins included."""

    def __init__(
        self,
        adapter: Adapter,
        site: Site,
        facts: Sequence[Fact],
        delta: Float[Tensor, "width inner"],
        hparams: SideHyperParams,
    ):
        super().__init__(adapter, facts, hparams, site.layer)
        self.module, self.delta, self.margins = adapter.module(site.name), delta, hparams.act_margin
        self.everywhere = hparams.side_output == "everywhere"
        self._sizes: Tensor | None = None

    def _each(self, rows: Rows, below: Tensor | None) -> Float[Tensor, " rows"]:
        """As `StateLosses`, with the row's margins, which count as the row does in its fact's loss."""
        with self._inserted(rows.fact.tolist(), rows.fact_at):
            losses = super()._each(rows, below)
        inside, outside = self.sizes(rows)
        alpha, beta, gamma = self.margins
        margins = (outside - alpha).relu() + (beta - inside).relu() + (gamma - inside + outside).relu()
        return losses + rows.weights.sum(-1) * margins.to(losses.device)

    def _inserted(self, facts: Sequence[int], at: Int[Tensor, " rows"]) -> AbstractContextManager[None]:
        """The memory, in place of those that are at the site already: one shard answers at a time."""
        return answering(self.module, partial(self._answered, at))

    def _answered(self, at: Tensor, entering: Tensor, _: Tensor) -> Tensor:
        """The site's own output with the memory's, whose norms are kept."""
        out = self.module.forward(entering)  # without the hooks of other memories
        added = entering.float() @ self.delta.to(entering.device).T
        self._sizes = added.norm(dim=-1)
        if not self.everywhere:
            here = torch.arange(added.shape[1], device=added.device) == at.to(added.device)[:, None]
            added = added * here[..., None]
        return out + added.to(out)

    def sizes(self, rows: Rows) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Of the pass that was just made: what the memory adds at the fact's token, and in the mean at the
        row's other tokens.
        """
        assert self._sizes is not None
        sizes, at = self._sizes, rows.fact_at.to(self._sizes.device)[:, None]
        inside = sizes.gather(1, at)[:, 0]
        others = rows.mask.to(sizes).scatter(1, at, 0.0)
        return inside, (sizes * others).sum(1) / others.sum(1).clamp(min=1)

    @torch.no_grad()
    def least_inside(self) -> float:
        """The smallest norm of what the memory adds at a fact's token, over all facts and a cycle of
        states.
        """
        least = float("inf")
        for step in range(self.cycle):
            for rows, below in self._passes(step, tuple(range(len(self.facts)))):
                self._each(rows, below)
                self._count(rows.fact, self.adapter.layers - self.first, 1)
                least = min(least, float(self.sizes(rows)[0].min()))
        return least


def train_side(
    adapter: Adapter, site: Site, facts: Sequence[Fact], hparams: SideHyperParams
) -> tuple[Float[Tensor, "width inner"], float, list[Outcome]]:
    """Train one shard on some facts.

    Returns:
        the change of the weight, float32 on the CPU; the smallest activation at a fact's token; and what the
        optimisation of each fact did.

    Raises:
        OptimisationError: if a loss is not a number.
    """
    weight = adapter.weight_of(site.name)
    shape = tuple(reversed(weight.shape)) if site.transposed else tuple(weight.shape)
    chosen = torch.rand(shape, generator=fact_generator(facts[0], hparams.seed)) < hparams.mask_ratio
    device = adapter.device if weight.is_meta else weight.device
    delta = torch.zeros(shape, device=device, requires_grad=True)
    chosen = chosen.to(delta.device)
    losses = _SideLosses(adapter, site, facts, delta, hparams)
    optimizer = torch.optim.SGD([delta], lr=hparams.edit_lr)
    with frozen(adapter):
        _descend(losses, optimizer, delta, chosen, hparams)
        least = losses.least_inside()
    return delta.detach().cpu(), least, losses.outcomes


def _descend(
    losses: _SideLosses,
    optimizer: torch.optim.Optimizer,
    delta: Tensor,
    chosen: Tensor,
    hparams: SideHyperParams,
) -> None:
    """Gradient descent on the chosen entries, until the loss is low and falls no more."""
    everyone = list(range(len(losses.facts)))
    shares = torch.full((len(everyone),), 1.0 / len(everyone))
    most = float(hparams.norm_constraint) if hparams.norm_constraint else None
    before, now = float("inf"), 1e9
    for step in range(hparams.n_iter):
        if abs(now - before) <= _SETTLED and now <= _LOW:
            break
        optimizer.zero_grad()
        each = losses.backward(step, everyone, shares).cpu()
        note_losses(losses.outcomes, each, step, f"edit_lr={hparams.edit_lr}")
        for outcome in losses.outcomes:
            outcome.steps += 1
        assert delta.grad is not None
        delta.grad.mul_(chosen)
        optimizer.step()
        if most is not None:
            with torch.no_grad():
                delta.clamp_(-most, most)
        before, now = now, float((each * shares).sum())
