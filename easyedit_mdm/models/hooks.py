"""Reading and changing what passes through a module, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[tuple, Any], Any]) -> Iterator[None]:
    """Let `hook` see (arguments, output) of every call of `module`, and replace the output by what it
    returns, if it is not None.
    """
    call, handle = _Switched(hook), None
    try:
        handle = module.register_forward_hook(call)
        yield
    finally:
        call.on = False
        if handle is not None:
            handle.remove()


class _Switched:
    """Torch's forward hook, which does nothing once it is off: Ctrl-C may strike before its handle is kept,
    and then it stays in the module.
    """

    def __init__(self, hook: Callable[[tuple, Any], Any]) -> None:
        self.hook, self.on = hook, True

    def __call__(self, _: nn.Module, args: tuple, out: Any) -> Any:
        return self.hook(args, out) if self.on else None


@contextmanager
def reading_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first argument of every call of `module`."""
    seen: list[Tensor] = []
    with _hooked(module, lambda args, _: seen.append(args[0])):
        yield seen


@contextmanager
def reading_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every call of `module`."""
    seen: list[Tensor] = []
    with _hooked(module, lambda _, out: seen.append(out[0] if isinstance(out, tuple) else out)):
        yield seen


@contextmanager
def reading_all(module: nn.Module) -> Iterator[list[Any]]:
    """Collect the whole output of every call of `module`, whatever it is."""
    seen: list[Any] = []
    with _hooked(module, lambda _, out: seen.append(out)):
        yield seen


@contextmanager
def changing_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of `module` by `change(output)`."""
    with _hooked(
        module, lambda _, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    ):
        yield


@contextmanager
def answering(module: nn.Module, answer: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of `module` by `answer(input, output)`."""
    with _hooked(module, lambda args, out: answer(args[0], out)):
        yield


@contextmanager
def adding_at(module: nn.Module, at: Tensor, values: Tensor) -> Iterator[None]:
    """Add `values` (rows x width) to the output of `module`, one vector a row, at column `at` of each;
    gradients go into `values`.
    """

    with changing_output(module, lambda out: added_at(out, at, values)):
        yield


def added_at(hidden: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """`hidden` (rows x length x width) with `values` (rows x width) added at column `at` of each row."""
    extra = torch.zeros_like(hidden)
    extra[torch.arange(len(hidden), device=hidden.device), at.to(hidden.device)] = values.to(
        hidden.device, hidden.dtype
    )
    return hidden + extra


@contextmanager
def writing_through(module: nn.Module, rights: Tensor, lefts: Tensor) -> Iterator[None]:
    """Let every row see `module` with a rank-one change of its own weight: left (right . x) is added to its
    output at every position.

    Args:
        rights: (rows x inner); lefts: (rows x width). Gradients go into `lefts`.
    """
    with _hooked(module, lambda args, out: spread_over(out, reach_of(args[0], rights), lefts)):
        yield


@contextmanager
def writing_all_through(module: nn.Module, rights: Tensor, lefts: Tensor) -> Iterator[None]:
    """Let every row see `module` with the same changes of its weight, the sum over f of left_f right_f^T.

    Args:
        rights: (changes x inner); lefts: (changes x width). Gradients go into `lefts`.
    """
    with _hooked(module, lambda args, out: spread_all_over(out, reaches_of(args[0], rights), lefts)):
        yield


def reach_of(entering: Tensor, rights: Tensor) -> Tensor:
    """How much of a rank-one change arrives at each position (rows x length), in float32, given what enters
    the changed map there.
    """
    return torch.einsum("rli,ri->rl", entering.float(), rights.to(entering.device, torch.float32))


def spread_over(hidden: Tensor, reach: Tensor, values: Tensor) -> Tensor:
    """`hidden` (rows x length x width) with `values` (rows x width) added at every position, as much as
    `reach` (rows x length) says.
    """
    return hidden + (reach.to(hidden.device)[..., None] * values.to(hidden.device)[:, None]).to(hidden.dtype)


def reaches_of(entering: Tensor, rights: Tensor) -> Tensor:
    """`reach_of` for changes that every row sees: (rows x length x changes), `rights` being (changes x
    inner).
    """
    return entering.float() @ rights.to(entering.device, torch.float32).T


def spread_all_over(hidden: Tensor, reaches: Tensor, values: Tensor) -> Tensor:
    """`spread_over` for changes that every row sees, `values` being (changes x width)."""
    return hidden + (reaches.to(hidden.device) @ values.to(hidden.device, reaches.dtype)).to(hidden.dtype)


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
