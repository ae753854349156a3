"""Edits as objects and files: saved, loaded, applied to the right model only, composed, and exported for
others to load.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file, save_file
from test_rome import REQUEST, hparams

from easyedit_mdm import Edit, load_model, make_edit
from easyedit_mdm.cli import main
from easyedit_mdm.common.fingerprints import model_fingerprint, parameter_hashes
from easyedit_mdm.editing import LowRank, ROMEMDMHyperParams
from easyedit_mdm.editing.edit import Exact, carried
from easyedit_mdm.editing.edit.compose import conflicts
from easyedit_mdm.editing.edit.export import write_model
from easyedit_mdm.editing.edit.folders import adopt_edits, write_edited
from easyedit_mdm.errors import (
    CheckpointError,
    DataError,
    EditError,
    FileError,
    HyperParameterError,
    RequestError,
)
from easyedit_mdm.models import FAMILIES
from easyedit_mdm.models.adapter import Site

QUICK = {"v_num_grad_steps": 3}
OTHER = {"prompt": "The river of the old city is", "subject": "old city", "target_new": "of the"}


def first_map(model, layer: int) -> Site:
    """A layer's own site; of a mixture without a shared expert, that of the expert that most of `ids_for` go
    through.
    """
    site = model.site(layer)
    if not site.routed:
        return site
    most = int(model.routes(layer, ids_for(model))[1].flatten().mode().values)
    return Site(layer, site.parts[most], False)


def some_edit(model, generator_seed: int = 0, layers=(1,), rank: int = 2, size: float = 0.05) -> Edit:
    """An edit with random factors."""
    generator = torch.Generator().manual_seed(generator_seed)
    changes = []
    for layer in layers:
        site = first_map(model, layer)
        shape = model.module(site.name).weight.shape[:: -1 if site.transposed else 1]
        left, right = (
            torch.randn(shape[0], rank, generator=generator) * size,
            torch.randn(rank, shape[1], generator=generator),
        )
        changes.append(LowRank(site.weight, left, right, site.transposed))
    return Edit(changes, {"method": "test", "facts": [], "hyperparameters": {}})


def ids_for(model) -> torch.Tensor:
    """A batch of some tokens."""
    return torch.randint(2, 150, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llada", "gpt2"])
def test_round_trip(tiny, tmp_path, family):
    """What is loaded is what was saved: factors to the bit, the card, and its effect."""
    model = tiny(family)
    edit = make_edit(model, REQUEST, hparams(**QUICK))
    edit.card["metrics"] = {"note": 1.5}
    assert edit.save(tmp_path / "e", model) == tmp_path / "e"
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["edit.json", "edit.safetensors"]
    again = Edit.load(tmp_path / "e")
    assert [type(c) for c in again.changes] == [LowRank]
    assert torch.equal(again.changes[0].left, edit.changes[0].left) and torch.equal(
        again.changes[0].right, edit.changes[0].right
    )
    told = json.loads((tmp_path / "e" / "edit.json").read_text())
    assert told["base"]["fingerprint"] == model_fingerprint(model.native) and told["base"]["family"] == family
    assert told["facts"][0]["target_new"] == REQUEST["target_new"] and told["method"] == "ROME_MDM"
    assert told["hyperparameters"]["layers"] == [1] and told["seed"] == 0 and told["metrics"] == {"note": 1.5}
    assert (
        set(told["versions"]) == {"easyedit_mdm", "torch", "transformers", "python"}
        and told["guard"]["on"] is False
    )
    edit.apply(model)
    first = parameter_hashes(model)
    edit.revert(model)
    again.apply(model)
    assert parameter_hashes(model) == first
    assert first[model.site(1).weight] == told["edited"][model.site(1).weight]
    with pytest.raises(FileError, match="exists"):
        again.save(tmp_path / "e")
    with pytest.raises(EditError, match="base model"):
        some_edit(model).save(tmp_path / "f")


def test_sealing_an_applied_edit_names_the_base(tiny, tmp_path):
    """The base is the model without the edit, whether or not it is applied when the edit is saved."""
    model = tiny("llada")
    base, edit = model_fingerprint(model.native), some_edit(model)
    edit.apply(model)
    edit.save(tmp_path / "e", model)
    assert Edit.load(tmp_path / "e").card["base"]["fingerprint"] == base


def test_another_base_model_is_refused(tiny, tmp_path):
    """With both fingerprints, and the dtype if it is that; nothing is changed."""
    model = tiny("llada")
    some_edit(model).save(tmp_path / "e", model)
    edit = Edit.load(tmp_path / "e")
    other = tiny("llada")
    with torch.no_grad():
        other.module("model.norm").weight[0] += 1
    before = parameter_hashes(other)
    with pytest.raises(EditError) as caught:
        edit.apply(other)
    assert model_fingerprint(model.native) in str(caught.value) and model_fingerprint(other.native) in str(
        caught.value
    )
    assert parameter_hashes(other) == before and not edit.is_applied(other)
    with pytest.raises(EditError, match="made in float32, and this model is in bfloat16"):
        edit.apply(tiny("llada", dtype="bfloat16"))


def test_edits_of_one_base_on_top_of_each_other(tiny, tmp_path):
    """A model that carries another edit of the same base takes a saved one too; one that was changed
    otherwise does not.
    """
    model = tiny("llada")
    before = parameter_hashes(model)
    for number in range(2):
        some_edit(model, number, layers=(number, 2)).save(tmp_path / str(number), model)
    first, second = (Edit.load(tmp_path / str(n)) for n in range(2))
    first.apply(model)
    second.apply(model)
    second.revert(model)
    first.revert(model)
    assert parameter_hashes(model) == before
    some_edit(model, 7).apply(model)  # nobody holds it but the model
    first.apply(model)
    first.revert(model)
    carried(model)[0].revert(model)
    assert parameter_hashes(model) == before
    with torch.no_grad():
        model.module("model.norm").weight[0] += 1
    with pytest.raises(EditError, match="another model"):
        first.apply(model)


def test_full_rank_is_stored_as_it_is(tiny, tmp_path):
    """Factors that would be larger than the change itself are not written; the change is, and does the same
    to the bit.
    """
    model = tiny("llada")
    edit = some_edit(model, rank=40)
    edit.save(tmp_path / "e", model)
    again = Edit.load(tmp_path / "e")
    assert isinstance(again.changes[0], Exact) and torch.equal(
        again.changes[0].delta, edit.changes[0].dense()
    )
    assert again.diff()[0]["kind"] == "exact" and again.diff()[0]["rank"] == 32


def test_diff(tiny):
    """Rank and norms are those of the change; twice the same factor is no second rank."""
    model = tiny("gpt2")
    edit = some_edit(model, layers=(0, 2), rank=3)
    change = edit.changes[0]
    edit.changes[0] = LowRank(
        change.name,
        torch.cat([change.left, change.left], 1),
        torch.cat([change.right, change.right]),
        change.transposed,
    )
    rows = edit.diff(model)
    weights = dict(model.named_parameters())
    for row, one in zip(rows, edit.changes):
        assert row["norm"] == pytest.approx(float(one.dense().norm()), rel=1e-5) and row["rank"] == 3
        assert row["spectral"] == pytest.approx(float(torch.linalg.matrix_norm(one.dense(), 2)), rel=1e-5)
        assert row["norm_ratio"] == pytest.approx(
            float(one.dense().norm() / weights[row["weight"]].detach().norm()), rel=1e-5
        )


def test_an_edit_says_what_it_is_in_one_line(tiny):
    """Method, facts and weight; not thousands of numbers."""
    edit = make_edit(tiny("llada"), REQUEST, hparams(**QUICK))
    said = repr(edit)
    assert said.startswith("<Edit ROME_MDM: ") and repr(REQUEST["prompt"]) in said
    assert edit.changes[0].name in said and f"{edit.bytes:,} bytes>" in said and len(said) < 300


def test_compose(tiny):
    """The sum of the changes, low rank as long as all are; what is at odds is named."""
    model = tiny("llada")
    before = parameter_hashes(model)
    one, two = (make_edit(model, request, hparams(**QUICK)) for request in (REQUEST, OTHER))
    both = Edit.compose([one, two])
    assert torch.allclose(both.changes[0].dense(), one.changes[0].dense() + two.changes[0].dense(), atol=1e-6)
    assert both.changes[0].right.shape[0] == 2 and len(both.card["facts"]) == 2
    exact = Edit([Exact(one.changes[0].name, one.changes[0].dense())], one.card)
    assert torch.allclose(Edit.compose([exact, two]).changes[0].dense(), both.changes[0].dense(), atol=1e-6)
    both.apply(model)
    both.revert(model)
    assert parameter_hashes(model) == before
    against = make_edit(model, {**REQUEST, "target_new": "old song"}, hparams(**QUICK))
    kinds = {c.kind for c in conflicts([one, against])}
    assert kinds == {"contradiction", "overlap"}, "the same key, and another target"
    with pytest.raises(EditError, match="red river.*old song"):
        Edit.compose([one, against])
    assert len(Edit.compose([one, against], force=True).card["composed"]["conflicts"]) == 2
    with pytest.raises(EditError, match="no edits"):
        Edit.compose([])


def test_compose_of_different_bases(tiny, tmp_path):
    """Refused, with both fingerprints; edits that were made one on the other are of one base."""
    model, other = tiny("llada"), tiny("dream")
    one, two = some_edit(model).seal(model), some_edit(other).seal(other)
    with pytest.raises(
        EditError, match=f"{model_fingerprint(model.native)}.*{model_fingerprint(other.native)}"
    ):
        Edit.compose([one, two])
    one.save(tmp_path / "one", model)
    one.apply(model)
    on_top = some_edit(model, 3)
    on_top.save(tmp_path / "two", model)
    assert on_top.card["base"]["carries"] == [one.card["id"]]
    one.revert(model)
    both = Edit.compose([Edit.load(tmp_path / "one"), Edit.load(tmp_path / "two")])
    both.apply(model)
    assert both.card["base"]["fingerprint"] == one.card["base"]["fingerprint"]


def test_tied_weights(tmp_path, tokenizer):
    """Under either of its names a tied weight is one; changed twice in one edit it is refused."""
    write_checkpoint(tmp_path / "gpt2", "gpt2", len(tokenizer))
    model = load_model(tmp_path / "gpt2", tokenizer=tokenizer)
    head, embedding = model.module("lm_head").weight, model.module("transformer.wte").weight
    assert head is embedding
    before = parameter_hashes(model)
    changes = [
        LowRank(name, torch.ones(head.shape[0], 1), torch.ones(1, head.shape[1]))
        for name in ("lm_head.weight", "transformer.wte.weight")
    ]
    edit = Edit(changes[:1])
    edit.apply(model)
    assert torch.equal(head, embedding) and parameter_hashes(model) != before
    edit.revert(model)
    assert parameter_hashes(model) == before
    with pytest.raises(EditError, match="twice"):
        Edit(changes).apply(model)
    assert parameter_hashes(model) == before


def test_overflow_is_refused(tiny):
    """A change that float16 cannot hold leaves the model alone."""
    model = tiny("llada", dtype="float16")
    before = parameter_hashes(model)
    with pytest.raises(EditError, match="too large for torch.float16"):
        some_edit(model, size=1e6).apply(model)
    assert parameter_hashes(model) == before


# ---- for others to load ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["low rank", "exact", "two ranks"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_peft_loads_it(tiny, tmp_path, family, kind):
    """peft's own loading of the adapter gives the edited model's logits, for every family and paradigm."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = tiny(family)
    edit = {
        "low rank": some_edit(model),
        "exact": some_edit(model, rank=40, size=0.01),
        "two ranks": some_edit(model, layers=(0,), rank=3),
    }[kind]
    if kind == "two ranks":
        edit = Edit([*edit.changes, *some_edit(model, layers=(2,), rank=1).changes], edit.card)
    edit.save(tmp_path / "e", model)
    if model.hidden.noise:
        with pytest.raises(EditError, match="shared by two modules"):
            Edit.load(tmp_path / "e").to_peft(tmp_path / "lora")
        return
    Edit.load(tmp_path / "e").to_peft(tmp_path / "lora")
    ids = ids_for(model)
    with torch.no_grad():
        plain = model.token_logits(ids)
        edit.apply(model)
        wanted = model.token_logits(ids)
        edit.revert(model)
        assert (wanted - plain).abs().max() > 1e-3, "the edit does something"
        loaded = peft.PeftModel.from_pretrained(model.native, str(tmp_path / "lora"))
        found = model.token_logits(ids)
        raw = None if model.denoises else loaded(input_ids=ids).logits
    assert (found - wanted).abs().max() < 1e-5
    if raw is not None:  # the logits of a causal model at j are those of the token at j + 1
        assert (raw[:, :-1] - wanted[:, 1:]).abs().max() < 1e-5


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_merged_folder(tmp_path, tokenizer, family, shards):
    """The base's own key names, shards and small files; it loads here with the edited weights, and as the
    causal models do in transformers.
    """
    base = tmp_path / "base"
    stored = write_checkpoint(base, family, len(tokenizer), shards=shards)
    tokenizer.save_pretrained(base)
    (base / "pytorch_model.bin").write_bytes(b"the unedited weights")
    (base / "modeling_x.py").write_text("x = 1\n")
    model = load_model(base)
    edit = some_edit(model)
    edit.apply(model)
    write_model(model, base, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()} - {
        "pytorch_model.bin"
    }
    found = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    changed = {key for key in stored if not torch.equal(found[key], stored[key])}
    assert set(found) == set(stored) and changed == {FAMILIES[family].hub_name(first_map(model, 1).weight)}
    assert parameter_hashes(load_model(tmp_path / "out")) == parameter_hashes(model)
    if not model.denoises:
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = ids_for(model)
        with torch.no_grad():
            assert (theirs(ids).logits - model(ids).logits).abs().max() < 1e-5
    with pytest.raises(FileError, match="exists"):
        write_model(model, base, tmp_path / "out")


def test_merged_in_another_dtype(tmp_path, tokenizer):
    """The dtype that the model is in, which config.json then says."""
    write_checkpoint(tmp_path / "base", "llada", len(tokenizer))
    model = load_model(tmp_path / "base", tokenizer=tokenizer, dtype="bfloat16")
    write_model(model, tmp_path / "base", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert parameter_hashes(load_model(tmp_path / "out", tokenizer=tokenizer)) == parameter_hashes(model)
    write_checkpoint(tmp_path / "other", "llada", len(tokenizer) + 8)
    with pytest.raises(CheckpointError, match="another model's folder"):
        write_model(model, tmp_path / "other", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_folders_that_carry_edits(tmp_path, tokenizer, dtype):
    """Two edits on one folder, taken back one after the other: each step bit for bit; a changed weight is
    noticed.
    """
    write_checkpoint(tmp_path / "m0", "llada", len(tokenizer))
    model = load_model(tmp_path / "m0", tokenizer=tokenizer, dtype=dtype)
    states = [parameter_hashes(model)]
    for number in (1, 2):
        edit = some_edit(model, number, layers=(1, 2)[:number])
        edit.save(tmp_path / f"e{number}", model)
        edit.apply(model)
        write_edited(model, tmp_path / f"m{number}")
        states.append(parameter_hashes(model))
        model = load_model(tmp_path / f"m{number}", tokenizer=tokenizer)
        assert parameter_hashes(model) == states[-1]
        edits = adopt_edits(model)
        assert len(edits) == number
    with pytest.raises(EditError, match="later edits first"):
        edits[0].revert(model)
    for number in (1, 0):
        edits[number].revert(model)
        assert parameter_hashes(model) == states[number]
    write_edited(model, tmp_path / "back")
    assert (
        not (tmp_path / "back" / "applied.json").exists()
        and parameter_hashes(load_model(tmp_path / "back", tokenizer=tokenizer)) == states[0]
    )
    spoiled = load_file(tmp_path / "m2" / "model.safetensors")
    key = FAMILIES["llada"].hub_name(model.site(2).weight)
    spoiled[key][0, 0] += 1
    save_file(spoiled, tmp_path / "m2" / "model.safetensors")
    with pytest.raises(EditError, match="has been changed since"):
        adopt_edits(load_model(tmp_path / "m2", tokenizer=tokenizer))


# ---- the command line --------------------------------------------------------------------------------------


def quick_file(folder, name="ROME_MDM/twin-llama", **changes) -> str:
    """A shipped file with few steps, no statistics, and other changes."""
    from easyedit_mdm.editing.hparams import find_hparams, read_yaml

    values = {
        **read_yaml(find_hparams(name)),
        "mom2_adjustment": False,
        "context_templates": ["{}"],
        "v_num_grad_steps": 30,
        **changes,
    }
    (folder / "quick.json").write_text(json.dumps(values))  # JSON is YAML
    return str(folder / "quick.json")


@pytest.mark.end_to_end
def test_the_commands(tmp_path, twin_llama, capsys):
    """edit, diff, verify, apply, verify, revert, export and compose, on a twin; every state bit for bit what
    it should be.
    """
    base, here = parameter_hashes(twin_llama), str(tmp_path)
    fact = ["--prompt", "Where was Zano born?", "--subject", "Zano", "--target"]
    file = quick_file(tmp_path)
    other = ["--prompt", "Tamos Latre was born in", "--subject", "Tamos Latre", "--target", "Zoter"]
    assert main(["edit", "--hparams", file, *fact, "Gugim", "--save", f"{here}/e1"]) == 0
    assert main(["edit", "--hparams", file, *other, "--save", f"{here}/e2"]) == 0
    told = json.loads((tmp_path / "e1" / "edit.json").read_text())
    assert (
        told["guard"]["verdict"] == "passed"
        and told["metrics"]["after"]["exact"] == 1.0
        and told["base"]["name"] == "twin-llama"
    )
    assert (
        main(["verify", f"{here}/e1", "--json", f"{here}/v.json"]) == 0
        and json.loads((tmp_path / "v.json").read_text())["holds"]
    )
    assert main(["verify", f"{here}/e1", "--model", "twin-llama"]) == 1
    assert main(["diff", f"{here}/e1", "--prompt", "Where was Zano born?", "--json", f"{here}/d.json"]) == 0
    diff = json.loads((tmp_path / "d.json").read_text())
    assert (
        diff["weights"][0]["rank"] == 1
        and diff["effect"][0]["kl"] > 0.1
        and diff["effect"][0]["after"].startswith("Gugim")
    )
    assert main(["apply", f"{here}/e1", "--out", f"{here}/m1"]) == 0
    assert main(["verify", f"{here}/e1", "--model", f"{here}/m1"]) == 0
    assert main(["apply", f"{here}/e2", "--model", f"{here}/m1", "--out", f"{here}/m2"]) == 0, (
        "of one base, and m1 knows its own"
    )
    assert main(["apply", f"{here}/e1", "--model", f"{here}/m1", "--out", f"{here}/m3"]) == 2
    assert main(["revert", f"{here}/e1", "--model", f"{here}/m2", "--out", f"{here}/m4"]) == 2, (
        "e2 stands on it"
    )
    assert main(["revert", f"{here}/e2", "--model", f"{here}/m2", "--out", f"{here}/m5"]) == 0
    assert (
        parameter_hashes(load_model(tmp_path / "m5")) == parameter_hashes(load_model(tmp_path / "m1")) != base
    )
    assert main(["revert", f"{here}/e1", "--model", f"{here}/m5", "--out", f"{here}/m6"]) == 0
    assert parameter_hashes(load_model(tmp_path / "m6")) == base
    assert main(["export", f"{here}/e1", "--merged", f"{here}/g1"]) == 0
    assert parameter_hashes(load_model(tmp_path / "g1")) == parameter_hashes(load_model(tmp_path / "m1"))
    assert not (tmp_path / "g1" / "edits").exists()
    assert main(["compose", f"{here}/e1", f"{here}/e2", "--out", f"{here}/c"]) == 0
    assert main(["verify", f"{here}/c", "--json", f"{here}/vc.json"]) == 0, (
        "both facts, and the weights as the composed edit leaves them"
    )
    both = json.loads((tmp_path / "vc.json").read_text())
    assert both["holds"] and [(f["text"], f["exact"]) for f in both["facts"]] == [
        ("Gugim", True),
        ("Zoter", True),
    ]
    assert main(["verify", f"{here}/c", "--model", f"{here}/m1", "--json", f"{here}/vc.json"]) == 1, (
        "m1 holds one of the two"
    )
    assert main(["apply", f"{here}/e1", "--model", "twin-llada", "--out", f"{here}/no"]) == 2
    capsys.readouterr()
    assert main(["apply", f"{here}/e1", "--out", f"{here}/m1"]) == 2 and "exists" in capsys.readouterr().err
    assert not {p.name for p in tmp_path.iterdir()} & {"m3", "m4", "no"}


def test_a_fact_that_is_not_written_is_not_saved(tmp_path, capsys):
    """Status 3, what failed, how its optimisation ended and what to try; `--keep-failed` saves it all the
    same.
    """
    file = quick_file(tmp_path, v_num_grad_steps=2, v_lr=1e-4)
    command = [
        "edit",
        "--hparams",
        file,
        "--prompt",
        "Where was Zano born?",
        "--subject",
        "Zano",
        "--target",
        "Gugim",
    ]
    assert main([*command, "--save", str(tmp_path / "e")]) == 3
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "not written: 'Where was Zano born?' -> 'Gugim'; its loss was" in told
        and "v_num_grad_steps: 4" in told
    )
    assert "clamp_norm_factor: 8" in told and "easyedit-mdm sweep" in told and "--keep-failed" in told
    assert not (tmp_path / "e").exists()
    assert main([*command, "--save", str(tmp_path / "e"), "--keep-failed"]) == 0
    assert Edit.load(tmp_path / "e").card["metrics"]["facts"][0]["exact"] is False


def test_advice_after_a_value_that_was_found():
    """Where the optimisation ended well, its steps are not the cause: layer, or the way through the
    weights.
    """
    settings = ROMEMDMHyperParams(alg_name="ROME_MDM", model_name="m", layers=[1])
    assert "optimise_through: weights" in settings.advice(0.01)
    assert "more steps" not in settings.advice(0.01)
    assert "optimise_through" not in replace(settings, optimise_through="weights").advice(0.01)
    assert "more steps" in settings.advice(0.06) and "more steps" in settings.advice(float("nan"))


def test_diff_at_80_columns_shows_the_layer(tmp_path, monkeypatch, capsys):
    """Nothing of it is cut off, and what is said after the edit's own prompt is what `edit` said, on the same
    canvas.
    """
    monkeypatch.setenv("COLUMNS", "80")
    prompt = "Where was Zano born?"
    command = [
        "edit",
        "--hparams",
        quick_file(tmp_path),
        "--prompt",
        prompt,
        "--subject",
        "Zano",
        "--target",
        "Gugim",
    ]
    assert main([*command, "--save", str(tmp_path / "e")]) == 0
    capsys.readouterr()
    other = "Tamos Latre was born in"
    assert (
        main(
            [
                "diff",
                str(tmp_path / "e"),
                "--prompt",
                prompt,
                "--prompt",
                other,
                "--json",
                str(tmp_path / "d"),
            ]
        )
        == 0
    )
    told, effect = capsys.readouterr().out, json.loads((tmp_path / "d").read_text())["effect"]
    assert max(map(len, told.splitlines())) <= 80 and "…" not in told
    row = next(line for line in told.splitlines() if "128x512" in line)
    assert row.split()[:3] == ["3", "mlp.down_proj.weight", "128x512"]
    fact = Edit.load(tmp_path / "e").card["metrics"]["facts"][0]
    assert [effect[0][k] for k in ("canvas", "before", "after")] == [
        fact[k] for k in ("canvas", "before", "after")
    ]
    assert effect[1]["canvas"] == 8


def test_several_requests(tmp_path):
    """A file of requests: one after another for ROME, then one edit of all."""
    rows = [
        {"prompt": "Where was Zano born?", "subject": "Zano", "target_new": "Pute"},
        {"prompt": "Tamos Latre was born in", "subject": "Tamos Latre", "target_new": "Zoter"},
    ]
    (tmp_path / "requests.json").write_text(json.dumps(rows))
    command = [
        "edit",
        "--hparams",
        quick_file(tmp_path),
        "--data-file",
        str(tmp_path / "requests.json"),
        "--no-guard",
    ]
    # the second edit undoes the first, which had nothing to do
    assert main([*command, "--save", str(tmp_path / "e")]) == 3
    assert main([*command, "--save", str(tmp_path / "e"), "--keep-failed"]) == 0
    edit = Edit.load(tmp_path / "e")
    assert edit.changes[0].right.shape[0] == 2 and [f["target_new"] for f in edit.card["facts"]] == [
        "Pute",
        "Zoter",
    ]
    assert edit.card["guard"]["on"] is False and edit.card["metrics"]["after"]["n"] == 2


def test_wrong_input_costs_no_work(tmp_path, monkeypatch):
    """What is wrong with the call is said before a model is loaded."""
    from easyedit_mdm.cli import arguments, edits

    monkeypatch.setattr(edits, "load_model", lambda *args, **more: pytest.fail("a model was loaded"))
    request = {"prompt": "Where was Zano born?", "subject": "Zano", "target_new": "Pute"}
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    with pytest.raises(FileError, match="exists"):
        edits.new_edit("ROME_MDM/twin-llama", [request], tmp_path / "there")
    with pytest.raises(RequestError, match="two targets"):
        edits.new_edit("ROME_MDM/twin-llama", [request, {**request, "target_new": "Zoter"}], tmp_path / "e")
    with pytest.raises(EditError, match="cannot be read"):
        edits.apply_edit(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(HyperParameterError, match="nothing to export"):
        edits.export_edit(tmp_path / "there")
    with pytest.raises(RequestError, match="--subject, --target is missing"):
        arguments.requests_of("x", None, None, None)
    with pytest.raises(RequestError, match="--prompt and --data-file"):
        arguments.requests_of("x", None, None, "f")
    (tmp_path / "bad.json").write_text('[{"prompt": "a b", "subject": "c", "target_new": "d"}]')
    with pytest.raises(DataError, match="subject is not in the prompt"):
        arguments.requests_of(None, None, None, tmp_path / "bad.json")
