"""Which versions of the packages under us were tested: read from our own metadata, which pyproject.toml states."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

_OURS = "easyedit-mdm"
WATCHED = ("torch", "transformers", "accelerate", "peft", "safetensors")


def tested_range(package: str) -> SpecifierSet:
    """The versions of `package` that were tested; empty (anything goes) where our metadata names none."""
    try:
        lines = metadata.requires(_OURS) or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return SpecifierSet()
    for line in lines:
        requirement = Requirement(line)
        if requirement.name == package:
            return requirement.specifier
    return SpecifierSet()


def installed(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def outside(package: str) -> bool:
    """Whether the installed version lies outside the tested range."""
    version = installed(package)
    return version is not None and not tested_range(package).contains(version, prereleases=True)


def advice(package: str) -> str:
    """One sentence: what is installed, what was tested, what to do."""
    wanted = ",".join(sorted((str(s) for s in tested_range(package)), reverse=True)) or "any"
    if outside(package):
        return f"{package} {installed(package)} is outside the tested range ({wanted}): pip install '{package}{wanted}'."
    return f"{package} {installed(package)} is installed; tested: {wanted}. Please report this."
