"""What training loops share: rates, whole checkpoints, logs that a resumed run continues.

A checkpoint is one safetensors file: trained tensors, the optimiser's state, and, as metadata, a JSON state.
It takes the place of the one before in a single step, so a run that is killed at any point goes on from the
last whole one. Random numbers belong to steps (`generator_of`), so no generator's state has to be kept.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_mdm.common.files import append_line, explained, read_tensors, write_tensors, write_text
from easyedit_mdm.errors import CheckpointError

CHECKPOINT = "checkpoint.safetensors"
_ADAM = "optimiser."


def cosine(done: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Share of the highest rate after a share `done` of the training: up in a straight line, down a
    cosine.
    """
    if done < warmup:
        return max(done, 1e-3) / warmup
    left = min(1.0, (done - warmup) / (1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * left))


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def random_of(seed: int, step: int) -> random.Random:
    """The same for Python's."""
    return random.Random(f"{seed}/{step}")


def save_checkpoint(
    file: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Write trained tensors, the optimiser's state and `state`.

    Raises:
        FileError: if it cannot be written; the checkpoint before it stays.
    """
    kept = {name: value.detach() for name, value in tensors.items()}
    for name, value in tensors.items():
        for key, number in optimizer.state[value].items():
            kept[f"{_ADAM}{key}.{name}"] = torch.as_tensor(number)
    write_tensors(file, kept, {"state": json.dumps(state)})


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's trained tensors, without the optimiser's, and the state that was saved with them.

    Raises:
        CheckpointError: if the file is missing or broken.
    """
    tensors, metadata = read_tensors(file, CheckpointError, "a training checkpoint")
    own = {name: value for name, value in tensors.items() if not name.startswith(_ADAM)}
    return own, json.loads(metadata["state"])


def load_checkpoint(
    file: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint's tensors and optimiser state in place.

    Returns:
        the state that was saved with them.

    Raises:
        CheckpointError: if the file is broken, or belongs to other tensors.
    """
    stored, metadata = read_tensors(file, CheckpointError, "a training checkpoint")
    own = {name: value for name, value in stored.items() if not name.startswith(_ADAM)}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if {name: tuple(value.shape) for name, value in own.items()} != shapes:
        raise CheckpointError(f"{file} belongs to another model or rank: choose another folder, or remove it")
    with torch.no_grad():
        for name, value in own.items():
            tensors[name].copy_(value)
    for name, value in stored.items():
        if name.startswith(_ADAM):
            key, tensor = name.removeprefix(_ADAM).split(".", 1)
            place = tensors[tensor]
            optimizer.state[place][key] = value if key == "step" else value.to(place.device)
    return json.loads(metadata["state"])


class Log:
    """JSON lines with a `step` each; a resumed run cuts off the lines after its checkpoint."""

    def __init__(self, file: Path, step: int):
        self.file = file
        kept = [line for line in self._lines() if line["step"] <= step]
        write_text(file, "".join(json.dumps(line) + "\n" for line in kept))

    def _lines(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        records = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the run was killed while it wrote the line
                break
        return records

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        with explained(self.file), self.file.open("a", encoding="utf-8") as stream:
            append_line(stream, self.file, json.dumps(line))
