"""The folder of an edit: `edit.safetensors` (factors, or exact changes) and `edit.json` (everything else).

Reading one runs no code and believes nothing: names, shapes and hashes in the one file must fit the other,
and every number must be finite.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from easyedit_mdm.common.files import (
    check_size,
    new_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from easyedit_mdm.editing.edit.attached import KINDS, Attached
from easyedit_mdm.editing.edit.card import Card
from easyedit_mdm.editing.edit.change import Change, Exact, LowRank
from easyedit_mdm.editing.edit.sealing import seal
from easyedit_mdm.editing.edit.stack import PlainEdit
from easyedit_mdm.errors import EditError

TENSORS, CARD = "edit.safetensors", "edit.json"
FORMAT = "easyedit_mdm.edit"
# of edits that only change weights; files of others say 2, which older versions refuse
WEIGHTS_ONLY, FORMAT_VERSION = 1, 2
_OWN = ("format", "format_version", "id", "tensors", "weights", "attached")
_KINDS: dict[str, tuple[str, ...]] = {"low_rank": ("left", "right"), "exact": ("delta",)}
_WHAT = "an edit that easyedit-mdm saved"


def save(edit: PlainEdit, folder: str | Path, model: nn.Module | None = None) -> Path:
    """Write an edit into a new folder, whole or not at all.

    Args:
        model: the base model, with or without the edit; needed unless the edit is sealed already.

    Raises:
        EditError: if the edit is not sealed and no model is given, or does not fit it.
        FileError: if the folder exists and is not empty, or cannot be written.
    """
    if model is not None:
        seal(edit, model)
    if "base" not in edit.card:
        raise EditError(
            "this edit does not know its base model: save(folder, model) with the model that it was made for"
        )
    folder = Path(folder)
    with new_folder(folder) as part:
        write_into(edit, part)
    return folder


def write_into(edit: PlainEdit, folder: Path) -> None:
    """Both files, into a folder that exists."""
    changes = [compact(change) for change in edit.changes]
    write_tensors(
        folder / TENSORS,
        {f"{c.name}|{key}": value for c in changes for key, value in c.tensors.items()}
        | {
            f"attached {number}|{key}": value
            for number, one in enumerate(edit.attached)
            for key, value in one.tensors.items()
        },
        {"format": FORMAT},
    )
    digest = file_sha256(folder / TENSORS)
    own = {
        "format": FORMAT, "format_version": FORMAT_VERSION if edit.attached else WEIGHTS_ONLY,
        "id": digest[:16],
        "tensors": {"file": TENSORS, "sha256": digest, "bytes": (folder / TENSORS).stat().st_size},
        "weights": {change.name: _described(change) for change in changes},
        **({"attached": [_attachment(one) for one in edit.attached]} if edit.attached else {}),
    }  # fmt: skip
    header = {
        k: v if k in ("hyperparameters", "composed") else _rounded(v)
        for k, v in edit.card.items()
        if k not in _OWN
    }
    write_json(folder / CARD, {**own, **header})
    edit.card["id"] = digest[:16]


def compact(change: Change) -> Change:
    """A low-rank change as it is, unless its factors hold more numbers than the change itself: then that."""
    if (
        isinstance(change, LowRank)
        and change.right.shape[0] * sum(change.shape) >= change.shape[0] * change.shape[1]
    ):
        return Exact(change.name, change.dense().contiguous(), change.transposed)
    return change


def _rounded(value: Any) -> Any:
    """Figures to eight digits: those of eigenvalues differ behind the twelfth with the number of threads, and
    a file should not.
    """
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.8g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def read(folder: str | Path) -> tuple[list[Change], Card, list[Attached]]:
    """The changes, the card and the attachments of an edit, from its folder.

    Raises:
        EditError: if a file is missing or broken, or the two do not belong together.
    """
    folder = Path(folder)
    stored = read_json(folder / CARD, EditError, _WHAT)
    weights = _checked(stored, folder / CARD)
    _check_hash(folder, stored)
    tensors, _ = read_tensors(folder / TENSORS, EditError, "the tensors of an edit")
    attached = _checked_attachments(stored, folder / CARD)
    wanted = {f"{name}|{key}" for name, about in weights.items() for key in _KINDS[about["kind"]]}
    wanted |= {
        f"attached {number}|{key}"
        for number, about in enumerate(attached)
        for key in KINDS[about["kind"]].TENSORS
    }
    if set(tensors) != wanted:
        odd = sorted(set(tensors) ^ wanted)[0]
        raise EditError(
            f"{folder / TENSORS} and {CARD} do not belong together: {odd!r} is in only one of them; get the"
            " edit again"
        )
    changes = [_change(name, about, tensors, folder) for name, about in weights.items()]
    card = {**{k: v for k, v in stored.items() if k not in _OWN}, "id": stored["tensors"]["sha256"][:16]}
    attachments = [_read_attachment(number, about, tensors) for number, about in enumerate(attached)]
    return changes, cast(Card, card), attachments


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _described(change: Change) -> dict[str, Any]:
    rank = {"rank": change.right.shape[0]} if isinstance(change, LowRank) else {}
    return {
        "kind": "low_rank" if rank else "exact",
        "shape": list(change.shape),
        "transposed": change.transposed,
        **rank,
    }


def _attachment(one: Attached) -> dict[str, Any]:
    return {"kind": one.KIND, "module": one.module, "settings": dict(one.settings)}


def _checked_attachments(stored: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """What `edit.json` says of the attachments.

    Raises:
        EditError: naming file and entry.
    """
    attached = stored.get("attached", [])
    entries = attached if isinstance(attached, list) else [attached]
    for about in entries:
        kind = about.get("kind") if isinstance(about, dict) else None
        right = isinstance(kind, str) and kind in KINDS and isinstance(about.get("module"), str)
        settings = about.get("settings") if right else None
        if not isinstance(settings, dict) or not all(
            isinstance(value, (int, float, str, bool)) for value in settings.values()
        ):
            raise EditError(
                f"{path}: the attachment {about!r} needs a kind ({', '.join(KINDS)}), a module and settings"
                " that are numbers or words; get the edit again"
            )
    return entries


def _read_attachment(number: int, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Attached:
    cls = KINDS[about["kind"]]
    named = {key: tensors[f"attached {number}|{key}"] for key in cls.TENSORS}
    return cls(about["module"], named, about["settings"])


def _checked(stored: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The weights that `edit.json` names, after a look at what it is.

    Raises:
        EditError: naming file and entry.
    """
    if stored.get("format") != FORMAT:
        raise EditError(f"{path} has format {stored.get('format')!r}, not {FORMAT!r}: it is not {_WHAT}")
    if stored.get("format_version") not in (WEIGHTS_ONLY, FORMAT_VERSION):
        raise EditError(
            f"{path} has format_version {stored.get('format_version')!r}; this one reads {FORMAT_VERSION}:"
            " use the version that wrote it"
        )
    base, weights = stored.get("base"), stored.get("weights")
    if (
        not isinstance(base, dict)
        or not isinstance(base.get("fingerprint"), str)
        or len(base["fingerprint"]) != 64
    ):
        raise EditError(
            f"{path}: base has no fingerprint, so nobody knows which model the edit belongs to; get the edit"
            " again"
        )
    _check_card(stored, path)
    if not isinstance(weights, dict) or not (weights or stored.get("attached")):
        raise EditError(
            f"{path}: weights is {type(weights).__name__}; it should say for each weight how it is changed"
        )
    for name, about in weights.items():
        kind = about.get("kind") if isinstance(about, dict) else None
        if not isinstance(kind, str) or kind not in _KINDS or not isinstance(about.get("transposed"), bool):
            raise EditError(
                f"{path}: the entry of {name!r} is {about!r}; it needs a kind ({' or '.join(_KINDS)}) and"
                " transposed"
            )
    return weights


def _check_card(stored: Mapping[str, Any], path: Path) -> None:
    """The parts of the card that others read.

    Raises:
        EditError: for one that has another form.
    """
    for name in ("facts", "hyperparameters", "norms", "metrics", "guard", "versions", "edited"):
        kind = list if name == "facts" else dict
        if name in stored and not isinstance(stored[name], kind):
            raise EditError(
                f"{path}: {name} is {type(stored[name]).__name__}, not {kind.__name__}; get the edit again"
            )
    for number, fact in enumerate(stored.get("facts", [])):
        if not isinstance(fact, dict) or not all(
            isinstance(fact.get(key), str) for key in ("prompt", "subject", "target_new")
        ):
            raise EditError(
                f"{path}: fact {number} lacks a prompt, a subject or a target_new that is text; get the edit"
                " again"
            )
    for name, hashes in (
        ("base.weights", stored["base"].get("weights", {})),
        ("edited", stored.get("edited", {})),
    ):
        if not isinstance(hashes, dict) or not all(isinstance(one, str) for one in hashes.values()):
            raise EditError(f"{path}: {name} should give a hash for each weight; get the edit again")
    for name, norms in stored.get("norms", {}).items():
        if not isinstance(norms, dict):
            raise EditError(
                f"{path}: the norms of {name!r} are {type(norms).__name__}, not an object; get the edit again"
            )


def _check_hash(folder: Path, stored: Mapping[str, Any]) -> None:
    about = stored.get("tensors")
    check_size(folder / TENSORS, EditError, "the tensors of an edit")
    try:
        sha256 = file_sha256(folder / TENSORS)
    except OSError as error:
        raise EditError(
            f"{folder / TENSORS} cannot be read ({error.strerror}): the folder of an edit holds {TENSORS} and"
            f" {CARD}"
        ) from error
    if not isinstance(about, dict) or about.get("sha256") != sha256:
        wanted = about.get("sha256") if isinstance(about, dict) else about
        raise EditError(
            f"{folder / TENSORS} has SHA-256 {sha256}, {CARD} says {wanted}: one of the two was changed; get"
            " the edit again"
        )


def _change(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Change:
    """A change, its shapes compared with what `edit.json` says.

    Raises:
        EditError: if they differ.
    """
    parts = [tensors[f"{name}|{key}"] for key in _KINDS[about["kind"]]]
    shapes = [tuple(part.shape) for part in parts]
    if any(part.dim() != 2 or not part.is_floating_point() for part in parts) or (
        len(parts) == 2 and shapes[0][1] != shapes[1][0]
    ):
        raise EditError(
            f"{folder / TENSORS}: the change of {name!r} has tensors {shapes} of {parts[0].dtype}: these are"
            " no factors of a matrix"
        )
    wide = [part if part.dtype == torch.float64 else part.float() for part in parts]
    change: Change = (
        LowRank(name, wide[0], wide[1], about["transposed"])
        if len(wide) == 2
        else Exact(name, wide[0], about["transposed"])
    )
    if about.get("shape") != list(change.shape):
        raise EditError(
            f"{folder / TENSORS}: the change of {name!r} has shape {change.shape}, {CARD} says"
            f" {about.get('shape')!r}: get it again"
        )
    return change
