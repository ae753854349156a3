"""Model names that carry their model, so that EasyEdit's loading by substring is never asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from easyedit_mdm.api import load_model
from easyedit_mdm.editing import METHODS
from easyedit_mdm.errors import CheckpointError, ModelError
from easyedit_mdm.models.loading import read_config, weight_files
from easyedit_mdm.models.recognise import detect
from easyedit_mdm.session import Session
from easyedit_mdm.smollm2 import SMOLLM2
from easyedit_mdm.twins import TWINS

# the methods for which EasyEdit pads on the right (editors/editor.py); it pads on the left for the others
_RIGHT_PADDED = {"ROME", "MEMIT", "EMMET", "EAMET", "R-ROME", "AlphaEdit", "CORE", "SPHERE"}


class LoadedName(str):
    """A model name that unpacks into (model, tokenizer): `BaseEditor` does that with whatever is not exactly
    a `str`.

    It stays a string in every other respect: `.lower()`, `.split("/")` and JSON see the name.
    """

    model: Any
    tokenizer: Any
    session: Session | None

    def __new__(cls, name: str, model: Any = None, tokenizer: Any = None) -> LoadedName:
        """The name, with its model and tokenizer attached, and the session in which the editor edits it."""
        self = super().__new__(cls, name)
        self.model, self.tokenizer, self.session = model, tokenizer, None
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __deepcopy__(self, memo: dict) -> LoadedName:
        return self  # copying hyperparameters must not copy the model


def is_ours_to_load(name: object, alg_name: str) -> bool:
    """Whether the host loads this model: always for our methods, and models by name and local folders of a
    known family for all.
    """
    if not isinstance(name, str) or isinstance(name, LoadedName):
        return False
    if alg_name in METHODS or name in (*TWINS, *SMOLLM2):
        return True
    if alg_name == "QLoRA" or not Path(name).is_dir():  # quantised loading is EasyEdit's
        return False
    try:
        detect(read_config(Path(name)), weight_files(Path(name)))
    except CheckpointError:
        return False  # a folder that EasyEdit may know better
    return True


def load_named(hparams: Any) -> LoadedName:
    """Load the model that hyperparameters name, as EasyEdit's editor wants it.

    Masked models come as adapters, autoregressive ones as plain transformers models.

    Raises:
        ModelError: if one of EasyEdit's own methods is to edit a masked model.
        CheckpointError: if the model cannot be loaded.
    """
    alg_name = hparams.alg_name
    dtype = getattr(hparams, "dtype", None) or ("float16" if getattr(hparams, "fp16", False) else None)
    if dtype is None and alg_name not in METHODS:
        dtype = "float32"  # EasyEdit's default
    parallel = getattr(hparams, "model_parallel", False)
    options = {"device_map": "auto"} if parallel else {}
    given = {name: getattr(hparams, name, None) for name in ("mask_id", "block")}
    adapter = load_model(hparams.model_name, dtype=dtype, **given, **options)
    if adapter.denoises and alg_name not in METHODS:
        raise ModelError(
            f"{hparams.model_name} is a masked diffusion model, and EasyEdit's {alg_name} optimises a"
            f" next-token loss that means nothing for it. Use one of {', '.join(METHODS)}."
        )
    # EasyEdit keeps covariances and prefixes under this name, which is empty for a model built from a config:
    # two would mix
    adapter.native.config._name_or_path = str(hparams.model_name)
    tokenizer = adapter.tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{hparams.model_name} has no tokenizer beside its weights")
    tokenizer.padding_side = "right" if alg_name in _RIGHT_PADDED or alg_name in METHODS else "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = adapter.ids.pad
    return LoadedName(hparams.model_name, adapter if adapter.denoises else adapter.native, tokenizer)
