"""Where the twins' files are."""

from __future__ import annotations

from pathlib import Path

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.errors import CheckpointError

TWINS = ("twin-llada", "twin-dream", "twin-llama", "twin-qwen")


def twin_folder(name: str) -> Path:
    """The folder of a twin that ships with the package, in the hub's own format.

    Raises:
        CheckpointError: for a name that is no twin's, or if the file is not installed.
    """
    if name not in TWINS:
        raise CheckpointError(
            f"{name!r} is not one of the twins {', '.join(TWINS)}{did_you_mean(name, TWINS)}"
        )
    folder = Path(__file__).parent / "weights" / name
    if not (folder / "config.json").exists():
        raise CheckpointError(f"the files of {name} are not in {folder}: is the installation complete?")
    return folder
