"""Second moments: against a plain computation, kept under everything that determines them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from easyedit_mdm import ROMEMDMHyperParams, make_edit
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.errors import StatisticsError
from easyedit_mdm.models.hooks import reading_input
from easyedit_mdm.statistics import (
    CollectConfig,
    SecondMoments,
    TextSource,
    cache_folder,
    collect,
    collecting,
    moments_for,
    read,
    store,
    text_source,
)

TEXT = "The river song of the old city was written by a good singer in the year 1923. " * 40


def source(text: str = TEXT) -> TextSource:
    """A text in memory."""
    return TextSource("test", "test", lambda: iter([text]))


@pytest.mark.parametrize("family", ["llada", "gpt2"])
def test_equals_a_plain_mean(tiny, family):
    """E[k k^T] over the tokens, of two layers in one pass, batching and padding aside."""
    model = tiny(family)
    sites = [model.site(0), model.site(1)]
    found = collect(model, sites, source(), CollectConfig(300))
    length = min(128, model.max_positions)
    ids = torch.tensor(
        model.tokenizer(TEXT, add_special_tokens=False)["input_ids"][: -(-300 // length) * length]
    )
    for site in sites:
        keys = []
        for row in ids.split(length):
            with reading_input(model.module(site.name)) as seen, torch.no_grad():
                model(row[None])
            keys.append(seen[0][0].double())
        keys = torch.cat(keys)[:300]
        expected = keys.T @ keys / 300
        moments = found[site.name]
        assert moments.moment.dtype == torch.float64 and moments.tokens == 300
        assert (moments.moment - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("ratio", [0.5, "uniform"])
def test_masked_text_counts_unmasked_positions(tiny, ratio):
    """With a mask ratio the model sees masks, keys are taken where there are none, and the same seed gives
    the same.
    """
    model = tiny("llada")
    site = model.site(1)
    plain, masked, again, other = (
        collect(model, [site], source(), CollectConfig(200, mask_ratio=r, seed=s))[site.name]
        for r, s in ((0, 0), (ratio, 0), (ratio, 0), (ratio, 1))
    )
    assert masked.tokens == 200 and torch.equal(masked.moment, again.moment)
    assert not torch.allclose(masked.moment, plain.moment) and not torch.equal(masked.moment, other.moment)
    with pytest.raises(StatisticsError, match="has no mask"):
        causal = tiny("gpt2")
        collect(causal, [causal.site(1)], source(), CollectConfig(200, mask_ratio=ratio))


def test_resumes_where_it_stood(tiny, tmp_path, monkeypatch):
    """A run that is cut off goes on from its checkpoint: the same moments, and no row read twice."""
    model = tiny("llada")
    site, config = model.site(1), CollectConfig(1000, mask_ratio="uniform", context_length=16)
    whole = collect(model, [site], source(TEXT * 4), config)[site.name]
    real, calls = collecting._add_batch, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(collecting, "_add_batch", failing)
    checkpoint = tmp_path / "unfinished.safetensors"
    with pytest.raises(KeyboardInterrupt):
        collect(model, [site], source(TEXT * 4), config, checkpoint, every=0.0)
    monkeypatch.setattr(collecting, "_add_batch", lambda *args: (calls.append(args), real(*args)))
    again = collect(model, [site], source(TEXT * 4), config, checkpoint)[site.name]
    assert torch.allclose(again.moment, whole.moment, rtol=1e-12)
    assert [args[2][0].tolist() for args in calls].count(calls[0][2][0].tolist()) == 1


@pytest.mark.parametrize("stop", ["one result", "both results"])
def test_stopped_while_results_are_stored(tiny, tmp_path, monkeypatch, stop):
    """Stopped between the writing of two results, or just before the checkpoint goes, the next run ends with
    the same files and no more.
    """
    (tmp_path / "text.txt").write_text(TEXT)

    def run(folder):
        model = tiny("llada")
        moments_for(
            model, [model.site(1), model.site(2)], tmp_path / "text.txt", 300, folder, checkpoint_every=0.0
        )
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    whole = run(tmp_path / "whole")
    assert len(whole) == 2
    writing = store.write

    def stopping(file, moments):
        written = len([p for p in file.parent.iterdir() if p.name.startswith("mom2")])
        if stop == "both results" or not written:
            writing(file, moments)
        if stop == "one result" or written:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    left = [p.name for p in (tmp_path / "cut").iterdir()]
    assert (
        len(left) == (2 if stop == "one result" else 3)
        and sum(name.startswith("unfinished") for name in left) == 1
    )
    assert run(tmp_path / "cut") == whole


def test_stops_when_settled(tiny):
    """`settled` ends the collection once even and odd batches agree; without it all tokens are read."""
    model = tiny("llada")
    site = model.site(1)
    rough = collect(model, [site], source(TEXT * 4), CollectConfig(2000, context_length=16, settled=0.9))[
        site.name
    ]
    assert rough.tokens < 2000
    assert (
        collect(model, [site], source(TEXT * 4), CollectConfig(2000, context_length=16))[site.name].tokens
        == 2000
    )


def test_figures():
    """Condition number and effective rank of known spectra."""
    flat = SecondMoments(torch.eye(8, dtype=torch.float64), 100).figures()
    assert flat["condition"] == pytest.approx(1) and flat["effective_rank"] == pytest.approx(8)
    low = SecondMoments(torch.diag(torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)), 100)
    assert low.figures()["condition"] == float("inf") and low.figures()["effective_rank"] == pytest.approx(2)
    assert low.figures(0.1)["condition"] == pytest.approx(1.05 / 0.05)
    assert SecondMoments(torch.eye(8, dtype=torch.float64), 100).cheap_figures() == flat
    wide = SecondMoments(torch.eye(2049, dtype=torch.float64), 100)
    assert wide.cheap_figures() == {"tokens": 100}, "no minutes of eigenvalues in the middle of an edit"


def test_solve():
    """(C + eps tr(C)/d I)^-1 k; a singular C says what to do."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    moments = SecondMoments(keys.T @ keys / 50, 50)
    key = torch.randn(8, generator=generator)
    ridge = 0.1 * moments.moment.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    assert torch.allclose(
        moments.solve(key, 0.1).double(), torch.linalg.solve(moments.moment + ridge, key.double()), atol=1e-5
    )
    with pytest.raises(StatisticsError, match="mom2_eps"):
        SecondMoments(torch.zeros(4, 4, dtype=torch.float64), 4).solve(torch.ones(4))


def test_kept_and_not_mixed_up(tiny, tmp_path):
    """A second look reads the file; other token counts, mask ratios, layers or weights get files of their
    own.
    """
    text, folder = tmp_path / "text.txt", tmp_path / "stats"
    text.write_text(TEXT)
    model = tiny("llada")
    (first,) = moments_for(model, [model.site(1)], text, 200, folder)
    (file,) = folder.iterdir()
    stamp = file.stat().st_mtime_ns
    (again,) = moments_for(tiny("llada"), [model.site(1)], text, 200, folder)
    assert torch.equal(first.moment, again.moment) and file.stat().st_mtime_ns == stamp
    moments_for(model, [model.site(1)], text, 100, folder)
    moments_for(model, [model.site(1)], text, 200, folder, mask_ratio=0.3)
    moments_for(model, [model.site(1), model.site(2)], text, 200, folder)
    other = tiny("llada")
    with torch.no_grad():
        other.module("model.embed_tokens").weight[5] += 1
    moments_for(other, [other.site(1)], text, 200, folder)
    assert len(list(folder.iterdir())) == 5


def test_an_edited_model_does_not_write_under_the_base_models_name(tiny, tmp_path):
    """Statistics asked for after an edit are the base model's where they are known, else kept under the
    edited model's fingerprint.
    """
    text, folder = tmp_path / "text.txt", tmp_path / "stats"
    text.write_text(TEXT)
    model = tiny("llada")
    (base,) = moments_for(model, [model.site(1)], text, 200, folder)
    other = tiny("llada")
    moments_for(other, [other.site(0)], text, 200, folder)  # seen first as the base model
    with torch.no_grad():
        other.module("model.layers.0.mlp.down_proj").weight.mul_(3)
    (known,) = moments_for(other, [other.site(1)], text, 200, folder)
    assert torch.equal(known.moment, base.moment), "found where the base model's were kept"
    (unknown,) = moments_for(other, [other.site(2)], text, 200, folder)
    assert unknown.settings["model"] == model_fingerprint(other.native) != base.settings["model"]


def test_files_are_not_trusted(tiny, tmp_path):
    """Another model's statistics, a torn file, NaN and a wrong shape are refused by name."""
    text, folder = tmp_path / "text.txt", tmp_path / "stats"
    text.write_text(TEXT)
    model = tiny("llada")
    moments_for(model, [model.site(1)], text, 200, folder)
    (file,) = folder.iterdir()
    with pytest.raises(StatisticsError, match="another model"):
        read(file, "0" * 64)
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(StatisticsError, match="collect them again"):
        moments_for(tiny("llada"), [model.site(1)], text, 200, folder)
    for wrong in (torch.full((4, 4), torch.nan), torch.zeros(3, 4)):
        save_file({"moment": wrong}, file, metadata={"settings": json.dumps({"model": "x"})})
        with pytest.raises(StatisticsError, match="no usable"):
            read(file)


def test_sources(tmp_path):
    """Plain text, JSON lines and a `datasets` folder give the same tokens; broken ones say where."""
    datasets = pytest.importorskip("datasets")
    parts = [TEXT[:200], TEXT[200:400]]
    (tmp_path / "a.txt").write_text("".join(parts))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    datasets.Dataset.from_dict({"text": parts}).save_to_disk(str(tmp_path / "set"))
    names = [tmp_path / "a.txt", tmp_path / "a.jsonl", f"datasets:{tmp_path / 'set'}"]
    assert len({"".join(text_source(name).documents()) for name in names}) == 1
    assert "".join(text_source("twins").documents())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x"}) + "\n{oops\n")
    with pytest.raises(StatisticsError, match="line 2"):
        list(text_source(tmp_path / "b.jsonl").documents())
    with pytest.raises(StatisticsError, match="not a file"):
        text_source(tmp_path / "none.txt")
    with pytest.raises(StatisticsError, match="did you mean 'twins'"):
        text_source("twin")


def test_wrong_input(tiny, tmp_path):
    """Too short a text; too few tokens are a warning; wrong settings."""
    model = tiny("llada")
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(StatisticsError, match="480 are wanted"):
        moments_for(model, [model.site(1)], tmp_path / "short.txt", folder=tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.warns(UserWarning, match="at least 96"):
        moments_for(model, [model.site(1)], tmp_path / "text.txt", 60, tmp_path)
    for name, wrong in (("mask_ratio", 1.5), ("mask_ratio", "some"), ("settled", 2.0)):
        with pytest.raises(StatisticsError, match=f"{name}.*{wrong}"):
            CollectConfig(100, **{name: wrong})


def test_cache_folder_is_the_users(monkeypatch, tmp_path):
    """Never relative to the working directory."""
    monkeypatch.delenv("EASYEDIT_MDM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "easyedit_mdm"
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"


def test_rome_uses_them(tiny, tmp_path):
    """With mom2 on, the update's direction is C^-1 k*, not k*."""
    (tmp_path / "text.txt").write_text(TEXT)
    model = tiny("llada")
    settings = dict(
        alg_name="ROME_MDM", model_name="tiny", layers=[1], v_num_grad_steps=3, context_templates=["{}"],
        mom2_dataset=str(tmp_path / "text.txt"),
        mom2_n_tokens=300, mom2_eps=1e-3, stats_dir=str(tmp_path),
    )  # fmt: skip
    request = {"prompt": "The song of Anna is", "subject": "Anna", "target_new": "good"}
    without, with_ = (
        make_edit(model, request, ROMEMDMHyperParams(**settings, mom2_adjustment=flag))
        for flag in (False, True)
    )
    off, on = without.changes[0].right[0], with_.changes[0].right[0]
    (moments,) = moments_for(model, [model.site(1)], tmp_path / "text.txt", 300, tmp_path)
    expected = moments.solve(off, 1e-3)
    figures = moments.cheap_figures(1e-3)
    assert (
        figures["tokens"] == 300
        and {name: with_.card[name] for name in figures} == figures
        and "tokens" not in without.card
    )
    assert torch.allclose(on, expected / expected.norm(), atol=1e-5)
    assert not torch.allclose(on, off, atol=1e-2)
