"""Joining EasyEdit: our methods in its table, our loading and our evaluation where they are needed, the rest
untouched.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm.api import wrap_model
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.hparams import find_hparams, read_yaml
from easyedit_mdm.editing.methods import Method
from easyedit_mdm.errors import HyperParameterError, MissingPackageError
from easyedit_mdm.evaluation.fluency import ngram_counts
from easyedit_mdm.host.calls import understand_old_cache_name
from easyedit_mdm.host.evaluation import multi_step, public
from easyedit_mdm.host.finding import Host
from easyedit_mdm.host.importing import host_module, import_easyedit
from easyedit_mdm.host.inside import (
    apply_function,
    decode_config,
    is_masked,
    locality_meta,
    masked_quality,
    with_model,
)
from easyedit_mdm.host.names import LoadedName
from easyedit_mdm.host.on_cpu import CudaMeansCpu
from easyedit_mdm.host.statistics import join_statistics
from easyedit_mdm.models.adapter import is_known

_OUR_WORDS = "_easyedit_mdm_words"
_EDITOR_CALLS = (
    "__init__",
    "edit",
    "batch_edit",
    "edit_dataset",
    "edit_requests",
    "normal_edit",
    "generate_edit",
)


@dataclass(frozen=True)
class Joined:
    """An EasyEdit that knows our methods.

    Attributes:
        host: which EasyEdit, and where.
        editor_class: `MDMEditor(BaseEditor)`, which every `BaseEditor(...)` makes.
    """

    host: Host
    editor_class: Any


def register(home: str | Path | None = None) -> Joined:
    """Import EasyEdit and join it; calling again changes nothing.

    Args:
        home: folder of a clone of EasyEdit; see `find_easyedit` for the order of search.

    Raises:
        HostNotFoundError: if EasyEdit cannot be found.
        HostImportError: if it cannot be imported.
    """
    host = import_easyedit(home)
    table = host_module("util.alg_dict").ALG_DICT
    editor = host_module("editors.editor")
    if not hasattr(editor.BaseEditor, "_easyedit_mdm"):
        ours = _join_editor(editor, host)
        _join_evaluation(editor)
        _join_fluency()
        _join_batching()
        join_statistics()
        METHODS.watch(functools.partial(_join_method, table, host.form))  # later ones too
        editor.BaseEditor._easyedit_mdm = ours
    return Joined(host, editor.BaseEditor._easyedit_mdm)


def _join_method(table: dict[str, Any], form: str, name: str, method: Method) -> None:
    """A method in EasyEdit's table, its hyperparameters wherever a runner reads those of the method that it
    stands for.
    """
    table[name] = apply_function(name, form)
    _join_hparams(method.stands_for)


def _join_editor(editor: Any, host: Host) -> type:
    """`BaseEditor(...)` makes an `MDMEditor`, in any script; the methods of BaseEditor stay as they are."""
    base = editor.BaseEditor
    ours = mdm_editor(base, host.form)

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(ours if cls is base else cls)

    base.__new__ = staticmethod(__new__)
    return ours


def mdm_editor(base: Any, form: str) -> type:
    """The class `MDMEditor(BaseEditor)` for one form of EasyEdit."""

    class MDMEditor(base):
        """EasyEdit's editor, for masked models too.

        It loads the models that this package knows by name, folder or hub id. The loop, its arguments and
        its results are BaseEditor's.
        """

        def __init__(self, hparams: Any, *args: Any, **kwargs: Any) -> None:
            given, hparams = hparams, with_model(hparams)
            if hparams is not given and form == "wheel":
                hparams.device = _wheel_device(hparams.device)
            super().__init__(hparams, *args, **kwargs)
            understand_old_cache_name(self.model)

    MDMEditor.__qualname__ = "MDMEditor"
    if form == "wheel":
        for name in _EDITOR_CALLS:
            if hasattr(MDMEditor, name):
                setattr(MDMEditor, name, _on_the_right_device(getattr(MDMEditor, name)))
    return MDMEditor


def _wheel_device(device: Any) -> Any:
    """What the wheel, which writes f"cuda:{device}" without asking, needs for a device as the head takes
    it.
    """
    if device is None:
        return 0
    return str(device).removeprefix("cuda:") if str(device) != "cuda" else 0


def _on_the_right_device(function: Callable) -> Callable:
    """The wheel's call inside `CudaMeansCpu` where there is no CUDA, or the hyperparameters say `cpu`."""

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The editor's own method."""
        given = (
            args[0]
            if args and hasattr(args[0], "alg_name")
            else kwargs.get("hparams", getattr(self, "hparams", None))
        )
        if torch.cuda.is_available() and str(getattr(given, "device", None)) != "cpu":
            return function(self, *args, **kwargs)
        with CudaMeansCpu():
            return function(self, *args, **kwargs)

    return call


def _join_evaluation(editor: Any) -> None:
    theirs = editor.compute_edit_quality

    @functools.wraps(theirs)
    def compute_edit_quality(
        model: Any,
        model_name: Any,
        hparams: Any,
        tok: Any,
        record: Any,
        device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict:
        """EasyEdit's, but with our metric where the model or the method is ours."""
        if is_masked(model):
            options = dict(zip(("eval_metric", "test_generation"), args)) | kwargs
            return masked_quality(model, hparams, record, **options)
        result = theirs(model, model_name, hparams, tok, record, device, *args, **kwargs)
        # a model that an EasyEdit method has wrapped (LoRA, WISE, ...) has no adapter: its record stays
        # EasyEdit's own
        if "fluency" in result and hasattr(host_module("evaluate.evaluate_utils").compute_freq, _OUR_WORDS):
            result["fluency"]["words"] = (
                "easyedit_mdm"  # not nltk's, so that the figures are not compared with EasyEdit's
            )
        if (isinstance(model_name, LoadedName) or hparams.alg_name in METHODS) and is_known(model):
            result["multi_step"] = public(multi_step(wrap_model(model, tok), record, decode_config(hparams)))
        return result

    editor.compute_edit_quality = compute_edit_quality
    if hasattr(editor, "build_locality_metric_meta"):
        their_meta = editor.build_locality_metric_meta

        @functools.wraps(their_meta)
        def build_locality_metric_meta(
            key: str, hparams: Any, model_name: Any, *args: Any, **kwargs: Any
        ) -> dict:
            """EasyEdit's, but naming our metric where it was used."""
            ours = locality_meta(key, model_name)
            return their_meta(key, hparams, model_name, *args, **kwargs) if ours is None else ours

        editor.build_locality_metric_meta = build_locality_metric_meta


def _join_fluency() -> None:
    """Where nltk, or its data for splitting texts into words, is missing: words are split as
    `evaluation.fluency` does.
    """
    module = host_module("evaluate.evaluate_utils")
    try:
        module.nltk.word_tokenize("a word")
    except (MissingPackageError, LookupError):

        def compute_freq(sentence: str, n: int = 2) -> Counter[tuple[str, ...]]:
            """As EasyEdit's: how often each n-gram occurs."""
            return ngram_counts(sentence, n)

        setattr(compute_freq, _OUR_WORDS, True)
        setattr(module, "compute_freq", compute_freq)  # noqa: B010  (a module has no such attribute by type)


def _join_batching() -> None:
    batching = host_module("editors.batch_editor").BatchEditor
    theirs = batching.is_batchable_method

    def is_batchable_method(alg_name: str) -> bool:
        """What our table says of our methods; EasyEdit's answer for the others."""
        return METHODS[alg_name].batchable if alg_name in METHODS else theirs(alg_name)

    batching.is_batchable_method = staticmethod(is_batchable_method)


def _join_hparams(stands_for: str) -> None:
    """`ROMEHyperParams.from_hparams` on a file whose alg_name is one of ours gives our hyperparameters."""
    package, wanted = host_module("models"), f"{stands_for}HyperParams".lower()
    # by the letters alone: GRACE's are called GraceHyperParams
    theirs = next((getattr(package, name) for name in dir(package) if name.lower() == wanted), None)
    if theirs is None:
        return
    original = theirs.from_hparams.__func__
    if hasattr(original, "_easyedit_mdm"):
        return

    def from_hparams(cls: type, path: Any) -> Any:
        """Our class for a file of one of our methods; EasyEdit's for the others."""
        alg_name = _alg_name(path)
        ours = alg_name is not None and alg_name in METHODS
        return METHODS[str(alg_name)].hparams.from_hparams(path) if ours else original(cls, path)

    vars(from_hparams)["_easyedit_mdm"] = True
    theirs.from_hparams = classmethod(from_hparams)


def _alg_name(path: Any) -> str | None:
    with contextlib.suppress(HyperParameterError):
        return read_yaml(find_hparams(path)).get("alg_name")
    return None  # EasyEdit's own reading will say what is wrong
