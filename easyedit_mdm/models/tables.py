"""The table of families in docs/families.md, made from the registry."""

from __future__ import annotations

import re

from easyedit_mdm.models.attention import CAUSAL, FULL
from easyedit_mdm.models.families import FAMILIES
from easyedit_mdm.models.spec import FamilySpec

_COLUMNS = ("family", "models", "class", "computed as", "attention", "shift", "mask id", "site", "verified")
_MARKED = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)


def families_table() -> str:
    """The table, in Markdown; one row a family, in alphabetical order."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *(_row(FAMILIES[name]) for name in sorted(FAMILIES))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def with_table(page: str) -> str:
    """A page whose marked table is made anew.

    Raises:
        ValueError: if the page marks no place for it.
    """
    made, places = _MARKED.subn(lambda marks: marks[1] + families_table() + marks[2], page)
    if not places:
        raise ValueError("the page has no <!-- families --> ... <!-- /families -->")
    return made


def _row(spec: FamilySpec) -> tuple[str, ...]:
    mask = "config or tokenizer" if spec.mask_id is None else str(spec.mask_id)
    native = spec.native + (f" (transformers >= {spec.since})" if spec.since else "")
    return (
        f"`{spec.name}`",
        spec.releases,
        ", ".join(f"`{name}`" for name in spec.architectures),
        native,
        _attention(spec),
        "config" if callable(spec.shift) else "yes" if spec.shift else "no",
        mask if spec.masked else "none: noise" if spec.noised else "",
        _site(spec),
        spec.verified,
    )


def _site(spec: FamilySpec) -> str:
    """Its own modules, by the native class's names."""
    down, mlp = spec.paths.down.format("N"), spec.paths.mlp.format("N")
    return f"`{down}`" if spec.experts is None else f"`{down}`; of a mixture `{mlp}.experts`"


def _attention(spec: FamilySpec) -> str:
    """In words; a function of the configuration is described by the first line of its docstring."""
    if callable(spec.attention):
        first = (spec.attention.__doc__ or "").strip().splitlines()[0].rstrip(".")
        return first[:1].lower() + first[1:]
    return str(spec.attention or (FULL if spec.denoises else CAUSAL))
