"""What EasyEdit calls by an old name when it runs a model: the cache, `past_key_values` until transformers
5.23.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_OLD, _NEW = "past_key_values", "cache"
_DONE = "_easyedit_mdm_cache"


def understand_old_cache_name(model: Any) -> None:
    """Let a model that knows its cache by the new name alone be called with the old one; its outputs keep
    both.

    Other models, and what is no torch module, are left as they are.
    """
    if not isinstance(model, nn.Module) or hasattr(model, _DONE):
        return
    names = inspect.signature(type(model).forward).parameters
    if _NEW in names and _OLD not in names:
        model.register_forward_pre_hook(_renamed, with_kwargs=True)
        model.register_forward_hook(_with_old_name)
        setattr(model, _DONE, True)


def _renamed(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if _OLD in kwargs and _NEW not in kwargs:
        kwargs = {(_NEW if name == _OLD else name): value for name, value in kwargs.items()}
    return args, kwargs


def _with_old_name(module: nn.Module, args: Any, output: Any) -> Any:
    if hasattr(output, _NEW) and not hasattr(type(output), _OLD):  # 5.24's outputs answer to both
        vars(output)[_OLD] = getattr(output, _NEW)
    return output
