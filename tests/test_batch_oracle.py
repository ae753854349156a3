"""On autoregressive models MEMIT_MDM, AlphaEdit_MDM, EMMET_MDM and R-ROME_MDM are EasyEdit's own: same
contexts, statistics and hyperparameters, same update. EasyEdit's MEMIT runs from its head, and from PyPI's
wheel with transformers 4 only.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os

import pytest
import torch
from conftest import wheel_edits_batches

from easyedit_mdm import make_edit
from easyedit_mdm.editing import METHODS
from easyedit_mdm.editing.solve import sites as solve_sites
from easyedit_mdm.host import import_easyedit
from easyedit_mdm.host.on_cpu import CudaMeansCpu
from easyedit_mdm.statistics import SecondMoments

HEAD = os.environ.get("ORACLE_FORM") == "head"
PREFIXES = ["The old river song. {}", "Because of this it is known. {}"]
REQUESTS = [
    {
        "prompt": "The mother tongue of Danielle Darrieux is",
        "subject": "Danielle Darrieux",
        "target_new": "red river English",
        "case_id": 0,
    },
    {"prompt": "The river of Anna is", "subject": "Anna", "target_new": "the", "case_id": 1},
    {"prompt": "The old song of Robert was", "subject": "Robert", "target_new": "a good one", "case_id": 2},
]
SHARED = dict(
    fact_token="subject_last",
    v_num_grad_steps=12,
    v_lr=0.3,
    v_weight_decay=0.5,
    clamp_norm_factor=4.0,
    kl_factor=0.0625,
)
PACKAGES = {
    "MEMIT": "memit.memit",
    "AlphaEdit": "alphaedit.AlphaEdit",
    "EMMET": "emmet.emmet",
    "R-ROME": "r_rome.r_rome",
}
OWN = {
    "MEMIT": ({"mom2_update_weight": 0.5}, {}),
    "EMMET": ({"mom2_update_weight": 0.5, "emmet_lambda": 0.1}, {"update_norm_lambda": 0}),
    "AlphaEdit": ({"nullspace_threshold": 0.9, "L2": 0.1}, {"P_loc": "none", "mom2_update_weight": 1}),
    "R-ROME": ({}, {"context_template_length_params": [[5, 2]], "original_implementation": False,
        "enable_prompt_keys": False,
                    "enable_random_prefix_keys": True}),
}  # fmt: skip


def well_conditioned(size: int, seed: int) -> torch.Tensor:
    """A second moment whose condition number is about 10."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return basis @ torch.diag(torch.linspace(0.3, 3.0, size)) @ basis.T


def their_hparams(method: str, family: str, layers: list[int]):
    """EasyEdit's hyperparameters for a tiny model; fields that a method does not have are left out."""
    path = PACKAGES[method]
    module = importlib.import_module(
        f"easyeditor.models.{path}_hparams"
        if method != "AlphaEdit"
        else "easyeditor.models.alphaedit.AlphaEdit_hparams"
    )
    cls = next(v for k, v in vars(module).items() if k.endswith("HyperParams") and k != "HyperParams")
    block = "transformer.h.{}" if family == "gpt2" else "model.layers.{}"
    values = dict(
        layers=layers, layer_selection="all", v_loss_layer=2, mom2_adjustment=method != "R-ROME", **SHARED,
        rewrite_module_tmp=block + (".mlp.c_proj" if family == "gpt2" else ".mlp.down_proj"),
        layer_module_tmp=block, mlp_module_tmp=block + ".mlp",
        attn_module_tmp=block + ".attn", ln_f_module="transformer.ln_f" if family == "gpt2" else "model.norm",
        lm_head_module="transformer.wte" if family == "gpt2" else "lm_head",
        mom2_dataset="none", mom2_n_samples=1, mom2_dtype="float32", alg_name=method,
        device="cpu" if HEAD else 0,
        model_name="gpt2-xl" if family == "gpt2" else family, stats_dir="none", **OWN[method][0],
        **OWN[method][1],
    )  # fmt: skip
    return cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})


def their_update(
    method: str, adapter, family: str, layers: list[int], moments: dict[int, torch.Tensor]
) -> list[torch.Tensor]:
    """The dense updates, outputs x inputs, that EasyEdit's execute function computes."""
    main = importlib.import_module(f"easyeditor.models.{PACKAGES[method]}_main")
    hparams = their_hparams(method, family, layers)
    adapter.tokenizer.padding_side = "right"
    main.CONTEXT_TEMPLATES_CACHE = ["{}", *PREFIXES] if method == "R-ROME" else [["{}"], list(PREFIXES)]
    name = adapter.native.config._name_or_path.replace("/", "_")
    if method != "R-ROME":
        for layer in layers:
            main.COV_CACHE[name, hparams.rewrite_module_tmp.format(layer)] = moments[layer].clone()
    requests = copy.deepcopy(REQUESTS)
    with CudaMeansCpu(), contextlib.redirect_stdout(None), torch.enable_grad():
        if method == "R-ROME":
            deltas = main.execute_r_rome(adapter.native, adapter.tokenizer, requests[0], hparams)
            return [torch.outer(v, u).detach() for u, v in deltas.values()]
        if method == "AlphaEdit":
            main.P = torch.stack(
                [main.get_project(adapter.native, adapter.tokenizer, layer, hparams) for layer in layers]
            )
            main.cache_c = torch.zeros_like(main.P)
            deltas = main.execute_AlphaEdit(adapter.native, adapter.tokenizer, requests, hparams).values()
            return [d.T if family == "gpt2" else d for d in deltas]
        deltas = getattr(main, f"execute_{method.lower()}")(
            adapter.native, adapter.tokenizer, requests, hparams
        )
    return [(value @ key.T).detach() for key, value in deltas.values()]


def our_update(
    method: str, adapter, layers: list[int], moments: dict[int, torch.Tensor], monkeypatch
) -> list[torch.Tensor]:
    """The dense updates of our method with EasyEdit's conventions."""
    monkeypatch.setattr(
        solve_sites,
        "moments_for",
        lambda adapter, sites, *_, **__: [SecondMoments(moments[s.layer].double(), 1) for s in sites],
    )
    conventions = (
        {} if method == "R-ROME" else {"mom2_dataset": "given", "mom2_eps": 0.0, "key_average": "easyedit"}
    )
    hparams = METHODS[f"{method}_MDM"].hparams(
        alg_name=f"{method}_MDM", model_name="tiny", layers=layers, **SHARED, **OWN[method][0], **conventions,
        v_loss_layer=2,
        kl_position="subject_last", early_stop_loss=0.0, context_templates=["{}", *PREFIXES],
    )  # fmt: skip
    edit = make_edit(adapter, REQUESTS[:1] if method == "R-ROME" else REQUESTS, hparams)
    return [change.left @ change.right for change in edit.changes]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("method", list(PACKAGES))
def test_update_equals_easyedit(tiny, method, family, monkeypatch):
    """Several facts of unequal target length, two layers (R-ROME: one fact, one layer)."""
    import_easyedit()
    if not HEAD and method != "MEMIT":
        pytest.skip(f"the wheel has no {method}")
    if not HEAD and not wheel_edits_batches(family):
        pytest.skip("the wheel's MEMIT reads tuples, which these layers of transformers do not give")
    adapter = tiny(family)
    layers = [1] if method == "R-ROME" else [0, 1]
    widths = [adapter.module(adapter.site(n).name).weight.shape[0 if family == "gpt2" else 1] for n in layers]
    moments = {n: well_conditioned(width, n) for n, width in zip(layers, widths)}
    theirs = their_update(method, adapter, family, layers, moments)
    ours = our_update(method, adapter, layers, moments, monkeypatch)
    assert len(theirs) == len(ours) == len(layers)
    for a, b in zip(theirs, ours):
        assert float(a.norm()) > 1e-3
        assert float((a - b).norm() / a.norm()) < 1e-4


@pytest.mark.easyedit_head
@pytest.mark.end_to_end
def test_update_equals_the_head(oracle_on_the_head):
    """Against the repository's head, in a process of its own: two forms cannot be imported into one."""
    oracle_on_the_head(__file__, 12)
