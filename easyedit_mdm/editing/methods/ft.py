"""Fine-tuning for both paradigms: the MLP's down-projection of some layers is trained on the facts' targets.

    W* = argmin_W  mean_f L_f(W),    |W - W_0| <= norm_constraint  in every entry (FT-L)

with L_f the loss over the states of fact f's target (`solve.losses`): the masked-diffusion loss on a model
that denoises, the next-token loss on an autoregressive one. Unconstrained it is EasyEdit's FT
(`objective_optimization: target_new`, FT-M of arXiv 2401.01286); the constraint is that of Zhu et al.
(arXiv 2012.00363).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from easyedit_mdm.editing.edit import Edit, keeping
from easyedit_mdm.editing.edit.change import Exact
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest, check_requests
from easyedit_mdm.editing.solve.card import Outcome, card
from easyedit_mdm.editing.solve.losses import StateLosses
from easyedit_mdm.editing.solve.sites import settled
from easyedit_mdm.editing.solve.training import TrainingHyperParams, train, weights_to_train
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.hooks import frozen

OBJECTIVES = ("target_new", "prompt_last")


@dataclass
class FTMDMHyperParams(TrainingHyperParams):
    """FT_MDM's hyperparameters: see `TrainingHyperParams`. All layers are trained at once.

    Attributes:
        norm_constraint: how far an entry of a weight may move; None or false: as far as it likes.
        objective_optimization: `target_new`: the loss over the target's states. `prompt_last`: all its tokens
            are read where the first is due, as in the paper that FT-L comes from (autoregressive models).
        rewrite_module_tmp: module that is trained, with {} for the layer; None: the MLP's down-projection.
    """

    norm_constraint: float | bool | None = None
    objective_optimization: str = "target_new"
    rewrite_module_tmp: str | None = None

    ALG_NAME: ClassVar[str] = "FT_MDM"
    LAYERS: ClassVar[str] = "some"

    def validate(self) -> None:
        """As `TrainingHyperParams.validate`."""
        super().validate()
        self.check_choices(objective_optimization=OBJECTIVES)
        if self.norm_constraint is True:
            raise HyperParameterError("norm_constraint=True: give the distance, or false for none")
        if self.norm_constraint not in (None, False):
            self.check_numbers(norm_constraint=0)
        if self.open_canvas and self.objective_optimization == "prompt_last":
            raise HyperParameterError(
                f"open_canvas={self.open_canvas} with objective_optimization: prompt_last, which reads all"
                " tokens at one place: use target_new"
            )


def ft(adapter: Adapter, requests: Sequence[EditRequest], hparams: FTMDMHyperParams) -> Edit:
    """Make (not apply) one edit of all requests.

    Weights in half precision are trained as float32 copies, and rounded after each step.

    Raises:
        RequestError: for a request that cannot be carried out, or two that are the same or contradict each
            other.
        HyperParameterError: for `prompt_last` on a model that denoises.
        ModelError: for a module or layer that does not exist, or a weight that is offloaded or quantised.
        OptimisationError: if a loss is not a number.
    """
    check_requests(requests)
    at_prompt = hparams.objective_optimization == "prompt_last"
    if at_prompt and adapter.denoises:
        raise HyperParameterError(
            f"objective_optimization: prompt_last reads the whole target where its first token is due, and"
            f" {adapter.name} has a slot for each token: use target_new"
        )
    facts = [tokenise(adapter, request, hparams) for request in requests]
    template = hparams.rewrite_module_tmp
    template = None if template is None else template.removesuffix(".weight")  # EasyEdit's files have it
    sites = [settled(adapter, adapter.site(layer, template), facts) for layer in hparams.layers]
    transposed = {name: site.transposed for site in sites for name in site.weights}
    weights_to_train(adapter, list(transposed))
    losses = StateLosses(adapter, facts, hparams, hparams.layers[0], at_prompt)
    outcomes, deltas = keeping(
        adapter, list(transposed), lambda: _trained(adapter, list(transposed), losses, hparams)
    )
    changes = [Exact(name, delta, transposed[name]) for name, delta in deltas.items()]
    return Edit(changes, card(requests, facts, hparams, outcomes, {}))


def _trained(
    adapter: Adapter, names: Sequence[str], losses: StateLosses, hparams: FTMDMHyperParams
) -> tuple[list[Outcome], dict[str, Tensor]]:
    """Train some weights of the model in place; what each has moved by, in float32."""
    weights = weights_to_train(adapter, names)
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    start = [weight.detach().to(wide, copy=True) for weight in weights]
    trained = [each.clone().requires_grad_() for each in start]
    gradients = [weight.grad for weight in weights]
    most = float(hparams.norm_constraint or 0) if hparams.norm_constraint not in (None, False) else None

    def before() -> None:
        """Take the gradients over from the model's weights."""
        for copy, weight in zip(trained, weights):
            copy.grad = None if weight.grad is None else weight.grad.to(wide)

    @torch.no_grad()
    def after() -> None:
        """Keep the constraint, and let the model compute with what was trained."""
        for copy, origin, weight in zip(trained, start, weights):
            if most is not None:
                copy.clamp_(origin - most, origin + most)
            weight.copy_(copy)
            weight.grad = None

    try:
        with frozen(adapter):
            for weight in weights:
                weight.requires_grad_(True)
                weight.grad = None
            outcomes = train(losses, hparams, trained, before=before, after=after)
    finally:
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient
    moved = [(copy.detach() - origin).float() for copy, origin in zip(trained, start)]
    return outcomes, dict(zip(names, moved))


METHODS.register("FT_MDM")(Method("FT_MDM", FTMDMHyperParams, ft, stands_for="FT", batchable=True))
