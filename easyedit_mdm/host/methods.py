"""EasyEdit's own methods for the bench, called as its editor calls them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm.api import wrap_model
from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.hparams import find_hparams
from easyedit_mdm.errors import EditError, HyperParameterError
from easyedit_mdm.host.importing import host_module
from easyedit_mdm.host.joining import register
from easyedit_mdm.models import Adapter

Undo = Callable[[], None]


def easyedits_method(
    alg_name: str, hparams_file: str | Path, home: str | Path | None = None
) -> tuple[Adapter, dict[str, Any], Callable[[Sequence[Mapping[str, Any]]], Undo]]:
    """One of EasyEdit's methods on the model that its own hyperparameter file names.

    Returns:
        the model; the hyperparameters; a function that edits the model for some requests together (`prompt`,
        `subject`, `target_new`, `case_id`, `ground_truth`) and returns one that takes the edit back.

    Raises:
        HyperParameterError: if EasyEdit does not know the method.
        EditError: what takes an edit back raises it for a method that gives no weights back.
        HostNotFoundError: where there is no EasyEdit.
    """
    joined = register(home)
    table = host_module("util.alg_dict").ALG_DICT
    # EasyEdit's ULTRAEDIT has UltraEditHyperParams
    classes = {name.lower(): cls for name, cls in vars(host_module("models")).items()}
    cls = classes.get(f"{alg_name.replace('-', '_')}HyperParams".lower())
    if alg_name not in table or cls is None:
        raise HyperParameterError(
            f"method {alg_name!r} is known neither here ({', '.join(METHODS)}) nor to EasyEdit at"
            f" {joined.host.root.name}{did_you_mean(alg_name, [*METHODS, *table])}"
        )
    hparams = cls.from_hparams(str(find_hparams(hparams_file)))
    with contextlib.redirect_stdout(io.StringIO()):
        editor = joined.editor_class.from_hparams(hparams)
    adapter = wrap_model(editor.model, editor.tok, name=str(hparams.model_name))

    def edit(requests: Sequence[Mapping[str, Any]]) -> Undo:
        """EasyEdit's function, as its editor calls it."""
        # ULTRAEDIT is to give its weights back, and looks for them under other names than it keeps
        inner = {f"{name.removesuffix('.weight')}.weight" for name in getattr(hparams, "inner_params", ())}
        kept = {n: p.detach().clone() for n, p in editor.model.named_parameters() if n in inner}
        with contextlib.redirect_stdout(io.StringIO()):
            _, originals = table[alg_name](
                editor.model,
                editor.tok,
                [dict(r) for r in requests],
                editor.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=True,
            )
        return lambda: _put_back(editor.model, originals or kept, alg_name)

    settings = {
        k: v for k, v in vars(hparams).items() if isinstance(v, (str, int, float, bool, list, type(None)))
    }
    return adapter, {**settings, "model_name": str(hparams.model_name)}, edit


@torch.no_grad()
def _put_back(model: torch.nn.Module, originals: dict[str, torch.Tensor], alg_name: str) -> None:
    if not originals:
        raise EditError(
            f"EasyEdit's {alg_name} gives no weights back, so its edit stays in the model, and what would be"
            " edited next is no longer the model that was loaded: edit one fact a run, or use mode sequential"
        )
    weights = dict(model.named_parameters())
    for name, value in originals.items():
        weights[name].copy_(value)
