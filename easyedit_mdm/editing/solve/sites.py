"""Where an edit is made: the linear map that is changed, checked, and the second moments of its keys."""

from __future__ import annotations

from collections.abc import Sequence

from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
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
