"""LoRA for both paradigms (Hu et al., arXiv 2106.09685): low-rank maps beside some linear maps, trained on
the facts' targets; the trained adapter is the edit.

    dW = (alpha / rank) B A,    A: rank x inputs, drawn at random,    B: outputs x rank, 0 at the start

minimises the loss over the states of the facts' targets (`solve.losses`), each fact counting by its tokens as
in EasyEdit's LoRA. peft puts the maps into the transformers model; they are taken out again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import nn

from easyedit_mdm.editing.edit import Edit, LowRank, identity
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest, check_requests
from easyedit_mdm.editing.solve.card import card
from easyedit_mdm.editing.solve.losses import StateLosses
from easyedit_mdm.editing.solve.training import TrainingHyperParams, train, weights_to_train
from easyedit_mdm.errors import HyperParameterError, MissingPackageError, ModelError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.hooks import frozen

_NAME = "easyedit_mdm"  # of the adapter, while it is in the model


@dataclass
class LoRAMDMHyperParams(TrainingHyperParams):
    """LORA_MDM's hyperparameters: see `TrainingHyperParams`. `layers: []` means all layers.

    Attributes:
        lora_type: `lora`; EasyEdit's `adalora` is not made here.
        target_modules: names, or ends of names, of the linear maps in a layer that are changed.
        rank, lora_alpha: dW is lora_alpha / rank times B A.
        lora_dropout: share of A's inputs that are dropped in training.
    """

    layers: list[int] = field(default_factory=list)
    num_steps: int = 70
    lr: float = 5e-3
    early_stop_loss: float = 0.0
    lora_type: str = "lora"
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1

    ALG_NAME: ClassVar[str] = "LORA_MDM"
    LAYERS: ClassVar[str] = "any"

    def validate(self) -> None:
        """As `TrainingHyperParams.validate`."""
        super().validate()
        self.check_choices(lora_type=("lora",))
        self.check_numbers(rank=1, whole=True)
        self.check_numbers(lora_alpha=0, lora_dropout=0)
        if self.lora_dropout >= 1:
            raise HyperParameterError(f"lora_dropout={self.lora_dropout!r} must be below 1")


def lora(adapter: Adapter, requests: Sequence[EditRequest], hparams: LoRAMDMHyperParams) -> Edit:
    """Make (not apply) one edit of all requests; a change of low rank for each linear map.

    A and the dropout are drawn with the seed of the hyperparameters.

    Raises:
        MissingPackageError: without peft.
        RequestError: for a request that cannot be carried out, or two that are the same or contradict each
            other.
        HyperParameterError: if a layer has no module of a name, or one that several modules share.
        ModelError: for a layer that does not exist, a weight that is offloaded or quantised, or if the model
            carries adapters of peft already.
        OptimisationError: if a loss is not a number.
    """
    check_requests(requests)
    peft, targets = _peft(), _targets(adapter, hparams)
    facts = [tokenise(adapter, request, hparams) for request in requests]
    losses = StateLosses(adapter, facts, hparams, min(targets.values()))
    with (
        frozen(adapter),
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
    ):
        torch.default_generator.manual_seed(hparams.seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(hparams.seed)
        with _injected(peft, identity(adapter), list(targets), hparams) as maps:
            trained = [p for p in identity(adapter).parameters() if p.requires_grad]
            outcomes = train(losses, hparams, trained, by_token=True)
            changes = [_change(name, each) for name, each in maps.items()]
    # experts that no token went through have nothing to say
    changes = [change for change in changes if change.left.any()] or changes
    return Edit(changes, card(requests, facts, hparams, outcomes, {}))


def _change(name: str, layer: Any) -> LowRank:
    """A trained map as the change of the weight beside it."""
    left = layer.lora_B[_NAME].weight.detach().float() * layer.scaling[_NAME]
    right = layer.lora_A[_NAME].weight.detach().float().clone()
    return LowRank(f"{name}.weight", left, right, bool(layer.fan_in_fan_out))


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            "LORA_MDM trains LoRA layers with peft, which is not installed: pip install 'easyedit-mdm[peft]'"
        ) from error
    return peft


def _targets(adapter: Adapter, hparams: LoRAMDMHyperParams) -> dict[str, int]:
    """The linear maps that are changed, by name, in the model's order, and the layer of each.

    Raises:
        HyperParameterError, ModelError: see `lora`.
    """
    layers: dict[str, int] = {}
    for layer in hparams.layers or range(adapter.layers):
        adapter.site(layer)  # an error that says which layers there are
        start = adapter.spec.paths.block.format(layer)
        inside = {
            f"{start}.{name}": module
            for name, module in adapter.module(start).named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
        for wanted in hparams.target_modules:
            matching = [name for name in inside if name.endswith(f".{wanted}")]
            if not matching:
                known = ", ".join(sorted({name.rpartition(".")[2] for name in inside}))
                raise HyperParameterError(
                    f"target_modules: layer {layer} of {adapter.name or adapter.spec.name} has no linear map"
                    f" {wanted!r}, but {known}"
                )
            layers |= dict.fromkeys(matching, layer)
    if not layers:
        raise HyperParameterError("target_modules is empty: name at least one linear map")
    _check_alone(adapter, layers)
    weights_to_train(adapter, [f"{name}.weight" for name in layers])
    return layers


def _check_alone(adapter: Adapter, targets: Mapping[str, int]) -> None:
    """A map beside one module would not be seen by others that share its weight."""
    owners: dict[int, set[str]] = {}
    for name, weight in identity(adapter).named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), set()).add(name)
    for name in targets:
        others = owners[id(adapter.weight_of(name))] - {f"{name}.weight"}
        if others:
            raise HyperParameterError(
                f"target_modules: {name}.weight is shared with {', '.join(sorted(others))}, and LoRA would"
                " change one of them: use FT_MDM"
            )


@contextmanager
def _injected(
    peft: Any, native: nn.Module, targets: list[str], hparams: LoRAMDMHyperParams
) -> Iterator[dict[str, Any]]:
    """peft's layers in the model, by the names of the maps that they stand beside; every module of the model
    is put back at the end, however it ends.

    Raises:
        ModelError: if the model carries adapters of peft already.
    """
    before = dict(native.named_modules(remove_duplicate=False))
    if "peft_config" in vars(native) or any(hasattr(m, "base_layer") for m in before.values()):
        raise ModelError("the model carries adapters of peft already: merge them, or take them out, first")
    config = peft.LoraConfig(
        r=hparams.rank, lora_alpha=hparams.lora_alpha, lora_dropout=hparams.lora_dropout,
        target_modules=targets, fan_in_fan_out=type(before[targets[0]]).__name__ == "Conv1D",
    )  # fmt: skip
    try:
        peft.inject_adapter_in_model(config, native, _NAME)
        maps = {name: native.get_submodule(name) for name in targets}
        for layer in maps.values():
            cast(nn.Module, layer.lora_dropout).train()  # the rest of the model is in eval mode
            layer.lora_A.float()
            layer.lora_B.float()
        yield maps
    finally:
        for name, module in before.items():
            parent, _, last = name.rpartition(".")
            if name and getattr(before[parent], last, None) is not module:
                setattr(before[parent], last, module)
        vars(native).pop("peft_config", None)


METHODS.register("LORA_MDM")(Method("LORA_MDM", LoRAMDMHyperParams, lora, stands_for="LoRA", batchable=True))
