"""Hashes that say whether two models, or one model at two times, are the same bit for bit."""

from __future__ import annotations

import hashlib

import torch


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def parameter_hashes(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter, by name."""
    return {name: tensor_sha256(value) for name, value in model.named_parameters()}


def model_fingerprint(model: torch.nn.Module) -> str:
    """One SHA-256 over all parameters' names and hashes."""
    digest = hashlib.sha256()
    for name, value in sorted(parameter_hashes(model).items()):
        digest.update(f"{name} {value}\n".encode())
    return digest.hexdigest()
