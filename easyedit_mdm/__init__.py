"""easyedit_mdm: locate-then-edit for masked diffusion language models, as a plug-in for EasyEdit.

Importing this package imports neither torch nor EasyEdit; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from easyedit_mdm.version import __version__

_PUBLIC = {
    "load_model": "easyedit_mdm.api",
    "wrap_model": "easyedit_mdm.api",
    "load_hparams": "easyedit_mdm.api",
    "make_edit": "easyedit_mdm.api",
    "Edit": "easyedit_mdm.editing",
    "Session": "easyedit_mdm.session",
    "score_prompts": "easyedit_mdm.evaluation",
    "register": "easyedit_mdm.host",
    "BaseEditor": "easyedit_mdm.host",
    "EasyEditMDMError": "easyedit_mdm.errors",
}
# were public once, and are still found here
_EARLIER = {
    "make_edits": "easyedit_mdm.api",
    "Adapter": "easyedit_mdm.models",
    "DecodeConfig": "easyedit_mdm.denoising",
    "decode": "easyedit_mdm.denoising",
    "schedule": "easyedit_mdm.denoising",
    "EditRequest": "easyedit_mdm.editing",
    "ROMEMDMHyperParams": "easyedit_mdm.editing",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    room = _PUBLIC.get(name) or _EARLIER.get(name)
    if room is not None:
        return getattr(importlib.import_module(room), name)
    if name.endswith("HyperParams"):
        raise AttributeError(
            f"module 'easyedit_mdm' has no attribute {name!r}: load_hparams reads any method's file"
        )
    from easyedit_mdm.common.registry import did_you_mean

    raise AttributeError(f"module 'easyedit_mdm' has no attribute {name!r}{did_you_mean(name, _PUBLIC)}")


def __dir__() -> list[str]:
    return sorted(__all__)
