"""Methods as the bench sees them: a model, and edits of it that can be taken back.

EasyEdit's own come from `host.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm.api import load_model
from easyedit_mdm.common.yaml_files import find_hparams, read_yaml
from easyedit_mdm.data.cases import BenchCase
from easyedit_mdm.editing import METHODS, Edit, MethodHyperParams
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.evaluation.records import EditFigures
from easyedit_mdm.models import Adapter
from easyedit_mdm.session import Session

Undo = Callable[[], None]


@dataclass(frozen=True)
class BenchMethod:
    """A method with its model.

    Attributes:
        adapter: the model that is edited and judged.
        settings: the hyperparameters, for the header.
        edit: edits the model for some cases together; returns figures of the edit for each case, and a
            function that takes the edit back.
        decode: decode settings of its hyperparameters, as a mapping.
        session: the session in which it edits, for one of our methods; None for EasyEdit's own.
    """

    adapter: Adapter
    settings: dict[str, Any]
    edit: Callable[[Sequence[BenchCase]], tuple[list[EditFigures], Undo]]
    decode: dict[str, Any]
    session: Session | None = None


# (name, hyperparameter file) -> the model, its hyperparameters, and a function from requests to what takes
# their edit back
Others = Callable[
    [str, str | Path], tuple[Adapter, dict[str, Any], Callable[[Sequence[dict[str, Any]]], Undo]]
]


def bench_method(
    alg_name: str, hparams_file: str | Path, device: str | None = None, others: Others | None = None
) -> BenchMethod:
    """Load the model that a hyperparameter file names, and the method.

    Args:
        others: makes methods that are not ours (the host's `easyedits_method`).

    Raises:
        HyperParameterError: if the file is another method's, or the method is not known.
    """
    if alg_name in METHODS:
        return ours(*load_ours(alg_name, hparams_file, device))
    if others is None:
        raise HyperParameterError(
            f"method {alg_name!r} is not one of ours ({', '.join(METHODS)}), and EasyEdit was not asked for"
        )
    adapter, settings, apply = others(alg_name, hparams_file)

    def edit(cases: Sequence[BenchCase]) -> tuple[list[EditFigures], Undo]:
        """Nothing is known of what such a method does."""
        asked = [
            {**case.request(), "case_id": case.case_id, "ground_truth": case.ground_truth or "<|endoftext|>"}
            for case in cases
        ]
        return [{} for _ in cases], apply(asked)

    return BenchMethod(adapter, settings, edit, {})


def load_ours(
    alg_name: str, hparams_file: str | Path, device: str | None = None
) -> tuple[Adapter, MethodHyperParams]:
    """The hyperparameters of one of our methods, and the model that they name.

    Raises:
        HyperParameterError: if the file is another method's.
        UnknownNameError: for a method that is not ours.
    """
    method, named = METHODS[alg_name], read_yaml(find_hparams(hparams_file)).get("alg_name")
    if named != alg_name and named in list(METHODS):
        raise HyperParameterError(
            f"--alg {alg_name}, but {hparams_file} is a file of {named}: give --alg {named}, or a file of"
            f" {alg_name}"
        )
    hparams = method.hparams.from_hparams(hparams_file)
    asked = device or (str(hparams.device) if hparams.device is not None else None)
    where = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {"mask_id": hparams.mask_id, "block": hparams.block}
    return load_model(hparams.model_name, device=where, dtype=hparams.load_dtype, **given), hparams


def ours(adapter: Adapter, hparams: MethodHyperParams) -> BenchMethod:
    """One of our methods on a model, in a session of its own."""
    session = Session(adapter, hparams)

    def edit(cases: Sequence[BenchCase]) -> tuple[list[EditFigures], Undo]:
        """Make and apply, in one edit if the method can."""
        before = len(session.edits)
        made = session.edit([case.request() for case in cases])
        figures = [_figures(one, fact) for one in made for fact in one.card["facts"]]

        def undo() -> None:
            """These edits, the last first."""
            while len(session.edits) > before:
                session.undo()

        return figures, undo

    return BenchMethod(adapter, hparams.to_dict(), edit, hparams.decode, session)


def _figures(edit: Edit, fact: Mapping[str, Any]) -> EditFigures:
    figures: EditFigures = {
        "steps": fact["steps"],
        "forwards": fact["forwards"],
        "layer_passes": fact["layer_passes"],
        "stored_bytes": edit.bytes / len(edit.card["facts"]),
        "schedule": fact["schedule"],
    }
    if edit.card["guard"]["on"]:
        figures["guard"] = edit.card["guard"]["figures"]
    return figures
