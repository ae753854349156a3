"""Where the rooms are put together: loading a model that can also write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.common.yaml_files import find_hparams, read_yaml_file
from easyedit_mdm.denoising import generate
from easyedit_mdm.editing import METHODS, Edit, EditRequest, History, MethodHyperParams
from easyedit_mdm.editing.hparams import whose
from easyedit_mdm.errors import CheckpointError, HyperParameterError
from easyedit_mdm.models import Adapter, adapt, load_adapter
from easyedit_mdm.models.loading import find_folder
from easyedit_mdm.smollm2 import SMOLLM2, smollm2_folder
from easyedit_mdm.twins import TWINS, twin_folder


def load_model(name_or_folder: str | Path, **options: Any) -> Adapter:
    """Load a language model by name (`twin-llada`, `smollm2-block`), folder, or hub id.

    Args:
        options: `device`, `dtype`, `device_map`, `max_memory`, `family`, `mask_id`, `block`, `revision`,
            `tokenizer`; see `easyedit_mdm.models.load_adapter`.

    Returns:
        an adapter with `token_logits`, `generate`, `forward`, `site`, ...

    Raises:
        CheckpointError: if it cannot be found or does not fit its family.
        MissingPackageError: for a `smollm2` model, if the package that holds its weights is not installed.
    """
    name = str(name_or_folder)
    return with_decoder(
        load_adapter(model_folder(name_or_folder, options.get("revision")), **{"name": name, **options})
    )


def model_folder(name_or_folder: str | Path, revision: str | None = None) -> Path:
    """The folder of a model, by the names that `load_model` takes.

    Raises:
        CheckpointError, MissingPackageError: see `load_model`.
    """
    name = str(name_or_folder)
    if name in SMOLLM2:
        return smollm2_folder(name)
    if name in TWINS:
        return twin_folder(name)
    meant = did_you_mean(name, [*TWINS, *SMOLLM2])
    if "/" not in name and meant != "." and not Path(name).exists():
        raise CheckpointError(f"no model {name!r}: no folder is called so, and no model that ships{meant}")
    return find_folder(name_or_folder, revision)


def wrap_model(native: Any, tokenizer: Any = None, **options: Any) -> Adapter:
    """The adapter of a transformers model that is already in memory; see `easyedit_mdm.models.adapt`."""
    return with_decoder(adapt(native, tokenizer, **options))


def with_decoder(adapter: Adapter) -> Adapter:
    """Give a masked adapter its `generate` (the models know nothing of denoising)."""
    if adapter.masked and adapter.denoise is None:
        adapter.denoise = generate
    return adapter


def load_hparams(path: str | Path) -> MethodHyperParams:
    """The hyperparameters of a YAML file, as the class of the method that it names (`alg_name`).

    >>> load_hparams("MEMIT_MDM/twin-llada").alg_name  # a file that ships; any path will do
    'MEMIT_MDM'

    Raises:
        HyperParameterError, UnknownNameError: as `MethodHyperParams.from_hparams`; if the file names no
            method, or one of EasyEdit's.
    """
    file = read_yaml_file(find_hparams(path))
    alg_name = file.values.get("alg_name")
    if not isinstance(alg_name, str) or alg_name not in METHODS:
        raise HyperParameterError(f"{file.where('alg_name')}: {whose(alg_name)}")
    return METHODS[alg_name].hparams.from_dict(file)


def make_edit(
    model: Adapter,
    request: Mapping[str, Any] | EditRequest | Sequence[Mapping[str, Any] | EditRequest],
    hparams: MethodHyperParams,
    history: History | None = None,
) -> Edit:
    """Make the edit for one request, or for several at once, without changing the model; `edit.apply(model)`
    and `edit.revert(model)` do that.

    Args:
        request: `prompt`, `subject` and `target_new`, as in EasyEdit; several only for the batched methods.
        hparams: the hyperparameters of a method, which also say which method it is.
        history: for sequential AlphaEdit_MDM edits: one `History`, passed to every call.

    Raises:
        RequestError, HyperParameterError, ModelError, StatisticsError, OptimisationError: see
            `easyedit_mdm.errors`.
    """
    requests = [request] if isinstance(request, (Mapping, EditRequest)) else request
    return METHODS[hparams.alg_name].edit(model, [EditRequest.of(r) for r in requests], hparams, history)


def make_edits(
    model: Adapter, requests: Sequence[Mapping[str, Any] | EditRequest], hparams: MethodHyperParams
) -> list[Edit]:
    """One edit a request, each as `make_edit` would make it for the model as it is now, but several times
    faster: the values of all are optimised together.

    Raises:
        RequestError, HyperParameterError, ModelError, StatisticsError, OptimisationError: see
            `easyedit_mdm.errors`.
    """
    return METHODS[hparams.alg_name].edit_each(model, [EditRequest.of(r) for r in requests], hparams)
