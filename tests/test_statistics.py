"""Second moments: against a plain computation, kept under everything that determines them."""

from __future__ import annotations

import pytest
import torch

from easyedit_mdm import ROMEMDMHyperParams, make_edit
from easyedit_mdm.errors import StatisticsError
from easyedit_mdm.models.hooks import reading_input
from easyedit_mdm.statistics import SecondMoments, collect, moments_for

TEXT = "The river song of the old city was written by a good singer in the year 1923. " * 40


@pytest.mark.parametrize("family", ["llada", "gpt2"])
def test_equals_a_plain_mean(tiny, family):
    """E[k k^T] over the tokens, batching and padding aside."""
    model = tiny(family)
    site = model.site(1)
    found = collect(model, site, TEXT, 300)
    ids = torch.tensor(model.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:300])
    keys = []
    for row in ids.split(128):
        with reading_input(model.module(site.name)) as seen, torch.no_grad():
            model(row[None])
        keys.append(seen[0][0].double())
    keys = torch.cat(keys)
    expected = keys.T @ keys / 300
    assert found.moment.dtype == torch.float64 and found.tokens == 300
    assert (found.moment - expected).norm() / expected.norm() < 1e-5


def test_solve():
    """(C + eps tr(C)/d I)^-1 k; a singular C says what to do."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    moments = SecondMoments(keys.T @ keys / 50, 50)
    key = torch.randn(8, generator=generator)
    ridge = 0.1 * moments.moment.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    assert torch.allclose(moments.solve(key, 0.1).double(), torch.linalg.solve(moments.moment + ridge, key.double()), atol=1e-5)
    with pytest.raises(StatisticsError, match="mom2_eps"):
        SecondMoments(torch.zeros(4, 4, dtype=torch.float64), 4).solve(torch.ones(4))


def test_kept_and_not_mixed_up(tiny, tmp_path):
    """A second look reads the file; other token counts, layers or weights get files of their own."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    model = tiny("llada")
    first = moments_for(model, model.site(1), text, 200, tmp_path / "stats")
    (file,) = (tmp_path / "stats").iterdir()
    stamp = file.stat().st_mtime_ns
    again = moments_for(tiny("llada"), model.site(1), text, 200, tmp_path / "stats")
    assert torch.equal(first.moment, again.moment) and file.stat().st_mtime_ns == stamp
    moments_for(model, model.site(1), text, 100, tmp_path / "stats")
    moments_for(model, model.site(2), text, 200, tmp_path / "stats")
    other = tiny("llada")
    with torch.no_grad():
        other.module("model.embed_tokens").weight[5] += 1
    moments_for(other, other.site(1), text, 200, tmp_path / "stats")
    assert len(list((tmp_path / "stats").iterdir())) == 4


def test_wrong_input(tiny, tmp_path):
    """Too few tokens for the dimension, too short a text, no file."""
    model = tiny("llada")
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(StatisticsError, match="less than the key's 48 dimensions"):
        moments_for(model, model.site(1), tmp_path / "short.txt", 10)
    with pytest.raises(StatisticsError, match="480 are wanted"):
        moments_for(model, model.site(1), tmp_path / "short.txt")
    with pytest.raises(StatisticsError, match="not a file"):
        moments_for(model, model.site(1), tmp_path / "none.txt")


def test_rome_uses_them(tiny, tmp_path):
    """With mom2 on, the update's direction is C^-1 k*, not k*."""
    (tmp_path / "text.txt").write_text(TEXT)
    model = tiny("llada")
    settings = dict(
        alg_name="ROME_MDM", model_name="tiny", layers=[1], v_num_grad_steps=3, context_templates=["{}"], mom2_dataset=str(tmp_path / "text.txt"),
        mom2_n_tokens=300, mom2_eps=1e-3,
    )  # fmt: skip
    request = {"prompt": "The song of Anna is", "subject": "Anna", "target_new": "good"}
    off = make_edit(model, request, ROMEMDMHyperParams(**settings)).changes[0].right[0]
    on = make_edit(model, request, ROMEMDMHyperParams(**settings, mom2_adjustment=True)).changes[0].right[0]
    expected = moments_for(model, model.site(1), tmp_path / "text.txt", 300).solve(off, 1e-3)
    assert torch.allclose(on, expected / expected.norm(), atol=1e-5)
    assert not torch.allclose(on, off, atol=1e-2)
