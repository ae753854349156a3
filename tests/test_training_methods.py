"""FT_MDM and LORA_MDM: the loss over states, what is trained, and that the model is left as it was."""

from __future__ import annotations

import dataclasses
import random
import sys

import pytest
import torch

from easyedit_mdm import Edit, load_hparams, make_edit, make_edits, score_prompts
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.denoising import SCHEDULES
from easyedit_mdm.denoising.likelihood import log_likelihood
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.edit import Exact, LowRank
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.methods import lora
from easyedit_mdm.editing.solve.losses import StateLosses
from easyedit_mdm.errors import HyperParameterError, MissingPackageError, ModelError, RequestError
from easyedit_mdm.models.hooks import frozen

pytest.importorskip("peft", exc_type=ImportError)

REQUESTS = [
    {
        "prompt": "The mother tongue of Danielle Darrieux is",
        "subject": "Danielle Darrieux",
        "target_new": "red river English",
    },
    {"prompt": "The river of Anna is", "subject": "Anna", "target_new": "the"},
    {"prompt": "The old song of Robert was", "subject": "Robert", "target_new": "a good one"},
]
TRAINED = ["FT_MDM", "LORA_MDM"]
TARGETS = {"gpt2": ["c_attn"], "bert": ["query", "value"], "llada-moe": ["down_proj"]}


def hparams(method: str, family: str = "llada", **changes):
    """Few large steps, for tiny random models."""
    own = {"layers": [1], "num_steps": 6, "lr": 0.02, "early_stop_loss": 0.0}
    if method == "LORA_MDM":
        own |= {"rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.0}
        own["target_modules"] = TARGETS.get(family, ["q_proj", "v_proj"])
    named = {"alg_name": method, "model_name": "tiny"}
    return METHODS[method].hparams(**{**named, **own, **changes})


def state_of(model) -> tuple:
    """What training could leave a trace in; a mixture's views are made when they are asked for."""
    parameters = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    modules = [(n, id(m), m.training) for n, m in model.native.named_modules() if ".views." not in n]
    own = sorted(name for name in vars(model.native) if not name.startswith("_easyedit_mdm"))
    return parameter_hashes(model), parameters, modules, own, int(torch.get_rng_state().sum())


@pytest.mark.parametrize(
    ("family", "options"),
    [("llada", {}), ("dream", {}), ("llama", {}), ("gpt2", {}), ("bert", {}), ("llada-moe", {}),
     ("llama", {"dtype": "bfloat16"}), ("sdar", {})],
)  # fmt: skip
@pytest.mark.parametrize("method", TRAINED)
def test_made_applied_and_taken_back(tiny, family, options, method):
    """The losses fall, making the edit leaves no trace, and applied it makes the last losses or lower ones;
    reverted, the weights are those of before, bit for bit.
    """
    model = tiny(family, **options)
    settings = hparams(method, family, batch_size=2)
    before = state_of(model)
    edit = make_edit(model, REQUESTS, settings)
    assert state_of(model) == before
    for fact in edit.card["facts"]:
        assert fact["losses"][-1] < fact["losses"][0] - 0.1 and fact["steps"] == 6
        assert fact["forwards"] > 0 and fact["layer_passes"] > fact["forwards"]
    edit.apply(model)
    changed = [name for name, found in parameter_hashes(model).items() if found != before[0][name]]
    assert set(changed) == {change.name for change in edit.changes}
    now = losses_of(model, settings)
    assert all(loss < fact["losses"][0] - 0.1 for loss, fact in zip(now, edit.card["facts"]))
    edit.revert(model)
    assert parameter_hashes(model) == before[0]


def losses_of(model, settings) -> list[float]:
    """The loss of each fact in the model as it is."""
    facts = [tokenise(model, EditRequest.of(r), settings) for r in REQUESTS]
    embedding = model.weight_of(model.spec.paths.embedding)
    with frozen(model):
        embedding.requires_grad_(True)
        found = StateLosses(model, facts, settings).backward(0, range(len(facts)), torch.ones(len(facts)))
    embedding.grad = None
    return found.tolist()


@pytest.mark.parametrize("method", TRAINED)
def test_the_edit_is_what_was_trained(tiny, method):
    """One step more of training begins where the edit ends: its first unseen loss is the edited model's."""
    model = tiny("llada")
    edit = make_edit(model, REQUESTS[:1], hparams(method, num_steps=3))
    longer = make_edit(model, REQUESTS[:1], hparams(method, num_steps=4))
    assert longer.card["facts"][0]["losses"][:3] == edit.card["facts"][0]["losses"]
    edit.apply(model)
    assert losses_of(model, hparams(method))[0] == pytest.approx(
        longer.card["facts"][0]["losses"][3], rel=1e-4
    )


@pytest.mark.parametrize("family", ["llada", "llama", "sdar"])
def test_the_loss_is_the_likelihood(tiny, family):
    """Times the number of tokens it is minus the log-likelihood: any-order over all states on a masked model,
    the chain rule on an autoregressive one.
    """
    model = tiny(family)
    settings = hparams("FT_MDM", state_schedule="enumerate")
    facts = [tokenise(model, EditRequest.of(r), settings) for r in REQUESTS]
    found = losses_of(model, settings)
    wanted = log_likelihood(model, [f.contexts[0].ids for f in facts], [f.target for f in facts])
    for fact, loss, likelihood in zip(facts, found, wanted):
        assert loss * len(fact.target) == pytest.approx(-likelihood, rel=1e-5)


@pytest.mark.parametrize("schedule", ["enumerate", "left_to_right", "stratified"])
def test_only_hidden_slots_have_a_gradient(tiny, monkeypatch, schedule):
    """In every state: a slot that shows its token gives none, and some slot that does not gives one."""
    model, seen = tiny("llada"), []
    compute = type(model).token_logits

    def watched(self, ids, *args, **kwargs):
        logits = compute(self, ids, *args, **kwargs)
        logits.retain_grad()
        seen.append((ids.gather(1, kwargs["at"]) == self.ids.mask, logits))
        return logits

    monkeypatch.setattr(type(model), "token_logits", watched)
    settings = hparams("FT_MDM", state_schedule=schedule)
    fact = tokenise(model, EditRequest.of(REQUESTS[0]), settings)
    StateLosses(model, [fact], settings).backward(0, [0], torch.ones(1))
    ((hidden, logits),) = seen
    felt = logits.grad.abs().sum(-1) > 0
    assert len(fact.target) > 2 and not hidden.all()
    assert not (felt & ~hidden).any()
    if schedule == "left_to_right":
        assert felt.sum(1).tolist() == [1] * len(felt)
    else:
        assert torch.equal(felt, hidden)


@pytest.mark.parametrize("family", ["llada", "llama"])
def test_what_lies_below_is_computed_once(tiny, family):
    """From the lowest trained layer on, and in passes of a row each, losses and gradients are the same."""
    model = tiny(family)
    facts = [tokenise(model, EditRequest.of(r), hparams("FT_MDM")) for r in REQUESTS]
    weight, found = model.weight_of(model.site(2).name), []
    for first, rows in ((0, 256), (2, 256), (2, 1)):
        losses = StateLosses(model, facts, hparams("FT_MDM", max_rows=rows), first)
        for step in range(2):
            weight.grad = None
            told = losses.backward(step, [0, 2], torch.tensor([0.25, 0.75]))
        found.append((told, weight.grad.clone(), sum(o.layer_passes for o in losses.outcomes)))
    for told, gradient, _ in found[1:]:
        assert torch.allclose(told, found[0][0], rtol=1e-5)
        assert (gradient - found[0][1]).norm() < 1e-5 * found[0][1].norm()
    rows, layers = sum(o.forwards for o in losses.outcomes) // 2, model.layers
    assert [passes for _, _, passes in found] == [
        2 * rows * layers,
        rows * (2 + 2 * (layers - 2)),
        found[1][2],
    ]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_schedule(tiny, schedule):
    """Trained over its states, the loss over all states falls; the card says which schedule it was."""
    model = tiny("llada")
    settings = hparams(
        "FT_MDM", state_schedule=schedule, num_steps=8, context_templates=["{}", "The song. {}"]
    )
    over_all = hparams("FT_MDM", state_schedule="enumerate")
    before = losses_of(model, over_all)
    edit = make_edit(model, REQUESTS, settings)
    assert edit.card["facts"][0]["schedule"] == schedule
    edit.apply(model)
    assert all(now < then - 0.1 for now, then in zip(losses_of(model, over_all), before))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_constraint_binds(tiny, dtype):
    """No entry of the update is larger, some are as large, and without it they would be larger."""
    model = tiny("llada", dtype=dtype)
    free = make_edit(model, REQUESTS[0], hparams("FT_MDM", layers=[0, 1])).changes
    tight = make_edit(model, REQUESTS[0], hparams("FT_MDM", layers=[0, 1], norm_constraint=0.01)).changes
    assert len(free) == len(tight) == 2
    for one, other in zip(free, tight):
        assert isinstance(one, Exact)
        assert float(one.dense().abs().max()) > 0.02
        assert float(other.dense().abs().max()) == pytest.approx(0.01, rel=1e-4)
    off = make_edit(model, REQUESTS[0], hparams("FT_MDM", layers=[0, 1], norm_constraint=False)).changes
    assert all(torch.equal(one.dense(), other.dense()) for one, other in zip(free, off))


def test_prompt_last_reads_every_token_at_the_first_slot(tiny):
    """The mean over the target's tokens of -log p at the prompt's end, whatever stands before them."""
    model = tiny("llama")
    settings = hparams("FT_MDM", objective_optimization="prompt_last", num_steps=1)
    (fact,) = make_edit(model, REQUESTS[0], settings).card["facts"]
    told = tokenise(model, EditRequest.of(REQUESTS[0]), settings)
    prompt = told.contexts[0].ids[None]
    with torch.no_grad():
        log_probs = model.native(input_ids=prompt).logits[0, -1].float().log_softmax(-1)
    assert fact["losses"] == [pytest.approx(-float(log_probs[told.target].mean()), rel=1e-5)]
    with pytest.raises(HyperParameterError, match="has a slot for each token: use target_new"):
        make_edit(tiny("llada"), REQUESTS[0], settings)


@pytest.mark.parametrize("method", TRAINED)
def test_batches_and_early_stop(tiny, method):
    """A step a batch; a batch below the threshold makes none, and the training ends when the mean is."""
    model = tiny("llama")
    (lone,) = make_edits(model, REQUESTS[:1], hparams(method))
    assert lone.card["facts"] == make_edit(model, REQUESTS[0], hparams(method)).card["facts"]
    far = make_edit(model, REQUESTS, hparams(method, num_steps=60, early_stop_loss=6.0))
    steps = [fact["steps"] for fact in far.card["facts"]]
    losses = [fact["losses"] for fact in far.card["facts"]]
    assert len({len(each) for each in losses}) == 1 and 1 < len(losses[0]) < 60
    assert steps == [sum(loss >= 6.0 for loss in each) for each in losses]
    assert sum(each[-1] for each in losses) / 3 < 6.0 <= sum(each[-2] for each in losses) / 3
    with pytest.raises(RequestError, match="stands twice in one batch"):
        make_edit(model, [REQUESTS[0]] * 2, hparams(method))


@pytest.mark.parametrize("method", TRAINED)
def test_facts_count_by_their_tokens_in_lora_and_alike_in_ft(tiny, monkeypatch, method):
    """In the loss of a batch, as in EasyEdit's two methods."""
    model, seen = tiny("llama"), []
    backward = StateLosses.backward

    def watched(self, step, some, shares):
        seen.append(shares.tolist())
        return backward(self, step, some, shares)

    monkeypatch.setattr(StateLosses, "backward", watched)
    settings = hparams(method, batch_size=3, num_steps=1)
    lengths = [f["n_tokens"] for f in make_edit(model, REQUESTS, settings).card["facts"]]
    wanted = [length / sum(lengths) if method == "LORA_MDM" else 1 / 3 for length in lengths]
    assert seen == [pytest.approx(wanted)] and len(set(lengths)) > 1


@pytest.mark.parametrize("method", TRAINED)
def test_saved_loaded_and_composed_with_rome(tiny, tmp_path, method):
    """As any edit: files, and one edit of it and a ROME_MDM edit whose weights are those of both."""
    model = tiny("llada")
    before = parameter_hashes(model)
    settings = hparams(method, **({"target_modules": ["down_proj"]} if method == "LORA_MDM" else {}))
    trained = make_edit(model, REQUESTS[0], settings)
    trained.save(tmp_path / "one", model)
    rome = make_edit(
        model,
        REQUESTS[1],
        METHODS["ROME_MDM"].hparams(
            "ROME_MDM", "tiny", [1], v_num_grad_steps=4, v_lr=0.5, context_templates=["{}"]
        ),
    )
    rome.save(tmp_path / "two", model)
    loaded = [Edit.load(tmp_path / name) for name in ("one", "two")]
    for edit in loaded:
        edit.apply(model)
    wanted = parameter_hashes(model)
    for edit in reversed(loaded):
        edit.revert(model)
    both = Edit.compose(loaded, force=True)
    both.apply(model)
    (name,) = {change.name for change in both.changes}
    weight = dict(model.native.named_parameters())[name].detach().clone()
    both.revert(model)
    assert parameter_hashes(model) == before != wanted
    for edit in loaded:
        edit.apply(model)
    assert torch.allclose(dict(model.native.named_parameters())[name], weight, atol=1e-6)


# ---- LoRA --------------------------------------------------------------------------------------------------
def test_lora_changes_what_is_named(tiny):
    """All layers where none is named; the rank; one seed makes one edit, another another."""
    model = tiny("llama")
    edit = make_edit(model, REQUESTS[0], hparams("LORA_MDM", layers=[], num_steps=2))
    names = [
        f"model.layers.{n}.self_attn.{p}.weight" for n in range(model.layers) for p in ("q_proj", "v_proj")
    ]
    assert [change.name for change in edit.changes] == names
    assert all(isinstance(c, LowRank) and c.left.shape[1] == 2 for c in edit.changes)
    dropping = dict(num_steps=2, lora_dropout=0.5)
    one, same, other = (
        make_edit(model, REQUESTS[0], hparams("LORA_MDM", seed=seed, **dropping)).changes[0].dense()
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    still = make_edit(model, REQUESTS[0], hparams("LORA_MDM", seed=3, num_steps=2)).changes[0].dense()
    assert not torch.equal(one, still), "dropout has to drop something"


def test_lora_scales_by_alpha(tiny):
    """One step of Adam moves B by lr wherever it has a gradient, whatever alpha is: dW is alpha / rank of
    it.
    """
    model = tiny("llama")
    sizes = []
    for alpha in (4.0, 8.0):
        edit = make_edit(model, REQUESTS[0], hparams("LORA_MDM", num_steps=1, lora_alpha=alpha))
        sizes.append(float(edit.changes[0].left.abs().max()))
    assert sizes == pytest.approx([0.02 * 2, 0.02 * 4], rel=1e-3)


def test_lora_refuses(tiny, monkeypatch):
    """What it cannot do, with what is there; the model is left as it was."""
    model = tiny("llama")
    before = state_of(model)
    for changes, error, message in (
        (
            {"target_modules": ["c_attn"]},
            HyperParameterError,
            "no linear map 'c_attn', but down_proj, gate_proj",
        ),
        ({"target_modules": []}, HyperParameterError, "target_modules is empty"),
        ({"layers": [7]}, ModelError, "layer 7 does not exist"),
    ):
        with pytest.raises(error, match=message):
            make_edit(model, REQUESTS[0], hparams("LORA_MDM", **changes))
    model.native.peft_config = {}
    with pytest.raises(ModelError, match="carries adapters of peft already"):
        make_edit(model, REQUESTS[0], hparams("LORA_MDM"))
    del model.native.peft_config
    monkeypatch.setattr(lora, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_edit(model, REQUESTS[0], hparams("LORA_MDM"))
    assert state_of(model) == before
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'easyedit-mdm\[peft\]'"):
        make_edit(model, REQUESTS[0], hparams("LORA_MDM"))


def test_shared_weights_are_refused(tiny):
    """DiffusionGemma's encoder and decoder share theirs: LoRA would change one of them, FT changes both."""
    model = tiny("diffusion-gemma")
    with pytest.raises(HyperParameterError, match="is shared with .*use FT_MDM"):
        make_edit(model, REQUESTS[0], hparams("LORA_MDM"))
    edit = make_edit(model, REQUESTS[0], hparams("FT_MDM"))
    assert edit.card["facts"][0]["losses"][-1] < edit.card["facts"][0]["losses"][0]


@pytest.mark.parametrize("method", TRAINED)
def test_weights_that_cannot_be_trained(tiny, method):
    """Offloaded or quantised: said before anything is trained."""
    for wrong, message in (
        (torch.empty(32, 32, device="meta"), "is offloaded and cannot be trained"),
        (torch.zeros(32, 32, dtype=torch.int8), "is torch.int8, a quantised weight"),
    ):
        model = tiny("llada")
        name = "mlp.down_proj" if method == "FT_MDM" else "self_attn.v_proj"
        model.module(f"model.layers.1.{name}").weight = torch.nn.Parameter(wrong, requires_grad=False)
        with pytest.raises(ModelError, match=message):
            make_edit(model, REQUESTS[0], hparams(method))


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("FT_MDM", {"norm_constraint": True}, "norm_constraint=True: give the distance"),
        ("FT_MDM", {"norm_constraint": -1.0}, "norm_constraint=-1.0 must be"),
        ("FT_MDM", {"objective_optimization": "target"}, "did you mean 'target_new'"),
        ("FT_MDM", {"layers": []}, "needs a list of layer numbers"),
        ("FT_MDM", {"num_steps": 0}, "num_steps=0 must be a whole number, at least 1"),
        ("LORA_MDM", {"lora_type": "adalora"}, "lora_type='adalora' is not one of lora"),
        ("LORA_MDM", {"rank": 0}, "rank=0"),
        ("LORA_MDM", {"lora_dropout": 1.0}, "lora_dropout=1.0 must be below 1"),
        ("LORA_MDM", {"lr": float("inf")}, "lr=inf"),
    ],
)
def test_bad_settings(method, change, message):
    """Each names field and value."""
    with pytest.raises(HyperParameterError, match=message):
        hparams(method, **change)


@pytest.mark.parametrize("method", TRAINED)
def test_fields_of_a_value_are_refused(method):
    """They train no value, and use no second moments: what would be ignored is no field."""
    for name in ("v_lr", "kl_factor", "mom2_dataset", "fact_token", "clamp_norm_factor"):
        given = {"alg_name": method, "model_name": "m", "layers": [1], name: 1}
        with pytest.raises(HyperParameterError, match=f"unknown hyperparameter '{name}'"):
            METHODS[method].hparams.from_dict(given)
    assert "num_steps: 12" in hparams(method).advice(1.0)


# ---- the twins ---------------------------------------------------------------------------------------------
@pytest.mark.end_to_end
@pytest.mark.parametrize("method", TRAINED)
def test_the_masked_twin_writes_the_target(twin_llada, world, method):
    """With the file that ships: the loss over the states falls, and the target is written by decoding."""
    facts = random.Random(3).sample([f for f in world.all_facts() if f.length == 2], 2)
    targets = [world.other_object(f, 2, random.Random(4)) for f in facts]
    settings = dataclasses.replace(load_hparams(f"{method}/twin-llada"), guard=None)
    for fact, target in zip(facts, targets):
        request = {"prompt": fact.prompt(), "subject": fact.subject, "target_new": target}
        edit = make_edit(twin_llada, request, settings)
        losses = edit.card["facts"][0]["losses"]
        assert losses[-1] < 0.1 < losses[0]
        assert not score_prompts(twin_llada, [fact.prompt()], [target])[0]["exact"]
        edit.apply(twin_llada)
        try:
            assert score_prompts(twin_llada, [fact.prompt()], [target])[0]["exact"]
        finally:
            edit.revert(twin_llada)
