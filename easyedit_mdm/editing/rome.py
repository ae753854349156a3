"""ROME for both paradigms (Meng et al., arXiv 2202.05262), its value optimised over denoising states.

One fact, one layer, rank one: with key k*, target value v* = v_0 + delta and second moments C,

    u = C^-1 k* / ||C^-1 k*||,    dW = delta u^T / (k . u),

where k is k* (`key_average: single`) or the bare prompt's key (`easyedit`). With statistics off, C is the identity, as in
EasyEdit's ROME.

u and k do not depend on delta, so the update's effect at every token of every row is known before delta is:
(u . k_t) / (k . u) delta at token t. `optimise_through: weights` optimises delta with all of it, instead of with delta at the
subject's token alone: what the update does to the other tokens, much for text unlike what C was made of, is then part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.context import context_templates
from easyedit_mdm.editing.edit import Edit, LowRank
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.keys import Keys, read_keys
from easyedit_mdm.editing.methods import METHODS, Method
from easyedit_mdm.editing.request import EditRequest, anchor, locate, target_ids
from easyedit_mdm.editing.rows import Fact
from easyedit_mdm.editing.value import Optimised, optimise
from easyedit_mdm.errors import HyperParameterError, OptimisationError, RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.statistics import SecondMoments, moments_for


def tokenise(adapter: Adapter, request: EditRequest, hparams: ROMEMDMHyperParams) -> Fact:
    """Tokenise a request in every context prefix.

    Raises:
        RequestError: if the longest row exceeds the model's positions, or the target the canvas that the metric decodes.
    """
    templates = hparams.context_templates or context_templates(adapter, hparams.context_template_length_params, hparams.seed)
    if "{}" not in templates[:1]:
        templates = ["{}", *templates]
    target = target_ids(adapter, request.prompt, request.target_new)
    contexts = [locate(adapter, request, c, hparams.fact_token) for c in templates]
    canvas = hparams.decode_config().canvas
    if canvas is not None and len(target) > canvas:
        raise RequestError(f"target {request.target_new!r} has {len(target)} tokens, more than the canvas of {canvas} masks (decode.canvas)")
    longest = max(len(p.ids) for p in contexts) + len(target)
    if longest > adapter.max_positions:
        raise RequestError(
            f"prompt and target {request.target_new!r} take {longest} tokens with the longest context prefix; {adapter.name} has "
            f"{adapter.max_positions} positions"
        )
    fact_token = "subject_last" if hparams.fact_token == "last" else hparams.fact_token
    return Fact(contexts, target, locate(adapter, anchor(request), "{}", fact_token))


def check_modules(adapter: Adapter, hparams: ROMEMDMHyperParams) -> Site:
    """The edit site (that of the last layer, where there are several), after checking every module that the hyperparameters name.

    Raises:
        ModelError: for a module or layer that does not exist.
        HyperParameterError: if `v_loss_layer` is not the last layer.
    """
    layer = hparams.layers[-1]
    site = adapter.site(layer, hparams.rewrite_module_tmp)
    for template in (hparams.layer_module_tmp, hparams.mlp_module_tmp, hparams.attn_module_tmp, hparams.ln_f_module, hparams.lm_head_module):
        if template:
            adapter.module(template.format(layer))
    if hparams.v_loss_layer not in (None, adapter.layers - 1):
        raise HyperParameterError(f"v_loss_layer={hparams.v_loss_layer}: the loss is read after the last layer, {adapter.layers - 1}")
    return site


def rome(adapter: Adapter, requests: Sequence[EditRequest], hparams: ROMEMDMHyperParams, values: Sequence[Optimised] | None = None) -> Edit:
    """Make (not apply) the edit for one request.

    Raises:
        RequestError: for a request that cannot be carried out, or more than one.
        OptimisationError: if the optimisation or the closed form breaks down.
    """
    return rank_one(adapter, requests, hparams, lambda keys, delta: delta, values)


def site_values(adapter: Adapter, requests: Sequence[EditRequest], hparams: ROMEMDMHyperParams) -> list[Optimised]:
    """The optimised values of requests at the site, clamped by the norm of its own output there."""
    site = check_modules(adapter, hparams)
    facts = [tokenise(adapter, request, hparams) for request in requests]
    keys = [read_keys(adapter, site, fact, hparams) for fact in facts]
    return _optimised(adapter, site, facts, keys, hparams)


def _optimised(
    adapter: Adapter, site: Site, facts: Sequence[Fact], keys: Sequence[Keys], hparams: ROMEMDMHyperParams, direction: Direction | None = None
) -> list[Optimised]:
    """The values, through the weights where the hyperparameters say so; `direction`: of the only fact, where it is known."""
    rights = None
    if hparams.optimise_through == "weights":
        rights = torch.stack([(d := direction or closed_form(adapter, site, k, hparams)).u / d.denominator for k in keys])
    return optimise(adapter, site, facts, torch.stack([k.initial for k in keys]), hparams, rights)


def rank_one(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: ROMEMDMHyperParams,
    residual: Callable[[Keys, Tensor], Tensor],
    values: Sequence[Optimised] | None = None,
) -> Edit:
    """Key, value and closed form of one fact.

    Args:
        residual: what dW is to add to the site's output at k*, from the keys and the optimised delta.
        values: the fact's, where it has been optimised already.
    """
    if len(requests) != 1:
        raise RequestError(f"{hparams.alg_name} writes one fact at a time, got {len(requests)} requests: edit them one after another")
    site = check_modules(adapter, hparams)
    fact = tokenise(adapter, requests[0], hparams)
    keys = read_keys(adapter, site, fact, hparams)
    direction = closed_form(adapter, site, keys, hparams)
    outcome = (values or _optimised(adapter, site, [fact], [keys], hparams, direction))[0]
    added = residual(keys, outcome.delta)
    change = LowRank(site.weight, (added.to(direction.u.device) / direction.denominator)[:, None], direction.u[None], site.transposed)
    return Edit([change], card(requests, [fact], hparams, [outcome], {**direction.figures, "delta_norm": float(added.norm())}))


@dataclass(frozen=True)
class Direction:
    """All of dW = delta u^T / denominator that does not depend on delta.

    Attributes:
        figures: what tells whether the update is sound.
    """

    u: Float[Tensor, " inner"]
    denominator: Float[Tensor, ""]
    figures: dict[str, int | float]


def closed_form(adapter: Adapter, site: Site, keys: Keys, hparams: ROMEMDMHyperParams) -> Direction:
    """Where the update reads, from the keys and the statistics.

    Raises:
        OptimisationError: if the denominator vanishes.
    """
    solved, bare = (keys.keys[0] if hparams.key_average == "prompt" else keys.mean), keys.keys[0]
    u = solved
    figures: dict[str, int | float] = {}
    if hparams.mom2_adjustment:
        moments = statistics(adapter, [site], hparams)[0]
        u = moments.solve(u, hparams.mom2_eps)
        figures |= moments.cheap_figures(hparams.mom2_eps)
    u = u / u.norm()
    key = bare if hparams.key_average == "easyedit" else solved
    denominator = torch.dot(key, u)
    if not denominator.isfinite() or denominator.abs() < 1e-8 * key.norm():
        raise OptimisationError(f"the denominator k . u of the update is {float(denominator):.3g}: the key vanishes at layer {site.layer}")
    return Direction(u, denominator, {**figures, "denominator": float(denominator), "key_norm": float(key.norm())})


def statistics(adapter: Adapter, sites: Sequence[Site], hparams: ROMEMDMHyperParams) -> list[SecondMoments]:
    """The second moments that hyperparameters ask for, found or made."""
    return moments_for(
        adapter, sites, str(hparams.mom2_dataset), hparams.mom2_n_tokens, hparams.stats_dir, hparams.mom2_mask_ratio, settled=hparams.mom2_settled
    )


def card(requests: Sequence[EditRequest], facts: Sequence[Fact], hparams: ROMEMDMHyperParams, outcomes: Sequence[Optimised], figures: dict) -> dict:
    """What an edit says about itself: its facts, each with its optimisation, the hyperparameters, and figures."""
    told = [
        {
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": request.target_new,
            "n_tokens": len(fact.target),
            "schedule": outcome.schedule,
            "steps": outcome.steps,
            "forwards": outcome.forwards,
            "layer_passes": outcome.layer_passes,
            "losses": outcome.losses,
        }
        for request, fact, outcome in zip(requests, facts, outcomes)
    ]
    return {"method": hparams.alg_name, "facts": told, "hyperparameters": {**hparams.to_dict(), "model_name": str(hparams.model_name)}, **figures}


METHODS.register("ROME_MDM")(Method("ROME_MDM", ROMEMDMHyperParams, rome, site_values, stands_for="ROME"))
