"""What the optimisation of a value cost, worked out from its line in a run file and its settings.

A *forward* is a row that went through the layers above the edited one. It is no measure of compute across schedules and
layers: the layers up to the edited one run once where the states stay the same and at every step where they are drawn
anew, and the fewer layers lie above the edit, the less a forward is. A *layer-pass* is one row through one layer:

    (layers above the edit) x forwards
    + (layers up to the edited one) x rows made: once with fixed states, at every step with redrawn ones
    + (all layers) x N x steps, for schedules whose states the model rolls out

Backward passes are not counted: they run through the layers above the edit only, once a forward but for the last step.
Keys and the closed form are not either: both are made once an edit.
"""

from __future__ import annotations

import json
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
    """Rows of all fixed states of a target of n tokens, in every context, and the KL anchor's row."""
    drawn = schedule(hparams.state_schedule, n, hparams.max_states).draw(0, torch.Generator().manual_seed(0))
    contexts = 1 + sum(count for _, count in hparams.context_template_length_params)
    return contexts * len(drawn.weights) + 1


def layer_passes(line: Line, hparams: ROMEMDMHyperParams, layers: int) -> int:
    """Layer-passes of one edit of a masked model.

    Args:
        line: with `n_tokens`, `steps` (the loss was taken once more than a step was made) and `forwards`.
        layers: the model's.
    """
    n, times = line["n_tokens"], line["steps"] + 1
    chosen, edited = schedule(hparams.state_schedule, n, hparams.max_states), hparams.layers[-1]
    made = rows_made(hparams, n) if chosen.fixed else line["forwards"]
    rolled = times * n * layers if chosen.rolled and n > 1 else 0
    return (layers - 1 - edited) * line["forwards"] + (edited + 1) * made + rolled


def with_cost(rows: list[Line], command: str, model: str, method: str) -> list[Line]:
    """The lines of one command, method and masked model, each with its `layer_passes`."""
    planned = {_label(label): settings(method, model, **changes) for label, changes in plan(command, model, True, [method])}
    layers = depth(model)
    return [{**row, "layer_passes": layer_passes(row, planned[_label(row)], layers)} for row in rows if "forwards" in row]


def _label(line: Line) -> tuple[Any, ...]:
    return tuple(line.get(key) for key in ("method", "arm", "try", "ablation"))
