"""What EasyEdit's loop calls of ours: the edit as its methods are called, the model, the record.

`joining` puts these into an EasyEdit that knows nothing of us; the patch in contrib/easyedit calls them by
name. Nothing here imports EasyEdit.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from easyedit_mdm.api import load_hparams, wrap_model
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import Edit
from easyedit_mdm.editing.edit.stack import identity
from easyedit_mdm.host.evaluation import LOCALITY_GROUP, edit_quality, meta
from easyedit_mdm.host.names import LoadedName, is_ours_to_load, load_named
from easyedit_mdm.models import Adapter
from easyedit_mdm.session import Session

__all__ = [
    "apply_function",
    "decode_config",
    "is_masked",
    "load_hparams",
    "locality_meta",
    "masked_quality",
    "with_model",
]


def with_model(hparams: Any) -> Any:
    """Hyperparameters whose `model_name` carries the loaded model; the given ones where it is not ours to
    load.

    Raises:
        ModelError, CheckpointError: as `load_named`.
    """
    if hparams is None or not is_ours_to_load(hparams.model_name, hparams.alg_name):
        return hparams
    hparams = copying.copy(hparams)
    hparams.model_name = load_named(hparams)
    return hparams


def apply_function(name: str, form: str = "head") -> Callable[..., tuple[Any, dict[str, torch.Tensor]]]:
    """A method of ours as EasyEdit's `ALG_DICT` has methods.

    Args:
        name: the method's, such as `ROME_MDM`.
        form: `head` or `wheel`, which want the weights back in different cases.
    """

    def apply(
        model: Any,
        tok: Any,
        requests: Sequence[Mapping[str, Any]] | Mapping[str, Any],
        hparams: Any,
        copy: bool = False,
        return_orig_weights: bool = False,
        keep_original_weight: bool = False,
        **_: Any,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """EasyEdit's calling convention: edits the model, returns it with the original weights.

        The head always wants the weights back; the wheel's `keep_original_weight=False` means that the edit
        stays and nothing is returned.
        """
        if copy:
            model = copying.deepcopy(model)
        adapter = wrap_model(model, tok)
        listed = [dict(r) for r in ([requests] if isinstance(requests, Mapping) else requests)]
        originals: dict[str, torch.Tensor] = {}
        session = _session(adapter, hparams)
        edits = session.edit(listed)
        for edit in edits:
            originals = {
                **edit.originals(adapter),
                **originals,
            }  # of several edits of a weight, the first one's
        if any(edit.attached for edit in edits):
            originals = Attachments(session, edits)
        wanted = return_orig_weights and (form == "head" or keep_original_weight)
        return model, originals if wanted else {}

    apply.__name__ = f"apply_{name.lower().replace('-', '_')}_to_model"
    return apply


class Attachments(dict[str, torch.Tensor]):
    """What EasyEdit puts back after edits that are not in the weights: as soon as it asks for the weights, of
    which there are none, the edits are taken back.
    """

    def __init__(self, session: Session, edits: Sequence[Edit]):
        super().__init__()
        self._session, self._edits = session, list(edits)

    def items(self) -> Any:
        """No weights; the edits are out of the model."""
        while self._edits:
            self._session.undo(self._edits.pop())
        return super().items()


def _session(adapter: Adapter, hparams: Any) -> Session:
    """The editor's own session, which lasts as long as the editor; a new one where the model is not its
    editor's.
    """
    name = hparams.model_name
    if not isinstance(name, LoadedName) or identity(name.model) is not identity(adapter):
        return Session(adapter, hparams)
    if name.session is None or identity(name.session.model) is not identity(adapter):
        name.session = Session(adapter, hparams)
    return name.session


def is_masked(model: Any) -> bool:
    """Whether a model writes by denoising, so that EasyEdit's own metrics mean nothing for it."""
    return isinstance(model, Adapter) and model.denoises


def decode_config(hparams: Any) -> DecodeConfig:
    """How the record's answers are decoded; EasyEdit's own hyperparameters do not say."""
    return hparams.decode_config() if hasattr(hparams, "decode_config") else DecodeConfig()


def masked_quality(
    model: Adapter,
    hparams: Any,
    record: Mapping[str, Any],
    eval_metric: str = "token_em",
    test_generation: bool = False,
) -> dict[str, Any]:
    """What `compute_edit_quality` returns, for a masked model.

    The editor's default, `exact match`, counts as `token_em`: EasyEdit's own metrics read it so.

    Raises:
        HyperParameterError: as `edit_quality`.
    """
    metric = "token_em" if eval_metric == "exact match" else eval_metric
    return edit_quality(model, record, decode_config(hparams), metric, test_generation)


def locality_meta(key: str, model_name: Any) -> dict[str, str] | None:
    """EasyEdit's metadata of a locality score where the editor's model is a masked one; else `None`."""
    masked = isinstance(model_name, LoadedName) and isinstance(model_name.model, Adapter)
    return meta(f"locality.{key}_acc", LOCALITY_GROUP) if masked else None
