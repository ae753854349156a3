"""What an edit says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from easyedit_mdm.editing.edit.card import Card, FactRecord
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.value import Optimised


def card(
    requests: Sequence[EditRequest],
    facts: Sequence[Fact],
    hparams: ROMEMDMHyperParams,
    outcomes: Sequence[Optimised],
    figures: dict[str, Any],
) -> Card:
    """The card of a new edit: its facts, each with its optimisation, the hyperparameters, and figures."""
    told: list[FactRecord] = [
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
    return cast(Card, {"method": hparams.alg_name, "facts": told, "hyperparameters": settings, **figures})
