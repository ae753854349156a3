"""The edit that users hold: plain data, and by one word each what the modules of this room do with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from easyedit_mdm.editing.edit.compose import compose
from easyedit_mdm.editing.edit.export import to_peft
from easyedit_mdm.editing.edit.files import read, save
from easyedit_mdm.editing.edit.sealing import seal, weight_figures
from easyedit_mdm.editing.edit.stack import PlainEdit


class Edit(PlainEdit):
    """The result of a method; `apply`, `revert` and `undo` are `PlainEdit`'s."""

    def seal(self, model: nn.Module, name: str | None = None) -> Edit:
        """Write into the card what the edit belongs to; see `sealing.seal`."""
        seal(self, model, name)
        return self

    def save(self, folder: str | Path, model: nn.Module | None = None) -> Path:
        """Write `edit.safetensors` and `edit.json` into a new folder; see `files.save`."""
        return save(self, folder, model)

    @staticmethod
    def load(folder: str | Path) -> Edit:
        """Read the folder of an edit; see `files.read`."""
        return Edit(*read(folder))

    @staticmethod
    def compose(edits: Sequence[Edit], force: bool = False) -> Edit:
        """One edit of several; see `compose.compose`."""
        return compose(edits, force)

    def diff(self, model: nn.Module | None = None) -> list[dict[str, Any]]:
        """What the edit changes, a row a weight; see `sealing.weight_figures`."""
        return weight_figures(self, model)

    def to_peft(self, folder: str | Path) -> Path:
        """Write a LoRA adapter for the base model; see `export.to_peft`."""
        return to_peft(self, folder)
