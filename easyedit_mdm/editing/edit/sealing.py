"""What an edit says of the model that it belongs to, and of the weights that it changes."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_mdm.common.fingerprints import model_fingerprint, tensor_sha256
from easyedit_mdm.common.weights import Weights
from easyedit_mdm.editing.edit.change import Change, Exact, LowRank
from easyedit_mdm.editing.edit.stack import PlainEdit, carried, identity
from easyedit_mdm.errors import EditError
from easyedit_mdm.version import __version__


def seal(edit: PlainEdit, model: nn.Module, name: str | None = None) -> None:
    """Write into an edit's card what it belongs to: the base model's fingerprint, versions, and figures of
    each weight.

    The base is the model as it is now, without this edit if it is applied. A card that names its base is left
    alone.

    Raises:
        EditError: if the edit does not fit the model.
    """
    if "base" in edit.card:
        return
    native, own = identity(model), edit.originals(model) if edit.is_applied(model) else {}
    weights = Weights(native, every=True)
    names = edit.names_in(native)
    spec = getattr(model, "spec", None)
    edit.card["base"] = {
        "name": name or getattr(model, "name", "") or type(native).__name__,
        "family": None if spec is None else spec.name,
        "paradigm": None if spec is None else spec.paradigm,
        "dtype": str(next(native.parameters()).dtype).removeprefix("torch."),
        "fingerprint": model_fingerprint(native, own),
        "weights": {
            change: tensor_sha256(own.get(first, weights[change])) for change, first in names.items()
        },
        "carries": [other.card.get("id") for other in carried(native) if other is not edit],
    }
    edit.card["edited"] = edit.edited_hashes(model)
    edit.card.setdefault("seed", edit.card.get("hyperparameters", {}).get("seed"))
    edit.card["versions"] = versions()
    edit.card["norms"] = {
        row["weight"]: {k: row[k] for k in ("norm", "norm_ratio")} for row in weight_figures(edit, model)
    }


def versions() -> dict[str, str]:
    """What an edit was made with."""
    import transformers

    return {
        "easyedit_mdm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def weight_figures(edit: PlainEdit, model: nn.Module | None = None) -> list[dict[str, Any]]:
    """A row a weight: `weight`, `kind` (low rank or exact), `rank`, `shape`, `norm` and `spectral` norm of
    the change, and `norm_ratio`, ||dW|| / ||W||, with a model (as it is without the edit) or from the card of
    a saved edit.

    Raises:
        EditError: if the edit does not fit the model.
    """
    rows = []
    names = {} if model is None else edit.names_in(identity(model))
    for change in edit.changes:
        values = singular_values(change)
        norm, known = float(values.norm()), edit.card.get("norms", {}).get(change.name, {})
        original = None if model is None else _original(edit, model, names[change.name])
        rows.append({
            "weight": change.name,
            "kind": "low rank" if isinstance(change, LowRank) else "exact",
            "rank": _rank(values),
            "shape": list(change.shape),
            "norm": norm,
            "spectral": float(values.max()) if len(values) else 0.0,
            "norm_ratio": known.get("norm_ratio") if original is None else ratio(norm, original),
        })  # fmt: skip
    return rows


def ratio(norm: float, weight: Tensor) -> float:
    """||dW|| / ||W||; infinite where W is 0 and dW is not."""
    # row by row: one sum over everything would depend on the number of threads
    whole = float(weight.detach().float().square().sum(1).double().sum().sqrt())
    return norm / whole if whole else (float("inf") if norm else 0.0)


def singular_values(change: Change) -> Tensor:
    """The singular values of a change, in float64; of low-rank factors by the small matrix between two QR
    decompositions.
    """
    if isinstance(change, Exact):
        return torch.linalg.svdvals(change.delta.detach().double().cpu())
    left = torch.linalg.qr(change.left.detach().double().cpu(), mode="r").R
    right = torch.linalg.qr(change.right.detach().double().cpu().T, mode="r").R
    return torch.linalg.svdvals(left @ right.T)


def _rank(values: Tensor) -> int:
    return int((values > values.max() * 1e-7).sum()) if len(values) else 0


def _original(edit: PlainEdit, model: nn.Module, name: str) -> Tensor:
    if edit.is_applied(model):
        return edit.originals(model)[name]
    weights = Weights(identity(model))
    if name not in weights:
        raise EditError(f"this model has no weight {name}")
    return weights[name]
