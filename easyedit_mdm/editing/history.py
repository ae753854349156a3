"""What a sequence of edits has left in a model: the keys that a later edit must not disturb.

A history belongs to whoever edits in sequence (EasyEdit's editor, a script), not to a module or a model. It
knows which of its edits the model carries now by the hashes of the edited weights: the last edits that were
taken back are forgotten. Of one in the middle the weights do not tell: a `Session`, which takes it back, says
so (`forget`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_mdm.common.fingerprints import tensor_sha256
from easyedit_mdm.common.weights import Weights
from easyedit_mdm.models import Adapter


@dataclass
class _Entry:
    """The weights' state after an edit, its keys by site, and whose they are."""

    state: str
    keys: dict[str, Tensor]
    owner: object = None


class History:
    """Keys of the edits that a model carries, by site."""

    def __init__(self) -> None:
        self._base: str | None = None
        self._weights: tuple[str, ...] = ()
        self._edits: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._edits)

    def carried(self, adapter: Adapter, weights: Sequence[str]) -> dict[str, Tensor]:
        """Keys of the edits that the model carries, columns, by site; those of edits that were taken back are
        dropped.

        A model in a state that this history has never seen (something else has changed it since) is taken to
        carry all of them still.
        """
        now = _state(adapter, weights)
        self._weights = tuple(weights)
        if self._base is None:
            self._base = now
        states = [self._base, *(entry.state for entry in self._edits)]
        if now in states:
            del self._edits[states.index(now) :]
        sites = {name for entry in self._edits for name in entry.keys}
        return {
            name: torch.cat([entry.keys[name] for entry in self._edits if name in entry.keys], dim=1)
            for name in sites
        }

    def add(self, adapter: Adapter, weights: Sequence[str], keys: dict[str, Tensor]) -> None:
        """Remember an edit's keys, called while the model carries it."""
        on_cpu = {name: value.cpu() for name, value in keys.items()}
        self._edits.append(_Entry(_state(adapter, weights), on_cpu))

    def claim(self, owner: object) -> None:
        """Say whose the keys are that were added last, if nobody has: the edit that `forget` may name."""
        if self._edits and self._edits[-1].owner is None:
            self._edits[-1].owner = owner

    def forget(self, owner: object, adapter: Adapter) -> None:
        """Drop the keys of an edit that the model carries no more, wherever it stood in the sequence.

        Called while the model carries the others. It does nothing if no keys are this owner's.
        """
        left = [entry for entry in self._edits if entry.owner is not owner]
        if len(left) == len(self._edits):
            return
        self._edits = left
        if left:  # the weights after all that are left
            left[-1].state = _state(adapter, self._weights)

    def latest(self) -> dict[str, Tensor]:
        """The keys that were added last, by site; empty if there are none."""
        return dict(self._edits[-1].keys) if self._edits else {}


def _state(adapter: Adapter, weights: Sequence[str]) -> str:
    parameters = Weights(adapter.native)
    return " ".join(tensor_sha256(parameters[name]) for name in weights)
