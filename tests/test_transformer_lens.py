"""An edited folder in TransformerLens (4.3): skipped where it is not installed.

It has bridges for LLaDA and Dream, around the hub's own modelling code, which is not here and was written for
transformers 4; TransformerLens needs 5.9. So a folder of an autoregressive family is opened, whose class is
transformers' own.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from easyedit_mdm import Edit, load_model
from easyedit_mdm.editing.edit.change import LowRank
from easyedit_mdm.editing.edit.export import write_merged
from easyedit_mdm.twins import twin_folder

if find_spec("transformer_lens") is None:
    pytest.skip("TransformerLens is not installed", allow_module_level=True)


@pytest.mark.parametrize("twin", ["twin-llama", "twin-qwen"])
def test_it_computes_what_the_edited_model_computes(twin, tmp_path):
    """The same logits, and the edited layer's MLP writes something else than the base's."""
    from transformer_lens.model_bridge import TransformerBridge

    model = load_model(twin)
    site = model.site(2)
    weight = dict(model.native.named_parameters())[site.weight]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 1, generator=generator) * 0.3 for n in weight.shape)
    Edit([LowRank(site.weight, left, right.T.contiguous(), site.transposed)]).apply(model)
    write_merged(model, twin_folder(twin), tmp_path / "out")
    ids = torch.tensor([model.tokenizer("Tamos Latre was born in")["input_ids"]])
    lens = [
        TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
        for folder in (twin_folder(twin), tmp_path / "out")
    ]
    with torch.no_grad():
        wanted = model.native(input_ids=ids).logits
        (_, before), (found, after) = (bridge.run_with_cache(ids) for bridge in lens)
    assert (found - wanted).abs().max() < 1e-3
    for layer, same in ((1, True), (2, False)):
        name = f"blocks.{layer}.hook_mlp_out"
        assert torch.allclose(before[name], after[name], atol=1e-4) == same
