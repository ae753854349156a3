"""On an autoregressive model our ROME is EasyEdit's own: same prefixes and hyperparameters, same update."""

from __future__ import annotations

import contextlib
import importlib
import os

import pytest
import torch

from easyedit_mdm import ROMEMDMHyperParams, make_edit
from easyedit_mdm.host import import_easyedit
from easyedit_mdm.host.on_cpu import CudaMeansCpu
from easyedit_mdm.statistics import SecondMoments

PREFIXES = ["{}", "The old river song. {}", "Because of this it is known. {}"]
REQUEST = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target_new": "red river English",
}
SETTINGS = dict(
    fact_token="subject_last", v_num_grad_steps=12, v_lr=0.3, v_weight_decay=0.5, clamp_norm_factor=4.0,
    kl_factor=0.0625,
    context_template_length_params=[[5, 2]],
)  # fmt: skip


def their_hparams(family: str, layer: int, mom2: bool):
    """EasyEdit's ROMEHyperParams for a tiny model."""
    rome = importlib.import_module("easyeditor.models.rome.rome_hparams")
    gpt2 = family == "gpt2"
    block = "transformer.h.{}" if gpt2 else "model.layers.{}"
    return rome.ROMEHyperParams(
        layers=[layer], v_loss_layer=2, mom2_adjustment=mom2, **SETTINGS,
        rewrite_module_tmp=block + (".mlp.c_proj" if gpt2 else ".mlp.down_proj"),
        layer_module_tmp=block, mlp_module_tmp=block + ".mlp", attn_module_tmp=block + ".attn",
        ln_f_module="-", lm_head_module="lm_head",
        mom2_dataset="none", mom2_n_samples=1, mom2_dtype="float32", alg_name="ROME",
        device=0 if os.environ.get("ORACLE_FORM") != "head" else "cpu",
        model_name="tiny", stats_dir="none",
    )  # fmt: skip


def their_update(adapter, family: str, layer: int, moment) -> torch.Tensor:
    """The dense update that EasyEdit's execute_rome computes."""
    main = importlib.import_module("easyeditor.models.rome.rome_main")
    compute_u = importlib.import_module("easyeditor.models.rome.compute_u")
    main.CONTEXT_TEMPLATES_CACHE = list(PREFIXES)
    hparams = their_hparams(family, layer, moment is not None)
    if moment is not None:
        key = (
            adapter.native.config._name_or_path.replace("/", "_"),
            hparams.rewrite_module_tmp.format(layer),
        )
        compute_u.inv_mom2_cache[key] = torch.inverse(moment.double()).float()
    adapter.tokenizer.padding_side = "right"
    with CudaMeansCpu(), contextlib.redirect_stdout(None), torch.enable_grad():
        deltas = main.execute_rome(adapter.native, adapter.tokenizer, dict(REQUEST), hparams)
    main.CONTEXT_TEMPLATES_CACHE = None
    ((u, v),) = deltas.values()
    return torch.outer(v, u).detach()


def our_update(adapter, layer: int, moment, monkeypatch) -> torch.Tensor:
    """The dense update of ROME_MDM with EasyEdit's conventions, outputs x inputs."""
    if moment is not None:
        monkeypatch.setattr(
            "easyedit_mdm.editing.solve.sites.moments_for",
            lambda *a, **k: [SecondMoments(moment.double(), 1)],
        )
    hparams = ROMEMDMHyperParams(
        alg_name="ROME_MDM", model_name="tiny", layers=[layer], **SETTINGS, v_loss_layer=2,
        key_average="easyedit", kl_position="subject_last",
        early_stop_loss=0.0, context_templates=PREFIXES, mom2_adjustment=moment is not None,
        mom2_dataset="given", mom2_eps=0.0,
    )  # fmt: skip
    change = make_edit(adapter, REQUEST, hparams).changes[0]
    return change.left @ change.right


def well_conditioned(size: int) -> torch.Tensor:
    """A second moment whose condition number is about 10."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return basis @ torch.diag(torch.linspace(0.3, 3.0, size)) @ basis.T


def check(tiny, family: str, mom2: bool, monkeypatch) -> None:
    """Compare the two updates at layer 1."""
    adapter = tiny(family)
    inner = adapter.module(adapter.site(1).name).weight.shape[0 if family == "gpt2" else 1]
    moment = well_conditioned(inner) if mom2 else None
    theirs, ours = their_update(adapter, family, 1, moment), our_update(adapter, 1, moment, monkeypatch)
    difference = float((theirs - ours).norm() / theirs.norm())
    assert float(theirs.norm()) > 1e-3
    assert difference < (1e-3 if mom2 else 1e-4)


@pytest.mark.parametrize("mom2", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_update_equals_easyedit(tiny, family, mom2, monkeypatch):
    """Against whichever form of EasyEdit this process finds: PyPI's wheel in CI."""
    import_easyedit()
    check(tiny, family, mom2, monkeypatch)


@pytest.mark.easyedit_head
@pytest.mark.end_to_end
def test_update_equals_the_head(oracle_on_the_head):
    """Against the repository's head, in a process of its own: two forms cannot be imported into one."""
    oracle_on_the_head(__file__, 6)
