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
        inside: LoRA's product is added to each weight once a pass (W + s B A), instead of being computed
            beside it for every column. The same function; with many columns on a GPU, less work and memory.
    """

    model: Any
    mask_row: torch.nn.Parameter
    mask_id: int
    without: Callable[[], AbstractContextManager]
    inside: bool = False

    @property
    def base(self) -> Any:
        """The transformers model, LoRA layers inside."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def hidden(self, rows: Rows, teacher: bool = False) -> Float[Tensor, "rows length width"]:
        """What enters the head, under the rows' attention.

        Args:
            teacher: as the model computed before it was trained.
        """
        embedded = self.base.get_input_embeddings()(rows.ids)
        embedded = torch.where(
            (rows.ids == self.mask_id)[..., None], self.mask_row.to(embedded.dtype), embedded
        )
        mask = additive(visible(rows), embedded.dtype)
        given = {
            "inputs_embeds": embedded,
            "attention_mask": mask,
            "position_ids": rows.positions,
            "use_cache": False,
        }
        backbone = self.base.base_model
        if not (teacher or self.inside):
            return backbone(**given)[0]
        weights = {} if teacher else self._weights(backbone)
        with self.without():
            return torch.func.functional_call(backbone, weights, args=(), kwargs=given)[0]

    @staticmethod
    def _weights(backbone: Any) -> dict[str, Tensor]:
        """Every adapted weight with its adapter's product in it, in the weight's own precision."""
        adapted = {name: part for name, part in backbone.named_modules() if hasattr(part, "get_delta_weight")}
        device = next(backbone.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return {
                f"{name}.base_layer.weight": part.base_layer.weight + part.get_delta_weight("default")
                for name, part in adapted.items()
            }

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


def next_token(student: Student, rows: Rows) -> Losses:
    """The loss of the control: the next token of every clean column, as the base was trained."""
    states, ids = student.hidden(rows).flatten(0, 1), rows.ids.flatten()
    texts = rows.texts.flatten()
    clean = (texts > 0) & (rows.blocks.flatten() == 0)
    at = (clean[1:] & clean[:-1] & (texts[1:] == texts[:-1])).nonzero().flatten()
    own = student.log_probabilities(states[at]).gather(-1, ids[at + 1][:, None])
    loss = -own.mean()
    return Losses(loss, loss.detach(), loss.new_zeros(()))


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
        hidden = student.hidden(self.part, teacher=True)
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
