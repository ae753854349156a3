"""What an edit says about itself, and how its optimisation went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from easyedit_mdm.editing.edit.card import Card, FactRecord
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.hparams import MethodHyperParams
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.errors import OptimisationError


@dataclass
class Outcome:
    """How the optimisation for one fact went.

    Attributes:
        losses: total loss before each step; for schedules that draw, of the states drawn.
        steps: optimiser steps taken.
        schedule: the schedule that was used, and the one asked for.
        forwards: rows that went through the layers from the edited one up.
        layer_passes: rows times the layers that each went through, forward only.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    schedule: str = ""
    forwards: int = 0
    layer_passes: int = 0


def note_losses(outcomes: Sequence[Outcome], losses: Tensor, step: int, settings: str) -> None:
    """Add a step's losses to what has been noted of some facts.

    Args:
        losses: one a fact.
        settings: what may be wrong where one is not a number, such as `lr=1.0`.

    Raises:
        OptimisationError: then.
    """
    if not losses.isfinite().all():
        raise OptimisationError(
            f"a loss is {losses.tolist()} at step {step}: the training left the finite numbers ({settings},"
            " model weights or dtype?). No weight was changed."
        )
    for outcome, loss in zip(outcomes, losses.tolist()):
        outcome.losses.append(loss)


def card(
    requests: Sequence[EditRequest],
    facts: Sequence[Fact],
    hparams: MethodHyperParams,
    outcomes: Sequence[Outcome],
    figures: dict[str, Any],
) -> Card:
    """The card of a new edit: its facts, each with its optimisation, the hyperparameters, and figures."""
    records: list[FactRecord] = [
        {
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": request.target_new,
            "n_tokens": len(fact.target),
            "schedule": outcome.schedule,
            "steps": outcome.steps,
            "forwards": outcome.forwards,
            "layer_passes": outcome.layer_passes,
            "losses": outcome.losses,
        }
        for request, fact, outcome in zip(requests, facts, outcomes)
    ]
    settings = {**hparams.to_dict(), "model_name": str(hparams.model_name)}
    return cast(Card, {"method": hparams.alg_name, "facts": records, "hyperparameters": settings, **figures})
