"""Importing EasyEdit without its side effects, in both of its forms."""

from __future__ import annotations

import importlib
import logging
import os
import random
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from easyedit_mdm.errors import HostNotFoundError, MissingPackageError
from easyedit_mdm.host.finding import HOW_TO_GET, Host, find_easyedit
from easyedit_mdm.host.standins import standins

# BaseEditor and what joining it needs; attributes of the package itself are shadowed by names of its submodules
_WANTED = ("easyeditor", "easyeditor.editors.editor", "easyeditor.util.alg_dict", "easyeditor.editors.batch_editor")


def import_easyedit(home: str | Path | None = None) -> Host:
    """Import EasyEdit, wherever it is found; seeds, environment, logging and warnings are as before afterwards.

    Raises:
        HostNotFoundError: if it is not there, or its import fails.
    """
    host = find_easyedit(home)
    with standins(), _as_before(), old_transformers_names():
        if str(host.root) not in sys.path and host.source == "home":
            sys.path.insert(0, str(host.root))
        try:
            for name in _WANTED:
                importlib.import_module(name)
        except MissingPackageError:
            raise
        except ImportError as error:
            raise HostNotFoundError(f"EasyEdit at {host.root} ({host.form}) could not be imported: {error}. {HOW_TO_GET}") from error
    return host


@contextmanager
def _as_before() -> Iterator[None]:
    """Put back what EasyEdit's import changes: it seeds with 42, sets environment variables, adds log handlers."""
    import numpy
    import torch

    seeds = (random.getstate(), numpy.random.get_state(), torch.get_rng_state())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    environment = dict(os.environ)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # third parties' own, at import
            yield
    finally:
        random.setstate(seeds[0])
        numpy.random.set_state(seeds[1])
        torch.set_rng_state(seeds[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def old_transformers_names() -> Iterator[None]:
    """Names that the wheel takes from `transformers.modeling_utils` and that newer versions keep elsewhere, or not at all."""
    from transformers import modeling_utils, pytorch_utils

    def gone(*args: object, **kwargs: object) -> None:
        raise MissingPackageError("find_pruneable_heads_and_indices is not part of this transformers version; install transformers<5 to use it")

    added = []
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(modeling_utils, name):
            setattr(modeling_utils, name, getattr(pytorch_utils, name, gone))
            added.append(name)
    try:
        yield
    finally:
        for name in added:
            delattr(modeling_utils, name)


def host_module(name: str) -> types.ModuleType:
    """A module of EasyEdit by its full name (the package's attributes are shadowed, so it must be imported by name)."""
    return importlib.import_module(f"easyeditor.{name}")
