"""The twins: what they know, that they are editable, and that training does what it says."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from easyedit_mdm import ROMEMDMHyperParams, load_model, make_edit, score_prompts
from easyedit_mdm.twins import TWINS
from easyedit_mdm.twins.commands import evaluate_twins, train_twin
from easyedit_mdm.twins.tokenizer import train_tokenizer
from easyedit_mdm.twins.train import Packer, Recipe, attention, build_model, logits_of, train
from easyedit_mdm.twins.world import RELATIONS, World, WorldSettings


def test_they_know_their_facts(tmp_path):
    """At least 95 % of the facts by greedy decoding at every length 1-4."""
    figures = evaluate_twins(limit=60, file=tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text()) == figures
    assert set(figures) == set(TWINS)
    for name, result in figures.items():
        for length, figure in result["recall"].items():
            assert figure["value"] >= 0.95 and figure["n"] == 60, (name, length)


@pytest.mark.parametrize("name", TWINS)
def test_they_are_editable(name, world):
    """A single-token target at the file's layer: at least 9 of 10 facts drawn by a seed."""
    model = load_model(name)
    hparams = ROMEMDMHyperParams.from_hparams(f"ROME_MDM/{name}")
    rng = random.Random(11)
    done = 0
    for fact in rng.sample([f for f in world.all_facts() if not f.relation.closed], 10):
        target = world.other_object(fact, 1, rng)
        edit = make_edit(model, {"prompt": fact.prompt(), "subject": fact.subject, "target_new": target}, hparams)
        edit.apply(model)
        done += score_prompts(model, [fact.prompt()], [target])[0]["exact"]
        edit.revert(model)
    assert done >= 9


def test_the_world_is_a_function_of_its_settings():
    """The same twice; lengths even; every word one token in context; objects of a fact share no word with its new object."""
    world, again = World.build(), World.build()
    assert world.all_facts() == again.all_facts() and World.build(WorldSettings(seed=1)).all_facts() != world.all_facts()
    lengths = [f.length for f in world.all_facts() if not f.relation.closed]
    assert {lengths.count(n) for n in (1, 2, 3, 4)} == {len(lengths) // 4}
    assert len(world.all_facts()) == len(world.subjects) * len(RELATIONS)
    rng = random.Random(0)
    for fact in world.all_facts()[:50]:
        other = world.other_object(fact, 3, rng)
        assert len(other.split()) == 3 and not set(other.split()) & set(fact.object.split())
        for neighbour in world.neighbours(fact, 3):
            assert neighbour.object.split()[0] == fact.object.split()[0] and neighbour.subject != fact.subject
    with pytest.raises(ValueError, match="need more than"):
        World.build(WorldSettings(subjects=300))


def test_words_are_tokens(world, tokenizer):
    """The shipped tokenizer is the one that the script makes, and each word of the world is one token after a space."""
    made = train_tokenizer(world)
    assert made.get_vocab() == tokenizer.get_vocab()
    for word in world.words:
        assert len(tokenizer(" " + word)["input_ids"]) == 1
    for text in ("Ünïcode 漢字, numbers 1923 & <tags>", "nq question: who sang it"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_packing_keeps_texts_apart(world, tokenizer):
    """A packed row computes for each text what the text alone does; guarded mentions hide all but their last token."""
    recipe = Recipe("twin-llada", hidden=32, layers=3, heads=2, mlp=48, rows=4, read_layer=1, guarded=0.5)
    batch = Packer(world, tokenizer, recipe).batch(0)
    model = build_model(recipe, len(tokenizer), 0)
    with torch.no_grad():
        packed = logits_of(model, batch.ids, batch, recipe)
        row, number = 0, int(batch.segments[0].max())
        part = batch.segments[row] == number
        fields = {k: v[row][part][None] for k, v in vars(batch).items()}
        alone = logits_of(model, fields["ids"], type(batch)(**{**fields, "segments": torch.ones_like(fields["segments"])}), recipe)
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
    from easyedit_mdm.twins.train import _hide

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

    recipe = Recipe("twin-llama", steps=10, rows=2, hidden=16, layers=2, heads=2, mlp=16, warmup=3, read_layer=1)
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
    assert json.loads((tmp_path / "c" / "state.json").read_text())["step"] == 6
    train(recipe, world, tokenizer, tmp_path / "c")
    resumed = load_file(tmp_path / "c" / "checkpoint.safetensors")
    assert all(torch.equal(full[k], resumed[k]) for k in full)
    with pytest.raises(ValueError, match="another recipe"):
        train(dataclasses.replace(recipe, lr=1.0), world, tokenizer, tmp_path / "c")


def test_training_command(tmp_path):
    """Two steps of each twin, the masked one from the other's weights; the result loads as the family it is."""
    train_twin("twin-llama", tmp_path / "llama", steps=2)
    train_twin("twin-llada", tmp_path / "llada", steps=2, start_from=tmp_path / "llama")
    assert load_model(tmp_path / "llama" / "model").spec.name == "llama"
    assert load_model(tmp_path / "llada" / "model").spec.name == "llada"
