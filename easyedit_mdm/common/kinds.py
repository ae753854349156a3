"""Mappings from files and callers, held by pydantic against the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import reprlib
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.errors import HyperParameterError

_UNKNOWN, _MISSING = ("extra_forbidden", "invalid_key"), "missing"


def checked(cls: type, values: Mapping[str, Any], what: str = "hyperparameter") -> dict[str, Any]:
    """The values of some fields of a dataclass, of the kinds that it is annotated with; whole numbers in
    float fields become floats, everything else is left as it is.

    Args:
        what: what a value is called in messages.

    Raises:
        HyperParameterError: for a key that is no field, with the nearest one; a field without a value; a
            value of another kind.
    """
    try:
        model = _model(cls).model_validate(dict(values))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        raise HyperParameterError(_message(cls, values, what, errors)) from None
    read = {key: getattr(model, key) for key in values}
    return {key: read[key] if isinstance(read[key], float) else value for key, value in values.items()}


@lru_cache(maxsize=64)  # a function of the class alone
def _model(cls: type) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass; strict: no string is a number, no bool an int."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {
        f.name: (hints[f.name], ... if f.default is f.default_factory is dataclasses.MISSING else None)
        for f in dataclasses.fields(cls)
    }
    config = ConfigDict(strict=True, extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)
    return create_model(cls.__name__, __config__=config, **fields)


def _message(cls: type, values: Mapping[str, Any], what: str, errors: list[Any]) -> str:
    """The first thing that is wrong: unknown keys before missing ones before wrong kinds."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    for error in errors:
        if error["type"] in _UNKNOWN:
            key = error["loc"][0]
            meant = did_you_mean(str(key), kinds)
            return f"unknown {what} {key!r}{meant}" + (f" Known: {', '.join(kinds)}" if meant == "." else "")
    absent = [str(error["loc"][0]) for error in errors if error["type"] == _MISSING]
    if absent:
        return f"{what} {', '.join(absent)} is missing"
    name = str(errors[0]["loc"][0])
    return f"{what} {name}={reprlib.repr(values[name])} is not of the kind {kinds[name]}"
