"""Whether a value from a file is of the kind that a field is annotated with."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of an annotated kind, looking into lists, dicts and unions; an int is a float, a bool is neither."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(fits(item, inside[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inside[0]) and fits(v, inside[1]) for k, v in value.items())
    return value is None if kind in (None, type(None)) else isinstance(value, kind)


def misfit(cls: type, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first of `values` that is not of the kind of its field in a dataclass, and that kind in words; None if all are."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in values and not fits(values[field.name], hints[field.name]):
            return field.name, str(field.type)
    return None
