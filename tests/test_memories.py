"""Methods whose edits change no weight, on every family and both paradigms: GRACE_MDM, IKE_MDM and
TimeROME-style. Against EasyEdit's GRACE on an autoregressive model: the same losses, keys and values.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from test_batch_methods import REQUESTS

from easyedit_mdm import Session, make_edit, make_edits, score_prompts
from easyedit_mdm.cli import main
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.editing import METHODS, Edit
from easyedit_mdm.editing.edit import carried
from easyedit_mdm.editing.edit.attached import Codebook, ResidualMemory
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.replaced import replacing_values
from easyedit_mdm.editing.solve.sites import one_map
from easyedit_mdm.errors import EasyEditMDMError, HyperParameterError, ModelError, RequestError
from easyedit_mdm.host import import_easyedit
from easyedit_mdm.models import FAMILIES

WEIGHTLESS = ["GRACE_MDM", "IKE_MDM", "TimeROME-style"]


def hparams(method: str, **changes):
    """Settings for tiny random models."""
    own = {
        "GRACE_MDM": {"layers": [1], "n_iter": 12, "edit_lr": 0.5, "eps": 0.01},
        "IKE_MDM": {},
        "TimeROME-style": {
            "layers": [1], "v_num_grad_steps": 12, "v_lr": 0.5, "v_weight_decay": 1e-3,
            "clamp_norm_factor": 10.0, "context_templates": ["{}"],
        },
    }[method]  # fmt: skip
    return METHODS[method].hparams(**{"alg_name": method, "model_name": "tiny", **own, **changes})


def likelihood(model, request) -> float:
    """Mean log-probability of the target's tokens, nothing of it revealed (or teacher-forced)."""
    made = EditRequest.of(request)
    fact = tokenise(model, made, hparams("GRACE_MDM"))
    prompt, target = fact.contexts[0].ids, fact.target
    row = torch.cat([prompt, model.behind(target, torch.zeros(len(target), dtype=torch.bool))])[None]
    at = torch.arange(len(prompt), len(prompt) + len(target))[None]
    with torch.no_grad():
        logits = model.token_logits(row, at=at, canvas=torch.tensor([len(prompt)]))
    return float(logits.log_softmax(-1)[0, torch.arange(len(target)), target].mean())


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("method", WEIGHTLESS)
def test_edit_apply_undo_save(tiny, family, method, tmp_path):
    """Made without a trace, in force when applied, taken back, and the same from its folder."""
    model = tiny(family)
    before = model_fingerprint(model)
    try:
        edit = make_edit(model, REQUESTS[0], hparams(method))
    except EasyEditMDMError as error:
        refused = (method == "IKE_MDM" and model.spec.noised) or (
            method != "IKE_MDM" and model.site(1).routed
        )
        assert refused and isinstance(error, (ModelError, HyperParameterError)), error
        return
    assert model_fingerprint(model) == before and not edit.changes
    was = likelihood(model, REQUESTS[0])
    edit.apply(model)
    now = likelihood(model, REQUESTS[0])
    if method == "GRACE_MDM":
        assert now > was + 0.1
    else:
        # a random model reads nothing in its context; and where keys lie close, a memory without second
        # moments adds as much elsewhere
        assert abs(now - was) > 1e-3
    assert model_fingerprint(model) == before
    edit.revert(model)
    assert likelihood(model, REQUESTS[0]) == was
    edit.save(tmp_path / "edit", model)
    again = Edit.load(tmp_path / "edit")
    again.apply(model)
    assert likelihood(model, REQUESTS[0]) == now and again.card["method"] == method


@pytest.mark.parametrize("family", ["dream", "llama"])
def test_several_facts_are_written_together(tiny, family):
    """One edit of three facts, the same facts one after the other, and one of them taken back."""
    model = tiny(family)
    before = [likelihood(model, request) for request in REQUESTS]
    together = make_edit(model, REQUESTS, hparams("GRACE_MDM"))
    together.apply(model)
    assert all(likelihood(model, r) > was + 0.1 for r, was in zip(REQUESTS, before))
    together.undo(model)
    with Session(model, hparams("GRACE_MDM")) as session:
        edits = [session.edit([request])[0] for request in REQUESTS]
        assert all(likelihood(model, r) > was + 0.1 for r, was in zip(REQUESTS, before))
        session.undo(edits[1])
        assert (
            likelihood(model, REQUESTS[0])
            > before[0] + 0.1
            < likelihood(model, REQUESTS[2]) - before[2] + 0.2
        )
        assert len(session.edits) == 2
    assert [likelihood(model, request) for request in REQUESTS] == before
    each = make_edits(model, REQUESTS, hparams("GRACE_MDM"))
    for one, request in zip(each, REQUESTS, strict=True):
        alone = make_edit(model, request, hparams("GRACE_MDM"))
        for ours, theirs in zip(one.attached, alone.attached, strict=True):
            for name, value in ours.tensors.items():
                assert (value - theirs.tensors[name]).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llada", "llama"])
def test_grace_stops_where_the_loss_is_low_enough(tiny, family):
    """Each fact of an edit ends at its own step, with the value that it has alone after so many steps."""
    model = tiny(family)
    whole = make_edit(model, REQUESTS, hparams("GRACE_MDM", n_iter=30))
    enough = max(sum(fact["losses"][-10:]) / 10 for fact in whole.card["facts"])
    ended = make_edit(model, REQUESTS, hparams("GRACE_MDM", n_iter=30, early_stop_loss=enough))
    steps = [fact["steps"] for fact in ended.card["facts"]]
    assert len(set(steps)) > 1 and max(steps) < 30, "at different steps, and all of them"
    for request, part, n, told in zip(REQUESTS, ended.attached, steps, ended.card["facts"], strict=True):
        assert len(told["losses"]) == n + 1
        alone = make_edit(model, request, hparams("GRACE_MDM", n_iter=n))
        for name, value in part.tensors.items():
            assert (value - alone.attached[0].tensors[name]).abs().max() < 1e-4
    passes = [sum(fact["layer_passes"] for fact in edit.card["facts"]) for edit in (ended, whole)]
    assert passes[0] < passes[1], "no pass is made for a fact that is done"


def test_grace_gives_the_value_in_place_of_the_output(tiny):
    """The losses are those of the model with the value in place; they fall; the last one is what the edited
    model has.
    """
    model = tiny("dream")
    settings = hparams("GRACE_MDM", state_schedule="full_mask", n_iter=8)
    site, fact = one_map(model, settings), tokenise(model, EditRequest.of(REQUESTS[0]), settings)
    edit = make_edit(model, REQUESTS[0], settings)
    book = edit.attached[0]
    assert isinstance(book, Codebook)
    losses = edit.card["facts"][0]["losses"]
    assert losses[0] == pytest.approx(-likelihood(model, REQUESTS[0]), rel=1e-4), "warm: the model's own"
    assert losses[-1] < losses[0] - 0.1 and len(losses) == 8
    edit.apply(model)
    assert likelihood(model, REQUESTS[0]) > -losses[-1], "one step further than the last loss"
    edit.undo(model)
    _, (outcome,) = replacing_values(model, site, [fact], book.tensors["values"], settings, 1, 0.0)
    edit.apply(model)
    assert outcome.losses[0] == pytest.approx(-likelihood(model, REQUESTS[0]), rel=1e-4)


def test_grace_keeps_a_key_for_each_state(tiny):
    """`per_state`: 2^n - 1 keys for n tokens in a model that sees both sides, one in a causal one."""
    for family, number in (("llada", 7), ("llama", 1)):
        edit = make_edit(tiny(family), REQUESTS[0], hparams("GRACE_MDM", key_states="per_state"))
        tensors = edit.attached[0].tensors
        assert len(tensors["target"]) == 3
        assert len(tensors["keys"]) == len(tensors["values"]) == number
        assert len({tuple(key.tolist()) for key in tensors["keys"]}) == number
        assert len({tuple(value.tolist()) for value in tensors["values"]}) == 1


def test_grace_in_every_state(tiny):
    """Optimised over all states, the target is likelier over them than from full masks alone."""
    model, mean = tiny("llada"), {}
    for schedule in ("full_mask", "enumerate", "stratified", "on_policy"):
        settings = hparams("GRACE_MDM", state_schedule=schedule, n_iter=40, key_states="per_state")
        with Session(model, settings) as session:
            session.edit([REQUESTS[0]])
            fact = tokenise(model, EditRequest.of(REQUESTS[0]), settings)
            row = torch.cat([fact.contexts[0].ids, fact.target])
            found = []
            for hidden in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
                places = torch.tensor(hidden) + len(fact.contexts[0].ids)
                masked = row.clone()
                masked[places] = model.ids.mask
                with torch.no_grad():
                    logits = model.token_logits(masked[None], at=places[None])[0].log_softmax(-1)
                found.append(float(logits[torch.arange(len(hidden)), row[places]].mean()))
            mean[schedule] = sum(found) / len(found)
    assert min(mean["enumerate"], mean["stratified"]) > mean["full_mask"] and len(mean) == 4


def test_the_memory_has_the_value_at_the_key(tiny):
    """With a small ridge and all entries, what is recalled at a fact's key is its delta."""
    model = tiny("llada")
    edit = make_edit(model, REQUESTS, hparams("TimeROME-style", ridge=1e-9))
    (part,) = edit.attached
    assert isinstance(part, ResidualMemory)
    answer = ResidualMemory.joined([part])
    recalled = answer(part.tensors["keys"], torch.zeros_like(part.tensors["residuals"]))
    residuals = part.tensors["residuals"]
    assert (recalled - residuals).norm() < 1e-3 * residuals.norm()
    assert len(residuals) == 3


def test_in_context(tiny, tokenizer):
    """What stands before the rows, to the token; what it costs; several facts; demonstrations first."""
    model = tiny("llada")
    shown = [{"prompt": "The song of Ben is", "target_new": "old"}]
    settings = hparams("IKE_MDM", demonstrations=shown)
    before = model_fingerprint(model)
    one, two = (make_edit(model, [request], settings) for request in REQUESTS[:2])
    text = (
        "New Fact: The song of Ben is old\nPrompt: The song of Ben is old\n\n"
        "New Fact: The mother tongue of Danielle Darrieux is red river\nNew Fact: The river of Anna is the\n"
    )
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, "Prompt: ")]
    prompts, answers = [r["prompt"] for r in REQUESTS], [r["target_new"] for r in REQUESTS]
    row = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        wanted = model.token_logits(torch.tensor([sum(ids, [])]).repeat(1, 1), None).shape[1]
        whole = model.token_logits(torch.cat([torch.tensor([sum(ids, [])]), row], 1))[:, wanted:]
    one.apply(model)
    two.apply(model)
    with torch.no_grad():
        assert (model.token_logits(row) - whole).abs().max() < 1e-5
    assert len(score_prompts(model, prompts, answers, settings.decode_config())) == 3
    assert (
        one.card["context_tokens"] + len(one.attached[0].tensors["fact"])
        <= sum(map(len, ids)) + len(ids[1]) + 40
    )
    rome = METHODS["ROME_MDM"].hparams(
        alg_name="ROME_MDM", model_name="tiny", layers=[1], v_num_grad_steps=2, context_templates=["{}"]
    )
    made = make_edit(model, REQUESTS[2], rome)
    one.undo(model)
    two.undo(model)
    again = make_edit(model, REQUESTS[2], rome)
    assert torch.equal(made.changes[0].dense(), again.changes[0].dense()), "made without the context"
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("GRACE_MDM", {"val_init": "hot"}, "val_init='hot'"),
        ("GRACE_MDM", {"n_iter": 0}, "n_iter=0"),
        ("GRACE_MDM", {"eps": -1.0}, "eps=-1"),
        ("GRACE_MDM", {"key_states": "average"}, "key_states='average'"),
        ("GRACE_MDM", {"layers": [1, 2]}, "one layer"),
        ("IKE_MDM", {"layers": [1]}, "edits no layer"),
        ("IKE_MDM", {"fact": "{prompt}"}, "must hold {prompt} and {target}"),
        ("IKE_MDM", {"demonstrations": [{"prompt": "x"}]}, "needs a prompt and a target_new"),
        ("TimeROME-style", {"top_q": 0.0}, "top_q=0.0 must lie above 0"),
        ("TimeROME-style", {"top_q": 1.5}, "at most 1"),
        ("TimeROME-style", {"ridge": -1}, "ridge=-1"),
        ("TimeROME-style", {"mom2_adjustment": True, "mom2_dataset": "twins"}, "uses no second moments"),
    ],
)
def test_bad_values(method, change, says):
    """Each names field and value."""
    with pytest.raises(HyperParameterError) as caught:
        hparams(method, **change)
    assert says in str(caught.value)


def test_bad_requests(tiny):
    """Two targets for one prompt."""
    model = tiny("llada")
    twice = [REQUESTS[0], {**REQUESTS[0], "target_new": "the"}]
    for method in WEIGHTLESS:
        with pytest.raises(RequestError, match="two targets"):
            make_edit(model, twice, hparams(method))
    assert not carried(model)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_grace_equals_easyedit(tiny, family):
    """The same losses step by step, the same key and value, as EasyEdit's GRACE finds from the same start."""
    if os.environ.get("ORACLE_FORM") != "head":
        pytest.skip("only EasyEdit's head has GRACE: test_grace_equals_the_head")
    import_easyedit()
    main = importlib.import_module("easyeditor.models.grace.GRACE")
    tools = importlib.import_module("easyeditor.models.grace.utils")
    settings = importlib.import_module("easyeditor.models.grace.grace_hparams").GraceHyperParams(
        edit_lr=0.3, n_iter=10, eps=0.5, dist_fn="euc", val_init="warm", val_train="sgd", val_reg=None,
        reg="early_stop", replacement="replace_last", eps_expand="coverage", num_pert=8, dropout=0.0,
        inner_params=["model.layers[1].mlp.down_proj.weight"], device="cpu", alg_name="GRACE",
        model_name="tiny",
    )  # fmt: skip
    model = tiny(family)
    ours = make_edit(model, REQUESTS[0], hparams("GRACE_MDM", edit_lr=0.3, n_iter=10, eps=0.5))
    native = tiny(family).native
    editor = main.GRACE(settings, native, "cpu")
    tokens = tools.tokenize(dict(REQUESTS[0]), model.tokenizer, "cpu")
    editor.edit(settings, tokens, 0)
    theirs = native.model.layers[1].mlp.down_proj
    losses = torch.tensor([float(loss) for loss in editor.losses])
    found = torch.tensor(ours.card["facts"][0]["losses"])
    assert losses[-1] < losses[0] - 0.1
    assert (losses - found).abs().max() < 1e-4
    book = ours.attached[0].tensors
    assert (theirs.keys - book["keys"]).norm() < 1e-4 * book["keys"].norm()
    assert (theirs.values - book["values"]).norm() < 1e-4 * book["values"].norm()
    ours.apply(model)
    prompt = tools.tokenize(dict(REQUESTS[0]), model.tokenizer, "cpu", test=True)
    theirs.key_id = -1
    with torch.no_grad():
        there = native(input_ids=prompt["input_ids"]).logits[:, -1]
        here = model.native(input_ids=prompt["input_ids"]).logits[:, -1]
    assert (there - here).abs().max() < 1e-3, "and the edited models say the same after the prompt"


@pytest.mark.easyedit_head
@pytest.mark.end_to_end
def test_grace_equals_the_head(oracle_on_the_head):
    """Against the repository's head, in a process of its own: two forms cannot be imported into one."""
    oracle_on_the_head(__file__, 2)


def test_the_command_line(tmp_path, capsys):
    """`edit`, `diff` and `verify` of an edit without weights; what holds weights alone refuses it."""
    saved = str(tmp_path / "edit")
    fact = ["--prompt", "Tamos Latre was born in", "--subject", "Tamos Latre", "--target", "Zopago Zemo"]
    assert main(["edit", "--hparams", "GRACE_MDM/twin-llada", *fact, "--save", saved]) == 0
    capsys.readouterr()
    assert main(["diff", saved]) == 0
    assert "codebook, model.layers.3.mlp.down_proj: keys 3x512" in capsys.readouterr().out
    assert main(["verify", saved]) == 0
    assert "in the model" in capsys.readouterr().out
    assert main(["verify", saved, "--model", "twin-llada"]) == 1
    assert "not in the model" in capsys.readouterr().out
    for command in (["apply", saved, "--out"], ["export", saved, "--merged"], ["export", saved, "--peft"]):
        assert main([*command, str(tmp_path / "out")]) == 2
        assert "not in the weights (codebook)" in capsys.readouterr().err
