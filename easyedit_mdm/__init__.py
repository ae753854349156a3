"""easyedit_mdm: locate-then-edit for masked diffusion language models, as a plug-in for EasyEdit.

Importing this package imports neither torch nor EasyEdit; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from easyedit_mdm.version import __version__

_LAZY = {
    "load_model": "easyedit_mdm.api",
    "wrap_model": "easyedit_mdm.api",
    "Adapter": "easyedit_mdm.models",
    "DecodeConfig": "easyedit_mdm.denoising",
    "decode": "easyedit_mdm.denoising",
    "schedule": "easyedit_mdm.denoising",
    "Edit": "easyedit_mdm.editing",
    "EditRequest": "easyedit_mdm.editing",
    "ROMEMDMHyperParams": "easyedit_mdm.editing",
    "make_edit": "easyedit_mdm.api",
    "make_edits": "easyedit_mdm.api",
    "Session": "easyedit_mdm.session",
    "score_prompts": "easyedit_mdm.evaluation",
    "register": "easyedit_mdm.host",
    "BaseEditor": "easyedit_mdm.host",
    "EasyEditMDMError": "easyedit_mdm.errors",
}

__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'easyedit_mdm' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
