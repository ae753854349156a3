"""Methods as the bench sees them: a model, and edits of it that can be taken back. EasyEdit's own come from `host.methods`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm.api import load_model, make_edit
from easyedit_mdm.data.cases import BenchCase
from easyedit_mdm.editing import METHODS, ROMEMDMHyperParams
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.evaluation.guard import apply_guarded
from easyedit_mdm.models import Adapter

Undo = Callable[[], None]


@dataclass(frozen=True)
class BenchMethod:
    """A method with its model.

    Attributes:
        adapter: the model that is edited and judged.
        settings: the hyperparameters, for the header.
        edit: edits the model for one case; returns figures of the edit and a function that takes it back.
        decode: decode settings of its hyperparameters, as a mapping.
    """

    adapter: Adapter
    settings: dict[str, Any]
    edit: Callable[[BenchCase], tuple[dict[str, Any], Undo]]
    decode: dict[str, Any]


# (name, hyperparameter file) -> the model, its hyperparameters, and a function from a request to what takes its edit back
Others = Callable[[str, str | Path], tuple[Adapter, dict[str, Any], Callable[[dict[str, Any]], Undo]]]


def bench_method(alg_name: str, hparams_file: str | Path, device: str | None = None, others: Others | None = None) -> BenchMethod:
    """Load the model that a hyperparameter file names, and the method.

    Args:
        others: makes methods that are not ours (the host's `easyedits_method`).

    Raises:
        HyperParameterError: if the file is another method's, or the method is not known.
    """
    if alg_name in METHODS:
        return ours(*load_ours(alg_name, hparams_file, device))
    if others is None:
        raise HyperParameterError(f"method {alg_name!r} is not one of ours ({', '.join(METHODS)}), and EasyEdit was not asked for")
    return _others(*others(alg_name, hparams_file))


def _others(adapter: Adapter, settings: dict[str, Any], apply: Callable[[dict[str, Any]], Undo]) -> BenchMethod:
    def edit(case: BenchCase) -> tuple[dict[str, Any], Undo]:
        """Nothing is known of what such a method does."""
        return {}, apply({**case.request(), "case_id": case.case_id, "ground_truth": case.ground_truth or "<|endoftext|>"})

    return BenchMethod(adapter, settings, edit, {})


def load_ours(alg_name: str, hparams_file: str | Path, device: str | None = None) -> tuple[Adapter, ROMEMDMHyperParams]:
    """The hyperparameters of one of our methods, and the model that they name.

    Raises:
        HyperParameterError: if the file is another method's.
        UnknownNameError: for a method that is not ours.
    """
    hparams = METHODS[alg_name].hparams.from_hparams(hparams_file)
    where = device or (str(hparams.device) if hparams.device is not None else None) or ("cuda" if torch.cuda.is_available() else "cpu")
    said = {"mask_id": hparams.mask_id, "block": hparams.block}
    return load_model(hparams.model_name, device=where, dtype=hparams.dtype, **said), hparams


def ours(adapter: Adapter, hparams: ROMEMDMHyperParams) -> BenchMethod:
    """One of our methods on a model."""

    def edit(case: BenchCase) -> tuple[dict[str, Any], Undo]:
        """Make and apply."""
        made = make_edit(adapter, case.request(), hparams)
        apply_guarded(adapter, made, hparams)
        fact = made.card["facts"][0]
        seen = {"guard": made.card["guard"]["figures"]} if hparams.guard is not None else {}
        return {k: fact[k] for k in ("steps", "forwards", "schedule")} | seen, lambda: made.revert(adapter)

    return BenchMethod(adapter, hparams.to_dict(), edit, hparams.decode)
