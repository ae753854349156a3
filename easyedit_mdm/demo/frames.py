"""Denoising as frames: what stands in each slot after each step."""

from __future__ import annotations

from typing import Any

import torch

from easyedit_mdm.denoising import Trajectory, decode
from easyedit_mdm.editing.request import encode, target_ids
from easyedit_mdm.models import Adapter

MASK = "░░░"
Frames = list[list[dict[str, Any]]]


def frames(model: Adapter, prompt: str, target: str) -> Frames:
    """What a model writes after a prompt on as many masks as the target has tokens, one a step."""
    path = decode(model, [torch.tensor(encode(model, prompt))], [len(target_ids(model, prompt, target))])[0]
    return [
        [_cell(model, path, slot, step) for slot in range(len(path.tokens))]
        for step in range(-1, int(path.step.max()) + 1)
    ]


def _cell(model: Adapter, path: Trajectory, slot: int, step: int) -> dict[str, Any]:
    at = int(path.step[slot])
    if at > step:
        return {"text": MASK, "state": "masked", "confidence": None}
    text = model.tokenizer.decode([int(path.tokens[slot])]).strip()
    return {
        "text": text,
        "state": "new" if at == step else "kept",
        "confidence": round(float(path.confidence[slot]), 3),
    }
