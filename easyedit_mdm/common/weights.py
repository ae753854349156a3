"""A model's weights by name, wherever their values are: in the model, or, offloaded by accelerate, beside it.

Accelerate leaves the shape of an offloaded parameter in the model. Its values are in the CPU's memory or in a
file, and a hook brings them in whenever a pass needs them. A value that is put into such a weight is kept in
the CPU's memory, and the hook brings that one in. Files are never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_mdm.errors import ModelError


class Weights(Mapping[str, Tensor]):
    """Values of a model's parameters by name.

    Args:
        every: tied weights under each of their names, not under their first alone.
    """

    def __init__(self, model: nn.Module, every: bool = False):
        self.model = model
        self._parameters = dict(model.named_parameters(remove_duplicate=not every))

    def __getitem__(self, name: str) -> Tensor:
        return stored(self.model, name, self._parameters[name])

    def __contains__(self, name: object) -> bool:
        return name in self._parameters  # Mapping's would read the values

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def put(self, name: str, value: Tensor) -> None:
        """Copy a value into a weight.

        Raises:
            ModelError: for one that is offloaded in a way that takes no other value (`writable`).
        """
        parameter = self._parameters[name]
        if not parameter.is_meta:
            # no decorator for no_grad: Ctrl-C in it would strike behind the caller's back
            parameter.data.copy_(value)
            return
        kept, key, filed = _place(self.model, name)
        if kept is None:
            raise ModelError(f"{name} is offloaded and cannot be changed: load the model without offloading")
        if filed is not None and torch.equal(filed[key], value.cpu()):
            kept.pop(key, None)  # the file has it already
        else:
            kept[key] = value.detach().to("cpu", parameter.dtype, copy=True)

    def writable(self, name: str) -> bool:
        """Whether `put` can change it."""
        return not self._parameters[name].is_meta or _place(self.model, name)[0] is not None


def stored(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """The values of a parameter, of which accelerate may have left but the shape in the model.

    Raises:
        ModelError: if they are nowhere.
    """
    if not value.is_meta:
        return value
    path, _, own = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    weights = getattr(hook, "weights_map", None)
    if weights is None:
        raise ModelError(f"{name} has a shape and no values (it is on the meta device): load the model anew")
    return weights[own]


def _place(model: nn.Module, name: str) -> tuple[dict[str, Tensor] | None, str, Mapping[str, Tensor] | None]:
    """Where accelerate looks for an offloaded parameter's values: first in a dictionary, then in files.

    Returns:
        the dictionary (None: it is another kind of store), the key in it, and, if there is a file of it, what
        the files hold, whatever has been put before them.
    """
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

    path, _, key = name.rpartition(".")
    values: Any = getattr(getattr(model.get_submodule(path), "_hf_hook", None), "weights_map", None)
    while isinstance(values, PrefixedDataset):
        values, key = values.dataset, f"{values.prefix}{key}"
    if isinstance(values, OffloadedWeightsLoader):
        filed = OffloadedWeightsLoader(save_folder=values.save_folder, index=values.index)
        return values.state_dict, key, filed if key in values.index else None
    return (values if isinstance(values, dict) else None), key, None
