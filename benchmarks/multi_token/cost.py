"""What the optimisation of a value cost, worked out from its line in a run file and its settings.

A *forward* is a row that went through the layers above the edited one. It is no measure of compute across
schedules and layers. The layers up to the edited one run once where the states stay the same, and at every
step where they are drawn anew. And the fewer layers lie above the edit, the less a forward is. A
*layer-pass* is a row through one layer:

    (layers above the edit) x forwards
    + (layers up to the edited one) x rows made: once with fixed states, at every step with redrawn ones
    + (all layers) x N x (steps + 1), for schedules whose states the model rolls out

Backward passes are not counted: they run through the layers above the edit only, once a forward but for the
last step. Keys and the closed form are not either: both are made once an edit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from study import plan, settings

from easyedit_mdm.denoising import schedule
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.twins import twin_folder

Line = dict[str, Any]


def depth(model: str) -> int:
    """Number of layers."""
    config = json.loads((twin_folder(model) / "config.json").read_text())
    return int(config["n_layers"] if "n_layers" in config else config["num_hidden_layers"])


def rows_made(hparams: ROMEMDMHyperParams, n: int) -> int:
    """Rows of all states of one draw for a target of n tokens, in every context, and the KL anchor's row."""
    drawn = schedule(hparams.state_schedule, n, hparams.max_states).draw(0, torch.Generator().manual_seed(0))
    contexts = 1 + sum(count for _, count in hparams.context_template_length_params)
    return contexts * len(drawn.weights) + 1


@dataclass(frozen=True)
class Spending:
    """How an optimisation with some settings spends its passes, for targets of one length in a masked model.

    Attributes:
        layers, edited: the model's layers, and the number of the edited one, counted from 0.
        made: rows that are made once, with fixed states; None where they are made anew at every step.
        rolled: layer-passes of the roll-out at one step.
    """

    layers: int
    edited: int
    made: int | None
    rolled: int

    @classmethod
    def of(cls, hparams: ROMEMDMHyperParams, n: int, layers: int) -> Spending:
        """That of a target of n tokens."""
        chosen = schedule(hparams.state_schedule, n, hparams.max_states)
        rolled = n * layers if chosen.rolled and n > 1 else 0
        return cls(layers, hparams.layers[-1], rows_made(hparams, n) if chosen.fixed else None, rolled)

    def layer_passes(self, steps: int, forwards: int) -> int:
        """Of one edit; the loss was taken once more than a step was made."""
        below = forwards if self.made is None else self.made
        return (
            (self.layers - 1 - self.edited) * forwards + (self.edited + 1) * below + self.rolled * (steps + 1)
        )


def with_cost(rows: Sequence[Line], command: str, model: str, methods: Sequence[str]) -> list[Line]:
    """The lines of one command and masked model, each with its `layer_passes` where it has its `forwards`."""
    planned = {
        _label(label): settings(label["method"], model, **changes)
        for label, changes in plan(command, model, True, methods)
    }
    layers, known = depth(model), {}
    out = []
    for row in rows:
        label, n = _label(row), row["n_tokens"]
        if "forwards" in row:
            if (label, n) not in known:
                known[label, n] = Spending.of(planned[label], n, layers)
            row = {**row, "layer_passes": known[label, n].layer_passes(row["steps"], row["forwards"])}
        out.append(row)
    return out


def _label(line: Line) -> tuple[Any, ...]:
    return tuple(line.get(key) for key in ("method", "arm", "try", "ablation"))
