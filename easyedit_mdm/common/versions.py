"""Which versions of other packages were tested: read from our own metadata, which pyproject.toml states."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

_OURS = "easyedit-mdm"


def needed() -> list[str]:
    """The packages that this one cannot do without, as pyproject.toml names them."""
    return [r.name for r in _requirements() if r.marker is None]


def tested_range(package: str) -> SpecifierSet:
    """The versions of `package` that were tested; empty (anything goes) where our metadata names none."""
    return next((r.specifier for r in _requirements() if r.name == package), SpecifierSet())


def advice(package: str) -> str:
    """One sentence: what is installed, what was tested, what to do."""
    tested = tested_range(package)
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed: pip install '{package}{tested}'."
    if tested.contains(Version(version).public, prereleases=True):
        return f"{package} {version} is within the tested range ({tested}): please report this."
    return f"{package} {version} is outside the tested range ({tested}): pip install '{package}{tested}'."


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires(_OURS) or []]
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []
