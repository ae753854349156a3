"""Training weights on facts: what fine-tuning and LoRA share.

Adam goes through the facts `batch_size` at a time, one step a batch, `num_steps` times, as EasyEdit's FT and
LoRA do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from easyedit_mdm.editing.edit import identity
from easyedit_mdm.editing.hparams import StateHyperParams
from easyedit_mdm.editing.solve.card import Outcome, note_losses
from easyedit_mdm.editing.solve.losses import StateLosses
from easyedit_mdm.errors import ModelError
from easyedit_mdm.models import Adapter


@dataclass
class TrainingHyperParams(StateHyperParams):
    """What the methods add that train weights.

    Attributes:
        num_steps: times that Adam goes through the facts.
        lr: Adam's learning rate.
        weight_decay: Adam's, on the trained weights themselves.
        early_stop_loss: a batch whose loss is below this makes no step; the training ends once the mean over
            all facts is, averaged over a cycle of states.
        batch_size: facts a step; requests a batch in EasyEdit's `batch_edit`.
        context_template_length_params: none by default: the bare prompt alone, as in EasyEdit.
    """

    num_steps: int = 25
    lr: float = 5e-4
    weight_decay: float = 0.0
    early_stop_loss: float = 0.01
    batch_size: int = 1
    context_template_length_params: list[list[int]] = field(default_factory=list)

    def validate(self) -> None:
        """As `StateHyperParams.validate`."""
        super().validate()
        self.check_numbers(num_steps=1, batch_size=1, whole=True)
        self.check_numbers(lr=0, weight_decay=0, early_stop_loss=0)

    def advice(self, loss: float) -> str:
        """As `MethodHyperParams.advice`."""
        return (
            f"Try more steps (num_steps: {2 * self.num_steps}), another lr than {self.lr:g}, or other layers"
        )


def weights_to_train(adapter: Adapter, names: Sequence[str]) -> list[Tensor]:
    """The weights of these names.

    Raises:
        ModelError: for one that is not in memory, or is quantised, which no edit could be added to.
    """
    known = dict(identity(adapter).named_parameters(remove_duplicate=False))
    for name in names:
        weight = known[name]
        if weight.is_meta:
            raise ModelError(
                f"{name} is offloaded and cannot be trained: load the model without offloading (device_map,"
                " max_memory), or name another layer"
            )
        if not weight.is_floating_point():
            raise ModelError(
                f"{name} is {weight.dtype}, a quantised weight: load it in bfloat16, float16 or float32"
            )
    return [known[name] for name in names]


def train(
    losses: StateLosses,
    hparams: TrainingHyperParams,
    parameters: Sequence[Tensor],
    by_token: bool = False,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Train parameters on the losses of facts.

    Args:
        by_token: facts of a batch count by their number of tokens, as in the loss of transformers' models;
            otherwise all alike.
        before: called between the gradients and a step.
        after: called after each batch, whether it made a step or not.

    Returns:
        losses, steps and cost of each fact.

    Raises:
        OptimisationError: if a loss is not a number.
    """
    optimizer = torch.optim.Adam(parameters, lr=hparams.lr, weight_decay=hparams.weight_decay)
    done, size = losses.outcomes, hparams.batch_size
    numbers = list(range(len(done)))
    recent: deque[float] = deque(maxlen=losses.cycle)
    for step in range(hparams.num_steps):
        mean = 0.0
        for some in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            optimizer.zero_grad()
            shares = torch.tensor([float(len(losses.facts[i].target)) if by_token else 1.0 for i in some])
            shares /= shares.sum()
            each = losses.backward(step, some, shares).cpu()
            loss = float((each * shares).sum())
            note_losses([done[i] for i in some], each, step, f"lr={hparams.lr}")
            if loss >= hparams.early_stop_loss:
                before()
                optimizer.step()
                for i in some:
                    done[i].steps += 1
            after()
            mean += loss * len(some) / len(numbers)
        recent.append(mean)
        if len(recent) == recent.maxlen and sum(recent) / len(recent) < hparams.early_stop_loss:
            break
    return done
