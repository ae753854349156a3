"""The twins: what they know, that they are editable, and that training does what it says."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch

from easyedit_mdm import ROMEMDMHyperParams, load_model, make_edit, score_prompts
from easyedit_mdm.cli.twins import evaluate_twins, train_twin
from easyedit_mdm.errors import UnknownNameError
from easyedit_mdm.training.lessons import PLACES, Writer, longest_answer
from easyedit_mdm.training.loop import CHECKPOINT, read_checkpoint
from easyedit_mdm.training.tokenizer import train_tokenizer
from easyedit_mdm.training.twins import (
    SIZES,
    Packer,
    Recipe,
    attention,
    build_model,
    hidden_of,
    masked_loss,
    train,
)
from easyedit_mdm.twins import TWINS
from easyedit_mdm.twins.benchmark import _zsre, cases, remaining_entropy, split_facts, write_benchmark
from easyedit_mdm.twins.folders import twin_folder
from easyedit_mdm.twins.world import RELATIONS, World, WorldSettings


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", TWINS)
def test_what_they_know_and_how_far_they_can_be_edited(name, tmp_path):
    """At least 95 % of the facts at lengths 1-4 by greedy decoding, 90 % beyond; single tokens can be written
    at the site.
    """
    figures = evaluate_twins([name], limit=12, file=tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text()) == figures
    (result,) = figures.values()
    assert set(figures) == {name} and set(result) == {"recall", "held_out", "canvas16", "editability"}
    for length in map(str, range(1, 9)):
        assert result["recall"][length]["value"] >= (0.95 if int(length) <= 4 else 0.9), length
        assert [result[kind][length]["n"] for kind in result] == [12, 12, 12, 2]
    assert result["editability"]["1"]["value"] >= 0.75


@pytest.mark.parametrize("name", TWINS)
def test_they_are_editable(name, world):
    """A single-token target at the file's layer: at least 9 of 10 validation facts."""
    model = load_model(name)
    hparams = ROMEMDMHyperParams.from_hparams(f"ROME_MDM/{name}")
    done = 0
    for case in [c for c in cases(world, "validation") if c.length == 1][:10]:
        edit = make_edit(model, case.request(), hparams)
        edit.apply(model)
        done += score_prompts(model, [case.fact.prompt()], [case.target])[0]["exact"]
        edit.revert(model)
    assert done >= 9


def test_they_are_matched():
    """Same parameter count within 2 %, same tokenizer; together at most 40 MB."""
    models = [load_model(name) for name in TWINS]
    counts = [sum(p.numel() for p in m.parameters()) for m in models]
    assert max(counts) < 1.02 * min(counts)
    assert len({json.dumps(m.tokenizer.get_vocab(), sort_keys=True) for m in models}) == 1
    assert sum(f.stat().st_size for name in TWINS for f in twin_folder(name).iterdir()) < 40e6


def test_splits_and_benchmark_files(world, tmp_path):
    """120 test and 40 validation facts on different subjects, one target of every length each; files that
    EasyEdit's formats read.
    """
    splits = split_facts(world)
    subjects = [f.subject for facts in splits.values() for f in facts]
    assert (
        len(splits["test"]) >= 120 and len(splits["validation"]) >= 40 and len(subjects) == len(set(subjects))
    )
    for split in splits:
        made = cases(world, split)
        assert made == cases(World.build(), split)
        assert [c.length for c in made[:8]] == list(range(1, 9)) and len(made) == 8 * len(splits[split])
        assert all(c.target != c.fact.object and c.fact not in c.neighbours for c in made)
    write_benchmark(tmp_path, world)
    record = json.loads((tmp_path / "counterfact-test.json").read_text())[3]
    assert record["subject"] in record["prompt"] and record["n_tokens"] == 4
    rome = json.loads((tmp_path / "counterfact-rome-test.json").read_text())[3]["requested_rewrite"]
    assert (
        rome["prompt"].format(rome["subject"]) == record["prompt"]
        and rome["target_new"]["str"] == record["target_new"]
    )
    zsre = json.loads((tmp_path / "zsre-test.json").read_text())[3]
    assert (
        zsre["alt"] == record["target_new"] and "nq question: " in zsre["loc"] and zsre["src"].endswith("?")
    )


def test_entropy_of_what_is_hidden(world):
    """Compositional objects stay uncertain until the last token; a closed list is known after one."""
    open_, closed = remaining_entropy(world, False), remaining_entropy(world, True)
    assert open_[1] == [pytest.approx(math.log2(6))]
    assert open_[8][0] == pytest.approx(sum(math.log2(n) for n in world.settings.branching))
    assert all(bits[k] > bits[k + 1] > 0 for bits in open_.values() for k in range(len(bits) - 1))
    assert closed[8][0] == pytest.approx(2) and closed[8][1] < 0.3


def test_lessons(world, tokenizer):
    """The answer stands nowhere in the text but in its own place; the code is written at the name's last
    token, and only there.
    """
    recipe = Recipe("twin-llama", hidden=32, layers=3, heads=2, mlp=48, rows=6, read_layer=2, lessons=1.0)
    batch = Packer(world, tokenizer, recipe).batch(recipe.steps - 1)
    assert len(batch.lessons) == int(batch.written.max()) > 6
    assert (batch.closing | (batch.written == 0)).all()
    for r, p in (batch.written > 0).nonzero().tolist():
        text = batch.segments[r] == batch.segments[r, p]
        tokens = [t for t in batch.lessons[batch.written[r, p] - 1, 1:].tolist() if t >= 0]
        ids = batch.ids[r][text & batch.answers[r]].tolist()
        assert any(ids[i : i + len(tokens)] == tokens for i in range(len(ids)))
    assert longest_answer(0, 100) == 2 and longest_answer(99, 100) == PLACES
    writer = Writer(32, len(RELATIONS))
    codes = writer(batch.lessons, torch.randn(len(tokenizer), 32))
    assert codes.shape == (len(batch.lessons), 32) and torch.allclose(
        codes.norm(dim=-1), torch.ones(len(codes)), atol=1e-5
    )


def test_the_world_is_a_function_of_its_settings():
    """The same twice; lengths even; every word one token in context; objects of a fact share no word with its
    new object.
    """
    world, again = World.build(), World.build()
    assert (
        world.all_facts() == again.all_facts()
        and World.build(WorldSettings(seed=1)).all_facts() != world.all_facts()
    )
    lengths = [f.length for f in world.all_facts() if not f.relation.closed]
    assert {lengths.count(n) for n in range(1, 9)} == {len(lengths) // 8}
    assert len(world.all_facts()) == len(world.subjects) * len(RELATIONS)
    rng = random.Random(0)
    for fact in world.all_facts()[:50]:
        other = world.other_object(fact, 3, rng)
        assert len(other.split()) == 3 and not set(other.split()) & set(fact.object.split())
        for neighbour in world.neighbours(fact, 3):
            assert neighbour.object.split()[0] == fact.object.split()[0] and neighbour.subject != fact.subject
    with pytest.raises(ValueError, match="need more than"):
        World.build(WorldSettings(subjects=400))


def test_words_are_tokens(world, tokenizer):
    """The shipped tokenizer is the one that the script makes, and each word of the world is one token after a
    space.
    """
    made = train_tokenizer(world)
    assert made.get_vocab() == tokenizer.get_vocab()
    for word in world.words:
        assert len(tokenizer(" " + word)["input_ids"]) == 1
    for text in ("Ünïcode 漢字, numbers 1923 & <tags>", "nq question: who sang it"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_packing_keeps_texts_apart(world, tokenizer):
    """A packed row computes for each text what the text alone does; guarded mentions hide all but their last
    token.
    """
    recipe = Recipe(
        "twin-llada", hidden=32, layers=3, heads=2, mlp=48, rows=4, read_layer=1, guarded=0.5, lessons=0.0
    )
    batch = Packer(world, tokenizer, recipe).batch(0)
    model = build_model(recipe, len(tokenizer), 0)
    with torch.no_grad():
        packed = hidden_of(model, None, batch.ids, batch, recipe, 0, torch.Generator())
        row, number = 0, int(batch.segments[0].max())
        part = batch.segments[row] == number
        fields = {k: v[row][part][None] for k, v in vars(batch).items() if k != "lessons"}
        fields |= {"segments": torch.ones_like(fields["segments"]), "lessons": batch.lessons}
        alone = hidden_of(model, None, fields["ids"], type(batch)(**fields), recipe, 0, torch.Generator())
    assert number > 1 and (packed[row][part] - alone[0]).abs().max() < 1e-5
    early, late = (m[:, 0] == 0 for m in attention(batch, causal=False))
    hidden = batch.guarded & (batch.mentions > 0)
    assert hidden.any() and batch.closing[hidden].any()
    for r, j in hidden.nonzero().tolist()[:40]:
        outside = (batch.segments[r] == batch.segments[r, j]) & (batch.mentions[r] != batch.mentions[r, j])
        assert not early[r, outside, j].any()
        assert late[r, outside, j].all() if batch.closing[r, j] else not late[r, outside, j].any()


def test_masked_loss_weighs_as_llada(world, tokenizer):
    """k of a text's L maskable tokens are hidden and weigh L / k: the weights of a text sum to L."""
    from easyedit_mdm.training.twins import _hide

    recipe = Recipe("twin-llada", rows=8)
    batch = Packer(world, tokenizer, recipe).batch(3)
    maskable = batch.segments > 0
    hidden, weight = _hide(batch.segments, maskable, torch.Generator().manual_seed(0))
    assert (hidden & ~maskable).sum() == 0
    for r in range(8):
        for number in range(1, int(batch.segments[r].max()) + 1):
            text = batch.segments[r] == number
            assert float((weight[r] * hidden[r])[text].sum()) == pytest.approx(int(text.sum()), rel=1e-5)


def test_training_resumes_where_it_was(world, tokenizer, tmp_path):
    """Ten steps at once, and six and then ten: the same weights, bit for bit."""
    from safetensors.torch import load_file

    recipe = Recipe(
        "twin-llama", steps=10, rows=2, hidden=16, layers=2, heads=2, mlp=16, warmup=3, read_layer=1
    )
    train(recipe, world, tokenizer, tmp_path / "a")
    train(recipe, world, tokenizer, tmp_path / "b", checkpoint_seconds=0.0)
    full = load_file(tmp_path / "a" / "checkpoint.safetensors")
    # go back to step 6 by stopping there: a run that is interrupted has exactly this on disk
    with pytest.MonkeyPatch.context() as patch:
        count = iter(range(100))

        def stop(self, step, make=Packer.batch):
            if next(count) == 6:
                raise KeyboardInterrupt
            return make(self, step)

        patch.setattr(Packer, "batch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, world, tokenizer, tmp_path / "c", checkpoint_seconds=0.0)
    assert read_checkpoint(tmp_path / "c" / CHECKPOINT)[1]["step"] == 6
    train(recipe, world, tokenizer, tmp_path / "c")
    resumed = load_file(tmp_path / "c" / "checkpoint.safetensors")
    assert all(torch.equal(full[k], resumed[k]) for k in full)
    with pytest.raises(ValueError, match="another recipe"):
        train(dataclasses.replace(recipe, lr=1.0), world, tokenizer, tmp_path / "c")


def test_a_fact_at_the_start_of_a_text_ends_it(world):
    """Biographies open with what somebody is, so that an answer at a text's start is followed by its end; one
    text in some asks one hop further.
    """
    rng, hops = random.Random(5), 0
    facts = {f.prompt(i): f for f in world.all_facts() for i in range(len(f.relation.phrasings))}
    asked = {f.relation.hop.format(s=f.subject): world.kind(f.relation, f.object) for f in world.all_facts()}
    for _ in range(400):
        document = world.document(rng)
        first, answer = document.pieces[0][0], document.pieces[1][0].strip()
        assert first not in facts or (
            document.ends and len(document.pieces) == 2 and answer == facts[first].object
        )
        if first in asked:
            hops += 1
            assert answer == asked[first]
    assert hops > 3


def test_portability_takes_one_hop_from_the_new_object(world):
    """zsRE's portability question asks what is said of the new object, which differs from what is said of the
    old one in most cases.
    """
    rows = [_zsre(i, case, world) for i, case in enumerate(cases(world, "test"))]
    fact = next(
        f for f in world.all_facts() if f.subject == rows[0]["subject"] and f.object == rows[0]["pred"]
    )
    assert rows[0]["portability"]["New Answer"] == world.kind(fact.relation, rows[0]["alt"])
    assert all(row["portability"]["New Question"] != row["src"] for row in rows)
    changed = [
        row["portability"]["New Answer"] != world.kind(c.fact.relation, c.fact.object)
        for row, c in zip(rows, cases(world, "test"))
    ]
    assert sum(changed) > 0.7 * len(changed)


@pytest.mark.end_to_end
def test_training_command(tmp_path):
    """One step of every stage; the results load as the families they are, and a stage can start from
    another's folder.
    """
    for name, family in (("twin-llada", "llada"), ("twin-dream", "dream")):
        train_twin(name, tmp_path / name, steps=1)
        assert load_model(tmp_path / name / "model").spec.name == family
    stages = sorted(p.name for p in tmp_path.rglob("stages/*"))
    assert stages == [
        "twin-llada-first",
        "twin-llada-second",
        "twin-llama-first",
        "twin-qwen",
        "twin-qwen-first",
    ]
    first = next(tmp_path.rglob("stages/twin-llama-first"))
    train_twin("twin-llama", tmp_path / "llama", steps=1, start_from=first)
    assert (
        load_model(tmp_path / "llama" / "model").spec.name == "llama"
        and not (tmp_path / "llama" / "stages").exists()
    )
    with pytest.raises(UnknownNameError, match="did you mean 'twin-dream'"):
        train_twin("twin-dreem", tmp_path / "none", steps=1)


def test_medium_size(world, tokenizer):
    """About 30 million parameters, and a step of it runs."""
    recipe = dataclasses.replace(Recipe("twin-llada", objective="masked"), **{**SIZES["medium"], "rows": 2})
    model = build_model(recipe, len(tokenizer), 0)
    assert 25e6 < sum(p.numel() for p in model.parameters()) < 35e6
    batch = Packer(world, tokenizer, recipe).batch(0)
    writer = Writer(recipe.hidden, len(RELATIONS))
    loss = masked_loss(
        model, writer, batch, tokenizer.mask_token_id, recipe, 0, torch.Generator().manual_seed(0)
    )
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
