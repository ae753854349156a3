"""Which family a folder, or a model in memory, belongs to; and what an unknown one has in common with those
that are known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.errors import CheckpointError, ModelError
from easyedit_mdm.models.families import FAMILIES
from easyedit_mdm.models.families._adapted import SECTION
from easyedit_mdm.models.native import class_names
from easyedit_mdm.models.spec import Config, FamilySpec

_SIGNS = ("mask_token_id", "block_size", "bd_size", "canvas_length", SECTION)
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
DOCS = "docs/extending.md (A family)"


def architecture(config: Config) -> str:
    """The class that a configuration names first, `?` where it names none."""
    listed = config.get("architectures")
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else "?"


def by_architecture(config: Config) -> list[FamilySpec]:
    """The families that have the class which a configuration names.

    Raises:
        CheckpointError: if there is none, with what this one has in common with known ones.
    """
    name = architecture(config)
    families = [FAMILIES[n] for n in FAMILIES if name in FAMILIES[n].architectures]
    if not families:
        raise CheckpointError(_unknown(config, ()))
    return families


def detect(config: Config, files: Iterable[str]) -> FamilySpec:
    """The family, by `architectures[0]` and a key of the checkpoint (model_type alone is shared by unlike
    models).

    Args:
        files: the checkpoint's keys.

    Raises:
        CheckpointError: if no family fits, saying which ones were close, or if an autoregressive class is
            named by what looks like a diffusion model.
    """
    name = architecture(config)
    named = [FAMILIES[n] for n in FAMILIES if name in FAMILIES[n].architectures]
    for spec in named:
        if _probed(spec, files):
            check_causal(spec, config)
            return spec
    if named:
        raise CheckpointError(
            f"architecture {name} is known, but the checkpoint has no {named[0].probe!r}: another variant"
            " of it?"
        )
    raise CheckpointError(_unknown(config, files))


def check_causal(spec: FamilySpec, config: Config) -> None:
    """Refuse a diffusion model that goes by the name of an autoregressive class.

    Raises:
        CheckpointError: naming what in its configuration speaks of diffusion, or of code of its own.
    """
    signs = [] if spec.denoises else _signs(spec, config)
    if signs:
        raise CheckpointError(
            f"config.json says {architecture(config)}, which is autoregressive, but also {', '.join(signs)}:"
            " a model that denoises must not be edited as one that writes from left to right. If it is a"
            f" plain {spec.name} model all the same, load it with family={spec.name!r}; an adapted one says"
            f" so in architectures ({spec.native}ForMaskedDiffusion); for a new family see {DOCS}"
        )


def _signs(spec: FamilySpec, config: Config) -> list[str]:
    """What in a configuration does not go with an autoregressive family."""
    remote = config.get("auto_map")
    named = {str(k): str(v) for k, v in remote.items()} if isinstance(remote, Mapping) else {}
    models = {
        v
        for k, v in named.items()
        if k.startswith("AutoModel") and v.rsplit(".", 1)[-1] not in class_names(spec)
    }
    signs = [f"{key}={config[key]!r}" for key in _SIGNS if config.get(key) is not None]
    listed = config.get("architectures")
    others = [str(a) for a in listed[1:]] if isinstance(listed, list) else []
    diffusing = [a for a in others if re.search(r"diffus|dllm|masked", a, re.IGNORECASE)]
    return (
        [f"auto_map names {name}" for name in sorted(models)]
        + signs
        + [f"architectures names {a}" for a in diffusing]
    )


def _probed(spec: FamilySpec, files: Iterable[str]) -> bool:
    probe = spec.native_name(spec.probe)
    return any(spec.native_name(key) == probe for key in files)


def _fits(spec: FamilySpec, config: Config) -> bool:
    """Whether a configuration has the fields that a family reads, with values that it computes."""
    try:
        spec.native_config(config)
        return {"hidden_size", "d_model", "n_embd"} & set(config) != set()
    except Exception:  # whatever strange values lead to: it does not fit
        return False


def _unknown(config: Config, files: Iterable[str]) -> str:
    """What a configuration of no known family has in common with known ones, and what to do."""
    name, kind = architecture(config), config.get("model_type")
    known = [a for n in FAMILIES for a in FAMILIES[n].architectures]
    common = []
    alike = [n for n in FAMILIES if _probed(FAMILIES[n], files)]
    if alike:
        common.append(f"its tensors are named as those of {', '.join(alike)}")
    same = [n for n in FAMILIES if kind and kind in (n, *FAMILIES[n].native_model_types)]
    if same:
        common.append(f"model_type {kind!r} is that of {', '.join(same)}")
    fitting = [n for n in FAMILIES if _fits(FAMILIES[n], config)] if alike or same else []
    if fitting:
        common.append(f"it has the fields that {', '.join(fitting)} read")
    other = [f"{key}={config[key]!r}" for key in (*_SIGNS, *_EXPERTS) if config.get(key) is not None]
    return (
        f"architecture {name!r} is not known{did_you_mean(name, known)} Known:"
        f" {', '.join(sorted(set(known)))}. "
        + (f"In common with known families: {'; '.join(common)}. " if common else "")
        + (f"It also says {', '.join(other)}. " if other else "")
        + "If its arithmetic is that of a known family, load it with family=...; a new family is one file:"
        f" {DOCS}"
    )


def family_of(native: Any) -> FamilySpec:
    """The family of a transformers model in memory.

    Raises:
        ModelError: if none computes with its class, or its configuration speaks of diffusion while its class
            is autoregressive.
    """
    config: dict[str, Any] = vars(native.config) if native.config else {}
    kind, name = getattr(native.config, "model_type", ""), type(native).__name__
    computing = [FAMILIES[n] for n in FAMILIES if name in class_names(FAMILIES[n])]
    for spec in computing:
        if architecture(config) in spec.architectures and spec.denoises:
            return spec
    for spec in computing:
        if kind in spec.native_model_types:
            try:
                check_causal(spec, config)
            except CheckpointError as error:
                raise ModelError(str(error)) from error
            return spec
    raise ModelError(
        f"no adapter for a {name} (model_type {kind!r}). Known families: {', '.join(FAMILIES)}. Masked models"
        " share their class with autoregressive ones: name the family, or load them with"
        " easyedit_mdm.load_model."
    )
