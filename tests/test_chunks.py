"""Thousands of facts: values in chunks on the disk, keys as a stream, work shared by several processes."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from children import counted, needs_processes, start
from test_batch_methods import hparams, moments_of, system
from test_edits import quick_file

from easyedit_mdm import load_hparams, load_model, make_edit
from easyedit_mdm.cli import main
from easyedit_mdm.common.ranks import Ranks, launched
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.edit import Exact
from easyedit_mdm.editing.methods.alphaedit import projected
from easyedit_mdm.editing.methods.memit import least_squares
from easyedit_mdm.editing.solve import chunks, sites
from easyedit_mdm.editing.solve.batch import System
from easyedit_mdm.editing.solve.chunks import Columns, fill
from easyedit_mdm.errors import EditError, HyperParameterError, OptimisationError, StatisticsError
from easyedit_mdm.statistics import CollectConfig, TextSource, collect
from easyedit_mdm.statistics.collecting import part_of

CHUNKED = [name for name in METHODS if METHODS[name].closed_form is not None]
NAMES = "Anna Robert Maria Peter Laura Daniel Carol".split()
FACTS = [
    EditRequest.of({"prompt": f"The {thing} of {name} is", "subject": name, "target_new": target})
    for (name, thing), target in zip(
        itertools.product(NAMES, ("river", "song")),
        itertools.cycle(("the old one", "red", "a good singer", "city river")),
    )
]


@pytest.fixture
def given(monkeypatch):
    """Well-behaved statistics for tiny models."""

    def found(adapter, where, *_, **__):
        return [
            moments_of(adapter.module(s.name).weight.shape[0 if s.transposed else 1], s.layer) for s in where
        ]

    monkeypatch.setattr(sites, "moments_for", found)


def test_which_methods_these_are():
    """Those whose update depends on K K^T and R K^T alone."""
    assert set(CHUNKED) == {"MEMIT_MDM", "EMMET_MDM", "AlphaEdit_MDM"}


@pytest.mark.parametrize("form", ["least squares", "projected"])
def test_folded_columns_solve_alike(form):
    """40 columns of 12 dimensions, added 7 at a time, are 12 in the end, and give the same update."""
    whole, columns = system(40), Columns()
    for start_at in range(0, 40, 7):
        part = slice(start_at, start_at + 7)
        columns.add(whole.keys[:, part], whole.residual[:, part])
        assert sum(k.shape[1] for k in columns.keys) <= 24
    keys, residual = columns.joined()
    assert keys.shape == (12, 12) and residual.shape == (5, 12)
    assert (keys @ keys.T - whole.keys @ whole.keys.T).norm() < 1e-12 * (whole.keys @ whole.keys.T).norm()
    closed = (
        least_squares(1e-6, 0.3)
        if form == "least squares"
        else projected(hparams("AlphaEdit_MDM", nullspace_threshold=0.1, L2=1e-2))
    )
    (a, b), (c, d) = closed(whole), closed(System(whole.site, keys, residual, whole.moments))
    assert (a @ b - c @ d).norm() < 1e-9 * (a @ b).norm()


@pytest.mark.parametrize("family", ["dream", "llama", "gpt2"])
@pytest.mark.parametrize("method", CHUNKED)
def test_the_edit_of_one_batch(tiny, tmp_path, given, family, method):
    """Two layers, 14 facts in chunks of 5: the same edit up to rounding, with the same card."""
    model, settings = tiny(family), hparams(method)
    one = make_edit(model, FACTS, settings)
    made = METHODS[method].edit_in_chunks(model, FACTS, settings, tmp_path / "values", 5)
    for ours, theirs in zip(made.changes, one.changes, strict=True):
        assert ours.name == theirs.name
        assert (ours.dense() - theirs.dense()).norm() <= 1e-4 * theirs.dense().norm()
    assert [f["target_new"] for f in made.card["facts"]] == [f.target_new for f in FACTS]
    for ours, theirs in zip(made.card["facts"], one.card["facts"], strict=True):
        assert ours["steps"] == theirs["steps"] and ours["n_tokens"] == theirs["n_tokens"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3, abs=1e-4)
    for layer, figures in made.card["layers"].items():
        assert figures["residual"] == pytest.approx(one.card["layers"][layer]["residual"], rel=1e-4)


def test_more_facts_than_dimensions(tiny, tmp_path, given, monkeypatch):
    """The change is then kept as a matrix, and is still that of one batch."""
    model, settings = tiny("llama"), hparams("MEMIT_MDM", layers=[1], v_num_grad_steps=2)
    inner = model.weight_of(model.site(1).name).shape[1]
    many = [
        EditRequest.of(
            {"prompt": f"{a} and {b} sing the", "subject": f"{a} and {b}", "target_new": "old song"}
        )
        for a, b in itertools.product(NAMES, NAMES)
    ] + FACTS
    many = [EditRequest.of({**vars(f), "prompt": f"{w} {f.prompt}"}) for w in ("So", "Then") for f in many]
    assert len(many) > inner, "the point of the test"
    one = make_edit(model, many, settings)
    (made,) = METHODS["MEMIT_MDM"].edit_in_chunks(model, many, settings, tmp_path, 16).changes
    assert isinstance(made, Exact)
    assert (made.dense() - one.changes[0].dense()).norm() <= 1e-4 * one.changes[0].dense().norm()


def test_goes_on_where_it_was_stopped(tiny, tmp_path, given, monkeypatch):
    """Finished chunks are not made again, and the files are those of a run that was left alone."""
    model, settings = tiny("llada"), hparams("MEMIT_MDM")
    whole = METHODS["MEMIT_MDM"].edit_in_chunks(model, FACTS, settings, tmp_path / "whole", 4)
    real, calls = chunks.values_of, []

    def breaking(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise OptimisationError("stop")
        return real(*arguments, **more)

    monkeypatch.setattr(chunks, "values_of", breaking)
    with pytest.raises(OptimisationError):
        METHODS["MEMIT_MDM"].edit_in_chunks(model, FACTS, settings, tmp_path / "cut", 4)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "chunk-00000.safetensors", "chunk-00001.safetensors", "values.json",
    ]  # fmt: skip
    again = METHODS["MEMIT_MDM"].edit_in_chunks(model, FACTS, settings, tmp_path / "cut", 4)
    assert len(calls) == 3 + 2, "two of the four chunks were there"
    same_files(tmp_path / "whole", tmp_path / "cut")
    for ours, theirs in zip(again.changes, whole.changes, strict=True):
        assert torch.equal(ours.dense(), theirs.dense())


def same_files(one: Path, other: Path) -> None:
    """Two folders hold the same bytes."""
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, other)]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"v_lr": 0.4}, "hyperparameters"), ({"mom2_update_weight": 2e-3}, None), ({"layers": [0]}, "hyper")],
)
def test_values_of_other_settings_are_refused(tiny, tmp_path, given, changed, named):
    """Lambda has no part in the values: they may be used again with another."""
    model = tiny("llama")
    method = METHODS["MEMIT_MDM"]
    method.edit_in_chunks(model, FACTS[:4], hparams("MEMIT_MDM"), tmp_path, 2)
    if named is None:
        method.edit_in_chunks(model, FACTS[:4], hparams("MEMIT_MDM", **changed), tmp_path, 2)
        return
    with pytest.raises(EditError, match=rf"holds values of another run \({named}.*differ"):
        method.edit_in_chunks(model, FACTS[:4], hparams("MEMIT_MDM", **changed), tmp_path, 2)


def test_values_of_an_earlier_version_stay(tiny, tmp_path, given):
    """A field that came since is meant to have been at its default."""
    model, method = tiny("llama"), METHODS["MEMIT_MDM"]
    method.edit_in_chunks(model, FACTS[:4], hparams("MEMIT_MDM"), tmp_path, 2)
    card = json.loads((tmp_path / "values.json").read_text())
    del card["hyperparameters"]["open_canvas"]
    (tmp_path / "values.json").write_text(json.dumps(card))
    method.edit_in_chunks(model, FACTS[:4], hparams("MEMIT_MDM"), tmp_path, 2)
    with pytest.raises(EditError, match="hyperparameters differ"):
        method.edit_in_chunks(model, FACTS[:4], hparams("MEMIT_MDM", open_canvas=8), tmp_path, 2)


def test_values_of_other_facts_are_refused(tiny, tmp_path, given):
    """Other facts, another size of the chunks, another model."""
    method, settings = METHODS["MEMIT_MDM"], hparams("MEMIT_MDM")
    method.edit_in_chunks(tiny("llama"), FACTS[:4], settings, tmp_path, 2)
    for family, facts, size, named in (
        ("llama", FACTS[1:5], 2, "facts"), ("llama", FACTS[:4], 4, "chunk"), ("dream", FACTS[:4], 2, "model"),
    ):  # fmt: skip
        with pytest.raises(EditError, match=rf"another run \(.*{named}.* differ"):
            method.edit_in_chunks(tiny(family), facts, settings, tmp_path, size)


def test_a_broken_chunk_is_named(tiny, tmp_path, given):
    """It says what to do."""
    model, settings = tiny("llama"), hparams("MEMIT_MDM")
    METHODS["MEMIT_MDM"].edit_in_chunks(model, FACTS[:4], settings, tmp_path, 2)
    (tmp_path / "chunk-00001.safetensors").write_bytes(b"nothing")
    with pytest.raises(EditError, match=r"chunk-00001.*remove it"):
        METHODS["MEMIT_MDM"].edit_in_chunks(model, FACTS[:4], settings, tmp_path, 2)


def test_what_cannot_be_done_in_chunks(tiny, tmp_path, given):
    """Refused before anything is written."""
    model = tiny("llama")
    with pytest.raises(HyperParameterError, match="in chunks only `activation` can be used"):
        METHODS["MEMIT_MDM"].edit_in_chunks(
            model, FACTS, hparams("MEMIT_MDM", layers=[1], optimise_through="weights"), tmp_path / "v"
        )
    with pytest.raises(
        HyperParameterError, match="ROME_MDM does not edit in chunks; these methods do: .*MEMIT_MDM"
    ):
        METHODS["ROME_MDM"].edit_in_chunks(
            model, FACTS[:1], load_hparams("ROME_MDM/twin-llama"), tmp_path / "v"
        )
    assert not (tmp_path / "v").exists()


# ---- several processes ---------------------------------------------------------------------------------


def _values(folder: Path) -> None:
    """What a child does."""
    model, settings = _twin()
    fill(model, _facts(), settings, folder, 2)


def _twin():
    settings = load_hparams("MEMIT_MDM/twin-llama")
    settings.v_num_grad_steps = 3
    return load_model("twin-llama"), settings


def _facts() -> list[EditRequest]:
    names = ("Tamos Latre", "Lira Fonde", "Anna", "Robert Marl", "Maria", "Peter", "Laura", "Carol")
    return [
        EditRequest.of({"prompt": f"{name} was born in", "subject": name, "target_new": "Zopago Zemo"})
        for name in names
    ]


@needs_processes
def test_two_processes_share_the_chunks(tmp_path):
    """The files are those of one process alone."""
    _values(tmp_path / "one")
    children = [start(_values, tmp_path / "two") for _ in range(2)]
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0, 0]
    torch.set_num_threads(1)
    same_files(tmp_path / "one", tmp_path / "two")


@needs_processes
def test_killed_and_started_again(tmp_path):
    """SIGKILL in front of a change of the files, four times in one folder: the same bytes in the end."""
    _values(tmp_path / "one")
    killed = []
    for at in (2, 5, 9, 14):
        child = start(_values, tmp_path / "two", stroke=counted(tmp_path / "two", at))
        child.join(timeout=120)
        killed.append(child.exitcode == -signal.SIGKILL)
    assert killed[0] and sum(killed) >= 2
    last = start(_values, tmp_path / "two")
    last.join(timeout=120)
    assert last.exitcode == 0
    same_files(tmp_path / "one", tmp_path / "two")


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys, monkeypatch):
    """Values by one process of two, then the edit by the other; only the facts asked for are looked at."""
    facts = [{"prompt": f.prompt, "subject": f.subject, "target_new": f.target_new} for f in _facts()]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    file = quick_file(
        tmp_path,
        "MEMIT_MDM/twin-llama",
        mom2_adjustment=True,
        mom2_n_tokens=1200,
        stats_dir=str(tmp_path / "stats"),  # not there yet: the first process makes them by itself
    )
    asked = ["edit", "--hparams", file, "--data-file", str(tmp_path / "facts.json"), "--no-guard"]
    asked += ["--save", str(tmp_path / "edit"), "--values", str(tmp_path / "values"), "--chunk", "3"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(asked) == 0
    assert "all values are made" in " ".join(capsys.readouterr().out.split())  # a long path is wrapped
    assert not (tmp_path / "edit").exists() and len(list((tmp_path / "values").glob("chunk-*"))) == 3
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(chunks, "values_of", None)  # nothing is optimised again
    assert main([*asked, "--check", "2", "--keep-failed"]) == 0
    card = json.loads((tmp_path / "edit" / "edit.json").read_text())
    assert len(card["facts"]) == 8 and len(card["metrics"]["facts"]) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--values-only"], "want --values DIR"), (["--chunk", "256"], "want --values DIR"),
        (["--values", "v", "--chunk", "0"], "must be at least 1"), (["--check", "0"], "must be at least 1"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(tmp_path, capsys, more, said):
    """One line, at once."""
    fact = ["--prompt", "Anna was born in", "--subject", "Anna", "--target", "Zemo"]
    assert (
        main(["edit", "--hparams", "MEMIT_MDM/twin-llama", *fact, "--save", str(tmp_path / "e"), *more]) != 0
    )
    assert said in capsys.readouterr().err


# ---- statistics, and who is who --------------------------------------------------------------------------

TEXT = "The river song of the old city was written by a good singer in the year 1923. " * 60


@pytest.mark.parametrize("ratio", [0, "uniform"])
def test_processes_share_a_text(tiny, tmp_path, ratio):
    """Each reads every third batch; together they are one process, to rounding. One was killed on the way."""
    model = tiny("llada")
    where, source = [model.site(0), model.site(1)], TextSource("test", "test", lambda: iter([TEXT]))
    config = CollectConfig(600, context_length=16, mask_ratio=ratio)
    alone = collect(model, where, source, config)
    checkpoint = tmp_path / "unfinished.safetensors"
    for rank in (2, 1):
        assert collect(model, where, source, config, checkpoint, ranks=Ranks(rank, 3)) == {}
    assert part_of(checkpoint, Ranks(2, 3)).name == "unfinished-2of3.safetensors"
    together = collect(model, where, source, config, checkpoint, ranks=Ranks(0, 3))
    for name, moments in alone.items():
        assert together[name].tokens == moments.tokens == 600
        difference = (together[name].moment - moments.moment).norm()
        assert difference <= 1e-12 * moments.moment.norm()
    with pytest.raises(StatisticsError, match="each of 3 processes sees a part"):
        collect(model, where, source, CollectConfig(600, settled=0.1), checkpoint, ranks=Ranks(0, 3))


def _stats(folder: Path, text: Path) -> None:
    main(["stats", "--model", "twin-llama", "--dataset", str(text), "--layers", "1", "--tokens", "2000",
          "--out", str(folder)])  # fmt: skip


@needs_processes
def test_stats_of_two_processes(tmp_path):
    """As a launcher starts them: one file, the moments of one process, nothing left lying about."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Tamos Latre was born in Zopago Zemo, number {i}." for i in range(400)))
    _stats(tmp_path / "one", text)
    children = [
        start(_stats, tmp_path / "two", text, environment={"RANK": str(rank), "WORLD_SIZE": "2"})
        for rank in range(2)
    ]
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0, 0]
    (one,), (two,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one.name == two.name
    from easyedit_mdm.statistics import read

    a, b = read(one), read(two)
    assert a.tokens == b.tokens and (a.moment - b.moment).norm() <= 1e-12 * a.moment.norm()


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("0", "-1")])
def test_a_launcher_that_makes_no_sense(monkeypatch, rank, world):
    """The values, and what they should be."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(HyperParameterError, match=f"RANK='{rank}', WORLD_SIZE='{world}'.*the rank below"):
        launched()


def test_devices_of_ranks():
    """Each process has its own GPU; a device that is named stays."""
    assert Ranks(3, 8, 1).device("cuda") == "cuda:1" and Ranks().device("cuda") == "cuda"
    assert Ranks(3, 8, 1).device("cpu") == "cpu" and Ranks(3, 8, 1).device("cuda:0") == "cuda:0"
