"""Hashes that say whether two models, or one model at two times, are the same bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from easyedit_mdm.common.weights import stored


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parameter_hashes(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter, by name."""
    return {name: tensor_sha256(stored(model, name, value)) for name, value in model.named_parameters()}


def model_fingerprint(model: torch.nn.Module, instead: Mapping[str, torch.Tensor] | None = None) -> str:
    """One SHA-256 over all parameters' names and hashes.

    Args:
        instead: tensors that are taken in place of the parameters of these names: the fingerprint of the
            model as it was with them.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        kept = (instead or {}).get(name)
        digest.update(
            f"{name} {tensor_sha256(stored(model, name, value) if kept is None else kept)}\n".encode()
        )
    return digest.hexdigest()
