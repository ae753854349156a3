"""What a sequence of edits has left in a model: the keys that a later edit must not disturb.

A history belongs to whoever edits in sequence (EasyEdit's editor, a script), not to a module or a model. It
knows which of its edits the model carries now by the hashes of the edited weights: an edit that was taken
back is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easyedit_mdm.common.fingerprints import tensor_sha256
from easyedit_mdm.models import Adapter


class History:
    """Keys of the edits that a model carries, by site."""

    def __init__(self) -> None:
        self._base: str | None = None
        self._edits: list[tuple[str, dict[str, Tensor]]] = []

    def __len__(self) -> int:
        return len(self._edits)

    def carried(self, adapter: Adapter, weights: Sequence[str]) -> dict[str, Tensor]:
        """Keys of the edits that the model carries, columns, by site; those of edits that were taken back are
        dropped.

        A model in a state that this history has never seen (something else has changed it since) is taken to
        carry all of them still.
        """
        now = _state(adapter, weights)
        if self._base is None:
            self._base = now
        states = [self._base, *(state for state, _ in self._edits)]
        if now in states:
            del self._edits[states.index(now) :]
        sites = {name for _, keys in self._edits for name in keys}
        return {
            name: torch.cat([keys[name] for _, keys in self._edits if name in keys], dim=1) for name in sites
        }

    def add(self, adapter: Adapter, weights: Sequence[str], keys: dict[str, Tensor]) -> None:
        """Remember an edit's keys, called while the model carries it."""
        self._edits.append((_state(adapter, weights), {name: value.cpu() for name, value in keys.items()}))

    def latest(self) -> dict[str, Tensor]:
        """The keys that were added last, by site; empty if there are none."""
        return dict(self._edits[-1][1]) if self._edits else {}


def _state(adapter: Adapter, weights: Sequence[str]) -> str:
    parameters = dict(adapter.named_parameters())
    return " ".join(tensor_sha256(parameters[name]) for name in weights)
