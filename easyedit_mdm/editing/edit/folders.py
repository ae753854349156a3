"""Model folders that carry edits: beside the weights, the edits themselves and the weights that they
replaced.

    applied.json                   which edits, in which order
    edits/001/edit.json            the folder of an edit ...
    edits/001/edit.safetensors
    edits/001/originals.safetensors   ... and the weights before it

So any of these folders can be taken back to the base model, to the last bit, without the base model at hand.
Others may ignore them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from easyedit_mdm.common.files import read_json, read_tensors, write_json, write_tensors
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.editing.edit.edit import Edit
from easyedit_mdm.editing.edit.export import APPLIED, write_model
from easyedit_mdm.editing.edit.files import write_into
from easyedit_mdm.editing.edit.stack import adopt, carried
from easyedit_mdm.errors import EditError
from easyedit_mdm.models import Adapter

_WHAT = "the record of the edits in a model folder"


def write_edited(adapter: Adapter, folder: str | Path) -> Path:
    """Write a model, with the record of the edits that it carries, as a new folder in the hub's format;
    without edits, just the model.

    Raises:
        CheckpointError, FileError: see `easyedit_mdm.editing.edit.export.write_model`.
        EditError: if the model was not loaded from a folder.
    """
    edits = carried(adapter)

    def record(part: Path) -> None:
        """applied.json and edits/."""
        entries = []
        for number, edit in enumerate(edits, start=1):
            place = part / "edits" / f"{number:03d}"
            place.mkdir(parents=True)
            write_into(edit, place)
            write_tensors(place / "originals.safetensors", edit.originals(adapter))
            entries.append(
                {
                    "folder": f"edits/{number:03d}",
                    "id": edit.card["id"],
                    "edited": edit.edited_hashes(adapter),
                }
            )
        if entries:
            applied = {
                "format": "easyedit_mdm.applied",
                "format_version": 1,
                "base": edits[0].card.get("base"),
                "edits": entries,
            }
            write_json(part / APPLIED, {**applied, "fingerprint": model_fingerprint(adapter.native)})

    return write_model(adapter, source_of(adapter), folder, record)


def source_of(adapter: Adapter) -> Path:
    """The folder that a model was loaded from.

    Raises:
        EditError: if there is none.
    """
    if adapter.source is None:
        raise EditError(
            f"{adapter.name or 'this model'} was not loaded from a folder, so its files are not known: use"
            " easyedit_mdm.load_model"
        )
    return adapter.source


def adopt_edits(adapter: Adapter) -> list[Edit]:
    """The edits that a model's folder says it carries, in order; from now on they can be reverted. Empty for
    a plain folder.

    Raises:
        EditError: if the record is broken, or the weights are not those that the edits left.
    """
    folder = source_of(adapter)
    if not (folder / APPLIED).exists():
        return []
    applied = read_json(folder / APPLIED, EditError, _WHAT)
    entries = applied.get("edits")
    if applied.get("format") != "easyedit_mdm.applied" or not isinstance(entries, list) or not entries:
        raise EditError(f"{folder / APPLIED} is not {_WHAT}: remove it, or get the folder again")
    stack = [_read(folder, entry) for entry in _entries(folder, entries)]
    adopt(adapter, stack)
    return [edit for edit, _, _ in stack]


def _entries(folder: Path, entries: Sequence[Any]) -> list[dict[str, Any]]:
    for number, entry in enumerate(entries, start=1):
        named = entry.get("folder") if isinstance(entry, dict) else None
        hashes = entry.get("edited") if isinstance(entry, dict) else None
        right = isinstance(hashes, dict) and all(isinstance(one, str) for one in hashes.values())
        if named != f"edits/{number:03d}" or not right:  # nothing outside the folder is ever read
            raise EditError(
                f"{folder / APPLIED}: entry {number} is {entry!r}; it should name edits/{number:03d} and its"
                " weights' hashes"
            )
    return list(entries)


def _read(folder: Path, entry: dict[str, Any]) -> tuple[Edit, dict[str, Tensor], dict[str, str]]:
    place = folder / entry["folder"]
    edit = Edit.load(place)
    if edit.card.get("id") != entry.get("id"):
        raise EditError(
            f"{place} holds edit {edit.card.get('id')}, {APPLIED} says {entry.get('id')}: get the folder"
            " again"
        )
    return (
        edit,
        read_tensors(place / "originals.safetensors", EditError, "the weights before an edit")[0],
        entry["edited"],
    )
