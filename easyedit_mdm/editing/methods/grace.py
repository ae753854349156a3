"""GRACE for both paradigms (Hartvigsen et al., arXiv 2211.11031): a codebook at one layer, no weight changes.

What enters the MLP's down-projection at the prompt's last token is a fact's key. A value v is optimised that,
in place of the layer's own output there, makes the model say the target
(`easyedit_mdm.editing.solve.replaced`). From then on the output is v wherever the input lies within a key's
radius (`easyedit_mdm.editing.edit.attached.Codebook`). The edited models of EasyEdit look at one token, the
prompt's last; this one looks at all, since nobody tells a model where its prompt ends.

In a masked model the key depends on what the target's slots show. `key_states: per_state` keeps a key for
each state, all with the same value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.edit.attached import Codebook
from easyedit_mdm.editing.facts import Fact, tokenise
from easyedit_mdm.editing.hparams import FACT_TOKENS, StateHyperParams
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest, check_requests
from easyedit_mdm.editing.solve.card import card
from easyedit_mdm.editing.solve.keys import SiteRows, key_states, read_site
from easyedit_mdm.editing.solve.replaced import replacing_values
from easyedit_mdm.editing.solve.sites import one_map
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site


@dataclass
class GRACEMDMHyperParams(StateHyperParams):
    """GRACE_MDM's hyperparameters; EasyEdit's GRACE has the first five under the same names.

    Attributes:
        edit_lr: Adam's learning rate.
        n_iter: the most steps for a value.
        eps: radius of a new key.
        val_init: what a value starts from: `warm`, the layer's own output, or `cold`, numbers between 0 and 1
            drawn from the seed.
        batch_size: requests a batch, for EasyEdit's `batch_edit`.
        fact_token: where the key is read and the value put: `last`, of the prompt, as in GRACE, or one of the
            subject's.
        key_states: `full_mask`: one key a fact, with nothing revealed; `per_state`: one for each state of the
            target (masked models).
        early_stop_loss: a value is done when its mean loss over a cycle of states is below this; 0, as in
            EasyEdit: never.
        rewrite_module_tmp: the linear map, by default the MLP's down-projection.
    """

    edit_lr: float = 1.0
    n_iter: int = 50
    eps: float = 1.0
    val_init: str = "warm"
    batch_size: int = 1
    fact_token: str = "last"
    key_states: str = "full_mask"
    early_stop_loss: float = 0.0
    rewrite_module_tmp: str | None = None
    context_templates: list[str] | None = field(default_factory=lambda: ["{}"])

    ALG_NAME: ClassVar[str] = "GRACE_MDM"

    def validate(self) -> None:
        """As `MethodHyperParams.validate`."""
        super().validate()
        self.check_numbers(n_iter=1, batch_size=1, whole=True)
        self.check_numbers(edit_lr=0, eps=0, early_stop_loss=0)
        self.check_choices(
            val_init=("warm", "cold"), fact_token=FACT_TOKENS, key_states=("full_mask", "per_state")
        )

    def advice(self, loss: float) -> str:
        """As `MethodHyperParams.advice`."""
        return (
            f"Try more steps (n_iter: {2 * self.n_iter}), key_states: per_state, a wider radius (eps:"
            f" {2 * self.eps:g}) or another layer"
        )


def grace(adapter: Adapter, requests: Sequence[EditRequest], hparams: GRACEMDMHyperParams) -> Edit:
    """Make (not apply) one edit of all requests: a part of a codebook for each.

    Raises:
        RequestError: for a request that cannot be carried out.
        HyperParameterError: at the experts of a mixture; for an open canvas with one key a fact.
        OptimisationError: if the optimisation breaks down.
    """
    check_requests(requests)
    site = one_map(adapter, hparams)
    facts = [tokenise(adapter, request, hparams) for request in requests]
    keys, outputs = zip(*(_keys(adapter, site, fact, hparams) for fact in facts))
    initial = torch.stack(outputs)
    if hparams.val_init == "cold":
        generator = torch.Generator().manual_seed(hparams.seed)
        initial = torch.rand(initial.shape, generator=generator).to(initial)
    values, outcomes = replacing_values(
        adapter, site, facts, initial, hparams, hparams.n_iter, hparams.edit_lr, hparams.early_stop_loss
    )
    parts = [
        Codebook(
            site.name,
            {
                "keys": key.cpu(),
                "values": value.cpu().expand(len(key), -1).contiguous(),
                "target": fact.target.cpu(),
            },
            {"radius": float(hparams.eps)},
        )
        for key, value, fact in zip(keys, values, facts)
    ]
    return Edit([], card(requests, facts, hparams, outcomes, {}), parts)


def _keys(
    adapter: Adapter, site: Site, fact: Fact, hparams: GRACEMDMHyperParams
) -> tuple[Float[Tensor, "keys inner"], Float[Tensor, " width"]]:
    """A fact's keys for the bare prompt, and the site's output for the first, with nothing revealed."""
    sees = adapter.denoises and not adapter.attention.causal  # what the slots show
    if sees and hparams.open_canvas and hparams.key_states != "per_state":
        raise HyperParameterError(
            f"open_canvas={hparams.open_canvas} with key_states: {hparams.key_states}: the codebook would not"
            " know the keys of the longer canvas; use key_states: per_state"
        )
    group = key_states(adapter, fact, hparams, hparams.key_states)[0]
    rows = SiteRows.of((fact.contexts[0], tail) for tail in group.tails)
    keys, outputs = read_site(adapter, site, rows, hparams.max_rows)
    # a causal model's key does not see the slots: the states would give one key again and again
    return (keys if sees else keys[:1]), outputs[0]


METHODS.register("GRACE_MDM")(
    Method("GRACE_MDM", GRACEMDMHyperParams, grace, stands_for="GRACE", batchable=True)
)
