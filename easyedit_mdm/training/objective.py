"""The loss of `adapt`: masked slots of noisy blocks, and the frozen teacher on the clean copy.

    loss = mean over blocks of (1/k) sum over its k scored slots of
               -log p(token | clean tokens before the block, shown slots)
           + kl_weight * mean over sampled clean positions of KL(teacher || model)

Logits are shifted: the token at j is predicted at j - 1, as in Dream (arXiv 2508.15487). So a block's first
slot is predicted by the clean token before it, where the second term holds the model to its teacher, and is
not scored in the first. Where all slots on the left show and none on the right, the teacher knows the
answer's distribution: the slot's term is then KL(teacher || model).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.training.blocks import Rows, additive, visible


@dataclass
class Student:
    """An autoregressive model that becomes a masked one.

    Attributes:
        model: the model with trainable LoRA layers in it (peft's), or without.
        mask_row: the mask token's embedding, trained with them.
        mask_id: its id.
        without: a context in which the model computes as its teacher, such as peft's `disable_adapter`.
    """

    model: Any
    mask_row: torch.nn.Parameter
    mask_id: int
    without: Callable[[], AbstractContextManager]

    @property
    def base(self) -> Any:
        """The transformers model, LoRA layers inside."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def hidden(self, rows: Rows) -> Float[Tensor, "rows length width"]:
        """What enters the head, under the rows' attention."""
        embedded = self.base.get_input_embeddings()(rows.ids)
        embedded = torch.where(
            (rows.ids == self.mask_id)[..., None], self.mask_row.to(embedded.dtype), embedded
        )
        mask = additive(visible(rows), embedded.dtype)
        backbone = self.base.base_model
        return backbone(
            inputs_embeds=embedded, attention_mask=mask, position_ids=rows.positions, use_cache=False
        )[0]

    def log_probabilities(
        self, hidden: Float[Tensor, "places width"], teacher: bool = False
    ) -> Float[Tensor, "places vocab"]:
        """Of the next token, as the saved model will say it: a tied head has the mask's trained row.

        Args:
            teacher: `hidden` is the teacher's, whose head has the row that the base came with.
        """
        logits = self.base.get_output_embeddings()(hidden).float()
        if self.base.config.tie_word_embeddings and not teacher:
            logits[:, self.mask_id] = (hidden.float() @ self.mask_row.float()).float()  # in place: no copy
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class Losses:
    """The loss, and its two terms as numbers for the log."""

    total: Tensor
    masked: Tensor
    kl: Tensor


def losses(
    student: Student, rows: Rows, generator: torch.Generator, kl_weight: float = 1.0, taught: float = 0.25
) -> Losses:
    """The loss of a batch.

    Args:
        generator: draws the rows that the teacher reads.
        taught: share of the rows that it reads; a part of a row is left to chance. All of them would be a
            quarter of the work.
    """
    states = student.hidden(rows).flatten(0, 1)
    count = int(taught * len(rows) + torch.rand((), generator=generator))
    asked = _Asked(rows, count, generator)
    targets, weights = rows.targets.flatten(), rows.weights.flatten()
    scored = (targets >= 0).nonzero().flatten()
    soft, sources = asked.places_of(rows.teachers.flatten()[scored], scored)
    teacher = asked.log_probabilities(student, torch.cat([sources, asked.clean]))
    log_probs = student.log_probabilities(torch.cat([states[scored - 1], states[asked.clean]]))
    slots, kept = log_probs.split([len(scored), len(log_probs) - len(scored)])
    terms = -slots.gather(-1, targets[scored][:, None])[:, 0]
    if len(sources):
        terms = terms.masked_scatter(soft, _kl(teacher[: len(sources)], slots[soft]))
    masked = (terms * weights[scored]).sum() / weights.sum().clamp(min=1)  # each block's weights sum to 1
    kl = _kl(teacher[len(sources) :], kept).mean() if len(asked.clean) else masked.new_zeros(())
    return Losses(masked + kl_weight * kl, masked.detach(), kl.detach())


class _Asked:
    """The rows that the teacher reads: their clean columns, moved to the left."""

    def __init__(self, rows: Rows, count: int, generator: torch.Generator):
        self.length = rows.ids.shape[1]
        self.rows = torch.randperm(len(rows), generator=generator)[:count].sort().values.to(rows.ids.device)
        self.part = clean_part(Rows(**{name: value[self.rows] for name, value in vars(rows).items()}))
        clean = (rows.texts > 0) & (rows.blocks == 0)
        number = torch.full((len(rows),), -1, device=rows.ids.device)
        number[self.rows] = torch.arange(count, device=number.device)
        self._number, self._column = number, clean.cumsum(1).flatten() - 1
        self.clean = (clean & (number >= 0)[:, None]).flatten().nonzero().flatten()

    def places_of(
        self, columns: Int[Tensor, " slots"], scored: Int[Tensor, " slots"]
    ) -> tuple[Bool[Tensor, " slots"], Int[Tensor, " places"]]:
        """Which scored slots the teacher can speak of, and the flat places of the clean tokens before them.

        Args:
            columns: `Rows.teachers` at the scored slots.
            scored: their flat places.
        """
        row = scored // self.length
        soft = (columns >= 0) & (self._number[row] >= 0)
        return soft, columns[soft] + row[soft] * self.length

    @torch.no_grad()
    def log_probabilities(
        self, student: Student, places: Int[Tensor, " places"]
    ) -> Float[Tensor, "places vocab"]:
        """What the teacher says of the token after the clean columns at these flat places."""
        if not len(places):
            return torch.zeros(0, 1, device=places.device)
        with student.without():
            hidden = student.hidden(self.part)
            return student.log_probabilities(
                hidden[self._number[places // self.length], self._column[places]], teacher=True
            )


def clean_part(rows: Rows) -> Rows:
    """The clean columns alone, moved to the left, and padded to the longest row."""
    clean = (rows.texts > 0) & (rows.blocks == 0)
    longest = max([1, *clean.sum(1).tolist()])
    order = (~clean).long().argsort(dim=1, stable=True)[:, :longest]
    kept = clean.gather(1, order)
    fields = {name: value.gather(1, order) * kept for name, value in vars(rows).items()}
    return Rows(**fields)


def _kl(
    teacher: Float[Tensor, "places vocab"], student: Float[Tensor, "places vocab"]
) -> Float[Tensor, " places"]:
    return torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
