"""Where an edit is made: the linear map that is changed, checked, and the second moments of its keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.edit import Change, Exact, LowRank
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.hparams import MethodHyperParams, ROMEMDMHyperParams
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.statistics import SecondMoments, moments_for


def check_modules(adapter: Adapter, hparams: ROMEMDMHyperParams) -> Site:
    """The edit site (of the last layer, where there are several), after checking every module that is named.

    Raises:
        ModelError: for a module or layer that does not exist.
        HyperParameterError: if `v_loss_layer` is not the last layer.
    """
    layer = hparams.layers[-1]
    site = adapter.site(layer, hparams.rewrite_module_tmp)
    for template in (
        hparams.layer_module_tmp,
        hparams.mlp_module_tmp,
        hparams.attn_module_tmp,
        hparams.ln_f_module,
        hparams.lm_head_module,
    ):
        if template:
            adapter.module(template.format(layer))
    if hparams.v_loss_layer not in (None, adapter.layers - 1):
        raise HyperParameterError(
            f"v_loss_layer={hparams.v_loss_layer}: the loss is read after the last layer, "
            f"{adapter.layers - 1}"
        )
    return site


def one_map(adapter: Adapter, hparams: MethodHyperParams) -> Site:
    """The edit site of the only layer, for a method that needs one linear map that every token goes through.

    Raises:
        ModelError: for a module or layer that does not exist.
        HyperParameterError: for the experts of a mixture.
    """
    site = adapter.site(hparams.layers[-1], getattr(hparams, "rewrite_module_tmp", None))
    if site.routed:
        raise HyperParameterError(
            f"layer {site.layer} is a mixture of experts: {hparams.alg_name} needs one linear map that every"
            " token goes through; name one (rewrite_module_tmp), or a layer without experts"
        )
    return site


def settled(adapter: Adapter, site: Site, facts: Iterable[Fact]) -> Site:
    """A routed site with the experts that the facts' tokens go through, in any of their context prefixes,
    with nothing revealed.

    Other sites are returned as they are. What the router of the edited layer does does not depend on the
    edit.
    """
    if not site.routed:
        return site
    chosen: set[int] = set()
    for fact in facts:
        slots = adapter.behind(fact.target, torch.zeros(len(fact.target), dtype=torch.bool))
        for prompt in fact.contexts:
            ids = torch.cat([prompt.ids, slots])[None].to(adapter.device)
            canvas = torch.tensor([len(prompt.ids)], device=ids.device)
            chosen |= set(adapter.routes(site.layer, ids, canvas=canvas)[1][0, prompt.fact_at].tolist())
    return adapter.through(site, sorted(chosen))


def low_rank(
    adapter: Adapter, site: Site, left: Float[Tensor, "width rank"], right: Float[Tensor, "rank inner"]
) -> list[LowRank]:
    """A change of a site's weight, as changes of parameters: one for each of its parts."""
    if not site.parts:
        return [LowRank(site.weight, left, right, site.transposed)]
    widths = [adapter.weight_of(part).shape[1] for part in site.parts]
    return [LowRank(name, left, columns) for name, columns in zip(site.weights, right.split(widths, dim=1))]


def changes_of(
    adapter: Adapter, site: Site, left: Float[Tensor, "width rank"], right: Float[Tensor, "rank inner"]
) -> list[Change]:
    """As `low_rank`, but as whole matrices where these are smaller than the factors."""
    factors = low_rank(adapter, site, left, right)
    if left.numel() + right.numel() <= left.shape[0] * right.shape[1]:
        return [*factors]
    return [Exact(one.name, one.dense().contiguous(), one.transposed) for one in factors]


def statistics(adapter: Adapter, sites: Sequence[Site], hparams: ROMEMDMHyperParams) -> list[SecondMoments]:
    """The second moments that hyperparameters ask for, found or made."""
    return moments_for(
        adapter,
        sites,
        str(hparams.mom2_dataset),
        hparams.mom2_n_tokens,
        hparams.stats_dir,
        hparams.mom2_mask_ratio,
        settled=hparams.mom2_settled,
    )
