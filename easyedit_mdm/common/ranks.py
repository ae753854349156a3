"""Which of several processes this one is, as `torchrun` and `accelerate launch` tell it (RANK, WORLD_SIZE).

The processes share work through files, which also lets a killed run go on: none waits for a message.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from easyedit_mdm.errors import HyperParameterError


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, by number.

    Attributes:
        local: its number on this machine: of its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """Its own GPU, where several processes ask for `cuda`."""
        return f"cuda:{self.local}" if wanted == "cuda" and self.world > 1 else wanted


ALONE = Ranks()


def launched() -> Ranks:
    """What the launcher has put into the environment; one process alone without one.

    Raises:
        HyperParameterError: for values that are no numbers, or a rank beyond the number of processes.
    """
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": os.environ.get("RANK", "0")}
    values = {name: os.environ.get(name, default) for name, default in names.items()}
    if not all(value.isdecimal() for value in values.values()) or not int(values["RANK"]) < int(
        values["WORLD_SIZE"]
    ):
        raise HyperParameterError(
            f"RANK={values['RANK']!r}, WORLD_SIZE={values['WORLD_SIZE']!r}, LOCAL_RANK="
            f"{values['LOCAL_RANK']!r} in the environment: a launcher such as torchrun sets whole numbers,"
            " the rank below the size; unset them to run one process"
        )
    return Ranks(*(int(value) for value in values.values()))
