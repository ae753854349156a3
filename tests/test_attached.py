"""What edits add to a forward pass without touching a weight: it does what its formula says, together with
others and alone, is taken back to the bit, and is kept in files.
"""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch

from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.editing import Edit, LowRank
from easyedit_mdm.editing.edit import SideMemory, carried, revert_all
from easyedit_mdm.editing.edit.attached import Codebook, Context, ResidualMemory, radii, solved
from easyedit_mdm.editing.edit.export import write_model
from easyedit_mdm.errors import EditError, ModelError

INNER, WIDTH = 48, 32  # of conftest's tiny models
FAMILY = ["llama", "llada", "dream", "gpt2"]


def memory(
    seed: int, facts: int = 1, site: str = "", inner: int = INNER, **settings: float
) -> ResidualMemory:
    """A residual memory of random facts."""
    generator = torch.Generator().manual_seed(seed)
    keys, residuals = (torch.randn(facts, n, generator=generator) for n in (inner, WIDTH))
    settings = {"ridge": 0.1, "alpha": 1.0, "top_q": 1.0, **settings}
    return ResidualMemory(site, {"keys": keys, "residuals": residuals}, settings)


def context(*ids: int, lead: int | None = None) -> Context:
    """Tokens before every row."""
    none = torch.zeros(0, dtype=torch.long)
    last = none if lead is None else torch.tensor([lead])
    return Context("", {"demonstrations": none, "fact": torch.tensor(ids), "lead": last})


def rows(model, length: int = 7) -> torch.Tensor:
    """Two rows of tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 900, (2, length), generator=generator, device=model.device)


@torch.no_grad()
def logits(model, ids=None) -> torch.Tensor:
    """What the model says."""
    return model.token_logits(rows(model) if ids is None else ids)


@pytest.mark.parametrize("family", FAMILY)
def test_a_linear_memory_is_a_change_of_the_weight(tiny, family):
    """With all entries recalled, the memory is alpha W^T added to the site's weight."""
    model = tiny(family)
    site = model.site(1)
    inner = model.module(site.name).weight.shape[0 if site.transposed else 1]
    one = memory(0, facts=3, site=site.name, inner=inner, alpha=0.5)
    weight = solved(one.tensors["keys"], one.tensors["residuals"], 0.1)
    before = logits(model)
    inside = LowRank(site.weight, 0.5 * weight.T, torch.eye(inner), site.transposed)
    edit, same = Edit([], {"method": "x"}, [one]), Edit([inside], {"method": "x"})
    same.apply(model)
    wanted = logits(model)
    same.revert(model)
    edit.apply(model)
    assert (wanted - before).abs().max() > 0.01
    assert (logits(model) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    edit.revert(model)
    assert torch.equal(logits(model), before)


def test_the_memory_is_solved_for_all_facts(tiny):
    """The formula by another way; two edits of one fact each recall what one edit of both does."""
    model = tiny("llada")
    site = model.site(1).name
    both = memory(3, facts=2, site=site)
    keys, residuals = both.tensors["keys"].double(), both.tensors["residuals"].double()
    by_rows = torch.linalg.inv(keys.T @ keys + 0.1 * torch.eye(INNER)) @ keys.T @ residuals
    assert torch.allclose(
        solved(both.tensors["keys"], both.tensors["residuals"], 0.1), by_rows.float(), atol=1e-5
    )
    one, two = (
        Edit(
            [], {}, [ResidualMemory(site, {k: v[i : i + 1] for k, v in both.tensors.items()}, both.settings)]
        )
        for i in range(2)
    )
    Edit([], {}, [both]).apply(model)
    wanted = logits(model)
    revert_all(model)
    one.apply(model)
    alone = logits(model)
    two.apply(model)
    assert torch.equal(logits(model), wanted) and not torch.equal(alone, wanted)
    one.undo(model)
    two.undo(model)
    one.apply(model)
    assert torch.equal(logits(model), alone)


def test_only_the_largest_entries_are_recalled(tiny):
    """top_q = 1 / 32 adds one entry a token."""
    model = tiny("llada")
    site = model.site(1).name
    module, seen = model.module(site), []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out))
    before = logits(model)
    Edit([], {}, [memory(0, site=site, top_q=1 / WIDTH)]).apply(model)
    handle.remove()
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out))
    after = logits(model)
    handle.remove()
    assert not torch.equal(before, after)
    assert ((seen[1] - seen[0]).abs() > 0).sum(-1).tolist() == [[1] * 7] * 2


def test_a_codebook_answers_within_its_radius(tiny):
    """Where the input is a key's, the output is its value; elsewhere it is the layer's own, to the bit."""
    model = tiny("llada")
    site = model.site(1).name
    module, entering, leaving = model.module(site), [], []

    def watch(_, args, out):
        entering.append(args[0])
        leaving.append(out)

    handle = module.register_forward_hook(watch)
    logits(model)
    handle.remove()
    key, value = entering[0][1, 3], torch.arange(float(WIDTH))
    distances = (entering[0] - key).norm(dim=-1)
    tensors = {"keys": key[None], "values": value[None], "target": torch.tensor([1])}
    radius = float(distances[distances > 0].min()) * 0.9
    Edit([], {}, [Codebook(site, tensors, {"radius": radius})]).apply(model)
    handle = module.register_forward_hook(watch)
    logits(model)
    handle.remove()
    assert torch.equal(leaving[1][1, 3], value)
    other = torch.ones(2, 7, dtype=torch.bool)
    other[1, 3] = False
    assert torch.equal(leaving[1][other], leaving[0][other])


def test_keys_of_different_facts_share_the_distance():
    """GRACE's rule for keys within reach of each other."""

    def part(at: float, target: int) -> Codebook:
        key = torch.zeros(1, 4)
        key[0, 0] = at
        return Codebook("m", {"keys": key, "values": key, "target": torch.tensor([target])}, {"radius": 1.0})

    assert radii([part(0, 1), part(5, 2)]).tolist() == [1, 1], "far apart"
    assert radii([part(0, 1), part(1.5, 2)]).tolist() == pytest.approx([0.75, 0.75], abs=1e-4)
    assert radii([part(0, 1), part(1.5, 1)]).tolist() == [1, 1], "they say the same"
    assert radii([part(0, 1), part(1.5, 2), part(2.0, 3)])[1:].tolist() == pytest.approx([0.25] * 2, abs=1e-4)


@pytest.mark.parametrize("family", FAMILY)
def test_a_context_stands_before_every_row(tiny, family):
    """The logits of rows that begin with it, whatever the padding; the native model's too."""
    model = tiny(family)
    ids, before = rows(model), torch.tensor([[11, 12, 13, 14]] * 2)
    plain, wanted = logits(model), logits(model, torch.cat([before, ids], 1))[:, 4:]
    one, two = Edit([], {}, [context(11, 12)]), Edit([], {}, [context(13, lead=14)])
    one.apply(model)
    two.apply(model)
    assert (logits(model) - wanted).abs().max() < 1e-5
    padded = torch.nn.functional.pad(ids, (3, 0), value=0)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    with torch.no_grad():
        assert (model.token_logits(padded, mask)[:, 3:] - wanted).abs().max() < 1e-4
        at = torch.tensor([[2, 5]] * 2)
        assert (model.token_logits(ids, at=at) - wanted[:, [2, 5]]).abs().max() < 1e-5
    with pytest.raises(ModelError, match="in-context edit"):
        model.hidden_before(1, ids)
    if not model.denoises:
        with torch.no_grad():
            native = model.native(ids, labels=ids)
            left = model.native(input_ids=padded, attention_mask=mask).logits[:, 3:]
            one.undo(model)
            two.undo(model)
            whole = model.native(torch.cat([before, ids], 1)).logits[:, 4:]
        assert native.logits.shape == (2, 7, plain.shape[-1])
        assert (native.logits - whole).abs().max() < 1e-5 and (left - whole).abs().max() < 1e-4
    revert_all(model)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", ["llama", "llada", "sdar", "llada2"])
def test_generation_sees_the_context(tiny, family):
    """What is written is what would be written after both, with the model's own cache as well, and where
    blocks are counted from the row's first token.
    """
    model = tiny(family)
    ids, before = rows(model), torch.tensor([[11, 12, 13]] * 2)
    wanted = model.generate(torch.cat([before, ids], 1), max_new_tokens=4)[:, 3:]
    Edit([], {}, [context(11, 12, 13)]).apply(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4), wanted)


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_likelihoods_see_the_context(tiny, family):
    """A target is as likely as after both, where blocks are counted from the row's first token, too."""
    model = tiny(family)
    before, prompt, target = torch.tensor([11, 12, 13]), rows(model)[0], torch.tensor([5, 6, 7, 8])
    (wanted,) = log_likelihood(model, [torch.cat([before, prompt])], [target])
    Edit([], {}, [context(11, 12, 13)]).apply(model)
    (found,) = log_likelihood(model, [prompt], [target])
    assert found == pytest.approx(wanted, abs=1e-4)


def test_fifty_times_in_random_order(tiny):
    """Memories, contexts and changes of weights on one model, applied and taken back from anywhere."""
    model = tiny("llada")
    site, weight = model.site(1), dict(model.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(weight.shape[0], 1, generator=generator), torch.randn(1, weight.shape[1])
    side = {"threshold": 0.5, "density": 0.5, "merge": "ties"}
    key = {"keys": torch.randn(2, INNER), "values": torch.randn(2, WIDTH), "target": torch.tensor([3])}
    edits = [
        Edit([], {}, [memory(0, site=site.name)]),
        Edit([], {}, [memory(1, site=site.name)]),
        Edit([], {}, [Codebook(site.name, key, {"radius": 9.0})]),
        Edit([], {}, [SideMemory(site.name, {"delta": torch.randn(WIDTH, INNER)}, side)]),
        Edit([], {}, [SideMemory(site.name, {"delta": torch.randn(WIDTH, INNER)}, side)]),
        Edit([], {}, [context(11, 12)]),
        Edit([LowRank("model.layers.0.mlp.down_proj.weight", left, right)], {}),
    ]
    before, fingerprint, rng = logits(model), model_fingerprint(model), random.Random(0)
    said: dict[tuple[int, ...], torch.Tensor] = {}
    for _ in range(50):
        there = [edits.index(edit) for edit in carried(model)]
        number = rng.randrange(len(edits))
        if number in there:
            edits[number].undo(model)
        else:
            edits[number].apply(model)
        now = tuple(edits.index(edit) for edit in carried(model))
        assert torch.equal(said.setdefault(now, logits(model)), logits(model)), (
            "the same edits, the same model"
        )
    assert len(said) > 15
    revert_all(model)
    assert torch.equal(logits(model), before) and model_fingerprint(model) == fingerprint


def test_a_copy_of_the_model_has_its_own(tiny):
    """Taking an edit out of the model leaves its copy alone."""
    model = tiny("llada")
    before = logits(model)
    edit = Edit([], {}, [memory(0, site=model.site(1).name), context(11)])
    edit.apply(model)
    after, other = logits(model), copy.deepcopy(model)
    edit.undo(model)
    assert torch.equal(logits(model), before) and torch.equal(logits(other), after)
    revert_all(other)
    assert torch.equal(logits(other), before)


def test_files(tiny, tmp_path):
    """Saved, read and applied: the same; an older reader refuses the file; a broken one is named."""
    model = tiny("llada")
    key = {"keys": torch.randn(2, INNER), "values": torch.randn(2, WIDTH), "target": torch.tensor([3, 4])}
    parts = [
        memory(0, site=model.site(1).name),
        Codebook(model.site(2).name, key, {"radius": 2.0}),
        context(11),
    ]
    edit = Edit([], {"method": "several", "facts": []}, parts)
    edit.save(tmp_path / "edit", model)
    edit.apply(model)
    wanted = logits(model)
    edit.revert(model)
    again = Edit.load(tmp_path / "edit")
    again.apply(model)
    assert torch.equal(logits(model), wanted)
    both = Edit.compose([Edit([], {}, parts[:1]), Edit([], {}, parts[1:])])
    again.revert(model)
    both.apply(model)
    assert torch.equal(logits(model), wanted)
    told = json.loads((tmp_path / "edit" / "edit.json").read_text())
    assert told["format_version"] == 2 and [one["kind"] for one in told["attached"]] == [
        "residual memory", "codebook", "context"
    ]  # fmt: skip
    for broken in (
        [{"kind": "codebok"}], "x",
        [{**told["attached"][0], "settings": {"ridge": []}}], told["attached"][:2],
        [{**told["attached"][0], "settings": {}}, *told["attached"][1:]],
    ):  # fmt: skip
        (tmp_path / "edit" / "edit.json").write_text(json.dumps({**told, "attached": broken}))
        with pytest.raises(EditError):
            Edit.load(tmp_path / "edit")


def test_what_does_not_fit_changes_nothing(tiny, tmp_path):
    """Another model's sizes, a module that is not there, equal keys without a ridge, NaN; and forms that hold
    weights alone.
    """
    model = tiny("llada")
    before, site = logits(model), model.site(1).name
    wrong = memory(0, site=site)
    narrow = ResidualMemory(site, {k: v[:, :8] for k, v in wrong.tensors.items()}, wrong.settings)
    twice = {k: torch.cat([v, v]) for k, v in wrong.tensors.items()}
    for part, says in (
        (narrow, "takes 8 numbers"),
        (memory(0, site="model.nowhere"), "no module 'model.nowhere'"),
        (ResidualMemory(site, twice, {**wrong.settings, "ridge": 0.0}), "positive ridge"),
    ):
        with pytest.raises(EditError, match=says):
            Edit([], {}, [part]).apply(model)
        assert torch.equal(logits(model), before) and not carried(model)
    with pytest.raises(EditError, match="NaN"):
        ResidualMemory(site, {k: v * torch.nan for k, v in wrong.tensors.items()}, wrong.settings)
    with pytest.raises(EditError, match="settings"):
        ResidualMemory(site, wrong.tensors, {})
    edit = Edit([], {"method": "x"}, [wrong])
    with pytest.raises(EditError, match="not in the weights"):
        edit.to_peft(tmp_path / "adapter")
    edit.apply(model)
    with pytest.raises(EditError, match="a model folder cannot hold it"):
        write_model(model, tmp_path, tmp_path / "model")


def test_a_context_that_leaves_no_room(tiny):
    """More tokens than the model has positions for."""
    model = tiny("gpt2")
    Edit([], {}, [context(*range(5, 5 + model.max_positions - 3))]).apply(model)
    with pytest.raises(ModelError, match="has 128 positions"):
        logits(model)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("residual memory", {"residuals": torch.zeros(2, WIDTH)}, "equally many rows"),
        ("residual memory", {"keys": torch.zeros(INNER)}, "equally many rows"),
        ("residual memory", {"ridge": "much"}, "ridge='much'"),
        ("residual memory", {"alpha": True}, "alpha=True"),
        ("codebook", {"values": torch.zeros(1, WIDTH)}, "equally many rows"),
        ("codebook", {"target": torch.zeros(2)}, "no token ids"),
        ("codebook", {"radius": -1.0}, "radius=-1"),
        ("codebook", {"radius": float("inf")}, "radius=inf"),
        ("context", {"fact": torch.tensor([[1]])}, "no token ids"),
        ("context", {"lead": torch.tensor([-1])}, "no token ids"),
    ],
)
def test_parts_that_do_not_belong_together(kind, change, says):
    """A file may say anything: shapes, token ids and settings are looked at before they are used."""
    made = {
        "residual memory": memory(0),
        "codebook": Codebook(
            "m",
            {"keys": torch.zeros(2, INNER), "values": torch.zeros(2, WIDTH), "target": torch.tensor([1])},
            {"radius": 1.0},
        ),
        "context": context(11),
    }[kind]
    tensors = {name: change.get(name, value) for name, value in made.tensors.items()}
    settings = {name: change.get(name, value) for name, value in made.settings.items()}
    with pytest.raises(EditError) as caught:
        type(made)(made.module, tensors, settings)
    assert says in str(caught.value)


def test_tokens_that_the_model_does_not_have(tiny):
    """A context of another vocabulary is refused before it is put in."""
    model = tiny("llada")
    before = logits(model)
    with pytest.raises(EditError, match="its context has token 999999"):
        Edit([], {}, [context(11, 999999)]).apply(model)
    assert not carried(model) and torch.equal(logits(model), before)
