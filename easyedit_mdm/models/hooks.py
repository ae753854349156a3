"""Reading and changing what passes through a module, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def reading_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first argument of every call of `module`."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def reading_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every call of `module`."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def changing_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of `module` by `change(output)`."""

    on = True

    def hook(_: nn.Module, __: tuple, out: Any) -> Any:
        """Torch's forward hook."""
        if not on:  # Ctrl-C struck before its handle was kept: it is still there, and does nothing
            return out
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = None
    try:
        handle = module.register_forward_hook(hook)
        yield
    finally:
        on = False
        if handle is not None:
            handle.remove()


@contextmanager
def adding_at(module: nn.Module, at: Tensor, values: Tensor) -> Iterator[None]:
    """Add `values` (rows x width) to the output of `module`, one vector a row, at column `at` of each; gradients go into `values`."""

    with changing_output(module, lambda out: added_at(out, at, values)):
        yield


def added_at(hidden: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """`hidden` (rows x length x width) with `values` (rows x width) added at column `at` of each row."""
    extra = torch.zeros_like(hidden)
    extra[torch.arange(len(hidden), device=hidden.device), at.to(hidden.device)] = values.to(hidden.device, hidden.dtype)
    return hidden + extra


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside the block; each one's flag is put back after it."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval()
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        model.train(training)
