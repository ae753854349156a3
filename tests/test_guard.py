"""The collapse guard: destructive edits are refused or rolled back with their figures, ordinary ones pass,
off is said.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_edits import quick_file, some_edit
from test_rome import REQUEST, hparams

from easyedit_mdm import Edit, Session, make_edit, make_edits
from easyedit_mdm.cli import main
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.editing import METHODS, LowRank, ROMEMDMHyperParams
from easyedit_mdm.editing.guard import GuardConfig, held_out, reasons, update_figures
from easyedit_mdm.errors import CollapseError, HyperParameterError, StatisticsError
from easyedit_mdm.evaluation import CollapseGuard
from easyedit_mdm.evaluation import guard as guarding
from easyedit_mdm.twins.benchmark import cases


def scaled(edit: Edit, factor: float) -> Edit:
    """The same edit, so many times as large."""
    return Edit([replace(c, left=c.left * factor) for c in edit.changes], edit.card)


def test_refused_before_anything_is_changed(tiny):
    """Norm and denominator are known beforehand; the message holds every figure and what to do."""
    model = tiny("llada")
    before = parameter_hashes(model)
    guard = CollapseGuard(model)
    with pytest.raises(
        CollapseError, match=r"norm_ratio .* above 20 .*condition not known.*refused.*--force"
    ):
        guard.apply(scaled(make_edit(model, REQUEST, hparams()), 1e4))
    near = make_edit(model, REQUEST, hparams())
    near.card["denominator"] = 1e-9
    with pytest.raises(CollapseError, match="denominator .* is below 0.0001"):
        guard.apply(near)
    loose = make_edit(model, REQUEST, hparams())
    loose.card["condition"] = None  # infinity, as JSON keeps it
    with pytest.raises(CollapseError, match="condition inf is above"):
        guard.apply(loose)
    assert (
        parameter_hashes(model) == before
        and near.card["guard"]["verdict"] == "refused"
        and near.card["guard"]["reasons"]
    )


def test_rolled_back_when_perplexity_rises(twin_llada):
    """An update of unsuspicious norm that ruins the text is taken back, bit for bit; force keeps it, and says
    so.
    """
    before = parameter_hashes(twin_llada)
    guard = CollapseGuard(twin_llada, GuardConfig(norm_ratio=None))
    edit = some_edit(twin_llada, rank=64, size=1.0)
    with pytest.raises(CollapseError, match="perplexity_ratio .* rolled back"):
        guard.apply(edit)
    assert parameter_hashes(twin_llada) == before and not edit.is_applied(twin_llada)
    record = guard.apply(edit, force=True)
    assert (
        edit.is_applied(twin_llada) and record["verdict"] == "kept by force" and edit.card["guard"]["reasons"]
    )
    edit.revert(twin_llada)
    assert parameter_hashes(twin_llada) == before


def test_ordinary_edits_pass(twin_llama, world, tmp_path):
    """A few of the twins' test cases, with the shipped file: none is stopped, none rises much."""
    settings = replace(ROMEMDMHyperParams.from_hparams("ROME_MDM/twin-llama"), stats_dir=str(tmp_path))
    before = parameter_hashes(twin_llama)
    guard = CollapseGuard(twin_llama)
    edits = make_edits(twin_llama, [case.request() for case in cases(world, "test")[:4]], settings)
    for edit in edits:
        record = guard.apply(edit)
        assert record["verdict"] == "passed" and 0.5 < record["figures"]["perplexity_ratio"] < 1.5
        edit.revert(twin_llama)
    with pytest.raises(CollapseError):
        guard.apply(scaled(edits[0], 100.0))
    assert parameter_hashes(twin_llama) == before


def test_interrupted_while_it_looks(tiny, monkeypatch):
    """Ctrl-C or an error while perplexity is taken: the edit is not left in."""
    model = tiny("llada")
    before, real, calls = parameter_hashes(model), guarding.perplexity, []

    def failing(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(guarding, "perplexity", failing)
    with pytest.raises(KeyboardInterrupt):
        CollapseGuard(model).apply(some_edit(model, size=1e-3))
    assert len(calls) == 2 and parameter_hashes(model) == before


def test_small_steps_are_counted_together(twin_llada):
    """A sequence is held against the model before its first edit."""
    model = twin_llada
    guard = CollapseGuard(model, GuardConfig(norm_ratio=None, perplexity_ratio=1.5))
    edits = []
    with pytest.raises(CollapseError, match="perplexity_ratio"):
        for number in range(50):
            edits.append(some_edit(model, number, rank=8, size=0.04))
            guard.apply(edits[-1])
    for edit in reversed(edits[:-1]):
        edit.revert(model)
    assert 1 < len(edits) < 50
    assert (
        edits[-2].card["guard"]["figures"]["perplexity_before"]
        == edits[0].card["guard"]["figures"]["perplexity_before"]
    )


def test_broken_models(tiny):
    """Perplexity that is no number counts as infinite, whatever the threshold."""
    model = tiny("llada")
    weight = model.module(model.site(1).name).weight
    huge = Edit(
        [
            LowRank(
                model.site(1).weight,
                torch.full((weight.shape[0], 1), 1e19),
                torch.full((1, weight.shape[1]), 1e19),
            )
        ]
    )
    with pytest.raises(CollapseError, match="perplexity_ratio inf"):
        CollapseGuard(model, GuardConfig(norm_ratio=None, perplexity_ratio=1e300)).apply(huge)


def test_off_says_so(tiny):
    """Without a guard the card says that none looked, and why; with it the hyperparameters' thresholds
    hold.
    """
    model = tiny("llada")
    edit = make_edit(model, REQUEST, hparams())
    assert edit.card["guard"] == {"on": False, "why": "guard is not set in the hyperparameters"}
    session = Session(model, hparams())
    session.apply(edit)
    assert edit.is_applied(model)
    session.undo()
    strict = hparams(guard={"norm_ratio": 1e-9})
    with pytest.raises(CollapseError, match="norm_ratio"):
        Session(model, strict).edit([REQUEST])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_ration": 1}, "did you mean 'norm_ratio'"),
        ({"norm_ratio": -1}, "above 0"),
        ({"condition": "big"}, "condition='big'.*kind"),
        ({"perplexity_ratio": float("nan")}, "perplexity_ratio=nan"),
        ({"text": 3}, "text=3"),
        ([1], "guard=.1."),
    ],
)
def test_bad_settings(settings, message):
    """Named with value, as every hyperparameter."""
    with pytest.raises(HyperParameterError, match=message):
        ROMEMDMHyperParams.from_dict(
            {"alg_name": "ROME_MDM", "model_name": "tiny", "layers": [1], "guard": settings}
        )


def test_figures_of_batched_methods(tiny, tmp_path):
    """The worst over layers, from each system's own pivots and statistics."""
    (tmp_path / "text.txt").write_text(
        "The river song of the old city was written by a good singer in the year 1923. " * 40
    )
    model = tiny("llada")
    settings = hparams(
        alg_name="MEMIT_MDM", layers=[0, 1], mom2_dataset=str(tmp_path / "text.txt"), mom2_n_tokens=200,
        stats_dir=str(tmp_path), mom2_eps=1e-2,
        v_num_grad_steps=2,
    )  # fmt: skip
    edit = METHODS["MEMIT_MDM"].edit(model, [guarding_request(n) for n in range(2)], settings)
    figures, layers = update_figures(edit, model), edit.card["layers"]
    assert figures["condition"] == max(layer["condition"] for layer in layers.values())
    assert (
        figures["denominator"] == min(layer["denominator"] for layer in layers.values())
        and 0 < figures["denominator"] <= 1
    )
    assert reasons({"denominator": float("nan")}, GuardConfig()) == ["denominator nan is below 0.0001"]


def guarding_request(number: int):
    """Two different facts."""
    from easyedit_mdm import EditRequest

    return EditRequest.of(
        REQUEST
        if number
        else {"prompt": "The river of the old city is", "subject": "old city", "target_new": "the"}
    )


def test_texts(tmp_path):
    """The statistics' text where it is at hand, else plain sentences; one that was asked for must be
    there.
    """
    assert (
        held_out(None) == held_out("datasets:wikipedia", asked=False) == held_out("no such file", asked=False)
    )
    assert held_out("twins") != held_out(None) and len(held_out("twins")) == 6
    with pytest.raises(StatisticsError):
        held_out("no such file")
    (tmp_path / "t.txt").write_text("short\n")
    with pytest.raises(StatisticsError, match="five words"):
        held_out(str(tmp_path / "t.txt"))


def test_on_the_command_line(tmp_path, capsys):
    """On by default; a destructive edit leaves nothing behind, --force keeps it, --no-guard says that nobody
    looked.
    """
    file = quick_file(
        tmp_path,
        clamp_norm_factor=1e5,
        v_lr=1000.0,
        v_weight_decay=0.0,
        kl_factor=0.0,
        early_stop_loss=0.0,
        v_num_grad_steps=4,
    )
    call = [
        "edit",
        "--hparams",
        file,
        "--prompt",
        "Tamos Latre was born in",
        "--subject",
        "Tamos Latre",
        "--target",
        "Zoter",
    ]
    call += ["--keep-failed", "--save"]
    assert main([*call, str(tmp_path / "a")]) == 2 and not (tmp_path / "a").exists()
    assert "would damage the model" in capsys.readouterr().err
    assert main([*call, str(tmp_path / "b"), "--force"]) == 0
    told = json.loads((tmp_path / "b" / "edit.json").read_text())["guard"]
    assert (
        told["verdict"] == "kept by force"
        and told["reasons"]
        and "guard: kept by force" in capsys.readouterr().out
    )
    assert main([*call, str(tmp_path / "c"), "--no-guard"]) == 0 and "guard: off" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "edit.json").read_text())["guard"]["on"] is False
