"""EasyEdit's wheel writes `cuda:{device}` everywhere; on a machine without CUDA its calls run inside this
mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CudaMeansCpu(TorchFunctionMode):
    """Inside, every CUDA device named in `device=`, `.to(...)`, `.cuda()` or a constructor is the CPU."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = {k: _cpu(v) for k, v in (kwargs or {}).items()}
        if getattr(func, "__name__", "") == "cuda":
            return args[0]
        if getattr(func, "__name__", "") in ("to", "_parse_to"):
            args = tuple(_cpu(a) for a in args)
        return func(*args, **kwargs)


def _cpu(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value
