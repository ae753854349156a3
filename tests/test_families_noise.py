"""DiffusionGemma: hidden slots that show noise, a causal encoder and a decoder with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_checkpoint
from safetensors.torch import load_file

from easyedit_mdm import DecodeConfig, decode, load_model, make_edit, make_edits
from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.editing.solve.rows import build_rows
from easyedit_mdm.errors import CheckpointError, IncompatibleVersionError, ModelError, StatisticsError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.hidden import Hidden
from easyedit_mdm.statistics.collecting import CollectConfig, collect
from easyedit_mdm.statistics.texts import TextSource
from easyedit_mdm.tracing import TraceConfig, TracedFact, trace_fact

FAMILY = "diffusion-gemma"
REQUEST = {"prompt": "The river of Ann is", "subject": "Ann", "target_new": "old of"}


def published(data_dir: Path) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The reference checkpoint and transformers' own numbers; skipped where the class is missing."""
    folder = data_dir / "reference" / "diffusion_gemma"
    try:
        return load_model(folder), load_file(folder / "reference.safetensors")
    except IncompatibleVersionError as error:
        pytest.skip(str(error))


def settings(name: str = "ROME_MDM", **more):
    """Hyperparameters with two context prefixes."""
    base = {"layers": [1], "v_num_grad_steps": 10, "v_lr": 0.5, "v_weight_decay": 1e-3}
    templates = ["{}", "Yes. {}"]
    return METHODS[name].hparams(
        alg_name=name, model_name="tiny", context_templates=templates, clamp_norm_factor=10.0,
        **{**base, **more},
    )  # fmt: skip


@pytest.mark.data
@torch.no_grad()
def test_logits_are_transformers_own(data_dir):
    """Prompt and canvas as one row, padded or not; the encoder's stream; self-conditioning, natively."""
    model, known = published(data_dir)
    prompt, canvas = known["input_ids"], known["decoder_input_ids"]
    rows, start = torch.cat([prompt, canvas], 1), torch.full((3,), 13)
    assert (model.token_logits(rows, canvas=start)[:, 13:] - known["logits"]).abs().max() < 1e-4
    encoded = model.stack.normed(model.hidden_before(model.layers, prompt))
    assert (encoded - known["encoder_last_hidden_state"]).abs().max() < 1e-4
    short = torch.cat([prompt[:1, :5], canvas[:1]], 1)  # less than a window
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1)
    mask = torch.ones_like(padded)
    mask[:, :8] = 0
    for logits in (
        model.token_logits(short, canvas=torch.tensor([5]))[:, 5:],
        model.token_logits(padded, mask, canvas=torch.tensor([13]))[:, 13:],
    ):
        assert (logits - known["short_prompt_logits"]).abs().max() < 1e-4
    conditioned = model(
        prompt, decoder_input_ids=canvas, self_conditioning_logits=known["self_conditioning_logits"]
    )
    assert (conditioned.logits - known["logits_self_conditioned"]).abs().max() < 1e-4


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # as torch imports it
@pytest.mark.parametrize(
    ("name", "temperatures"),
    [
        ("generated_near_greedy_t0.0002", {"t_min": 1e-4, "t_max": 2e-4}),
        ("generated_t0.4_0.8_entropy0.1", {"t_min": 0.4, "t_max": 0.8}),
    ],
)
def test_generate_is_transformers_own(data_dir, name, temperatures):
    """Token for token with the same random numbers; what goes beyond max_new_tokens is cut off."""
    model, known = published(data_dir)
    prompt = known["input_ids"][:1]
    with torch.random.fork_rng():
        for new in (16, 11):
            torch.manual_seed(0)
            made = model.generate(prompt, max_new_tokens=new, max_denoising_steps=4, **temperatures)
            assert torch.equal(made, known[name][:, : 13 + new])


def test_noise_is_data():
    """The same number gives the same tokens, another number others, all ids come; shown slots stay."""
    noise, mask = Hidden(None, 50), Hidden(7)
    assert torch.equal(noise.slots(9, 3), noise.slots(9, 3)) and noise.noise and not mask.noise
    assert not torch.equal(noise.slots(9, 3), noise.slots(9, 4))
    assert noise.slots(2000).unique().tolist() == list(range(50))
    shown = torch.tensor([True, False, True])
    tokens = torch.tensor([60, 61, 62])
    assert mask.around(tokens, shown).tolist() == [60, 7, 62]
    found = noise.around(tokens, shown, 2)
    assert found[shown].tolist() == [60, 62] and int(found[1]) == int(noise.slots(3, 2)[1])


def test_rows_hold_right_tokens_and_noise(tiny):
    """Each context and state has noise of its own, and shows the target where it is revealed."""
    model = tiny(FAMILY)
    fact = tokenise(model, EditRequest.of(REQUEST), settings())
    states = Plan.of(model, fact, "enumerate").draw(0, torch.Generator())
    rows = build_rows(model, {0: fact}, {0: states}, "slot")
    ((contexts, group),) = states
    assert len(rows) == len(contexts) * len(group.weights) + 1 and float(rows.weights.sum()) == pytest.approx(
        1
    )
    hidden = []
    for row in range(len(rows) - 1):
        start = int(rows.canvas[row])
        slots = rows.ids[row, start : start + len(fact.target)]
        read = rows.weights[row, : len(fact.target)] > 0
        assert torch.equal(slots[~read], fact.target[~read]) and not torch.equal(slots, fact.target)
        hidden.append(tuple(slots.tolist()))
    assert len(set(hidden)) == len(hidden)
    later = build_rows(model, {0: fact}, {0: states}, "slot", draw=500)
    assert not torch.equal(later.ids, rows.ids) and torch.equal(later.mask, rows.mask)


@torch.no_grad()
def test_one_write_reaches_encoder_and_decoder(tiny):
    """The edited weight is one tensor; the native class, which runs both, agrees; taken back bit for bit."""
    model = tiny(FAMILY)
    encoder, decoder = model.native.model.encoder.language_model, model.native.model.decoder
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert not any(name.startswith("model.encoder.language_model") for name in before)
    ids = torch.arange(20, 32)[None]
    plain = model(ids[:, :7], decoder_input_ids=ids[:, 7:]).logits
    with torch.enable_grad():
        edit = make_edit(model, REQUEST, settings())
    edit.apply(model)
    weights = [part.layers[1].mlp.down_proj.weight for part in (encoder, decoder)]
    assert weights[0] is weights[1]
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert changed == [model.site(1).weight]
    after = model(ids[:, :7], decoder_input_ids=ids[:, 7:]).logits
    assert (after - plain).abs().max() > 1e-3
    assert (model.token_logits(ids, canvas=torch.tensor([7]))[:, 7:] - after).abs().max() < 1e-4
    edit.revert(model)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("name", ["full_mask", "enumerate", "cycle", "on_policy"])
def test_edits_raise_the_likelihood(tiny, name):
    """Fixed states, states that are drawn anew, roll-outs: the target becomes likelier, also elsewhere."""
    model = tiny(FAMILY)
    fact = tokenise(model, EditRequest.of(REQUEST), settings())
    given = [fact.contexts[0].ids], [fact.target]
    before = log_likelihood(model, *given, "exact")[0]
    through = dict(optimise_through="weights", v_num_grad_steps=20)  # what the weights do is what is meant
    edit = make_edit(model, REQUEST, settings(state_schedule=name, **through))
    edit.apply(model)
    assert log_likelihood(model, *given, "exact")[0] > before + 0.05


def test_company_changes_nothing(tiny):
    """Two facts optimised together are as each alone: noise depends on a row's place in its own fact."""
    model, hparams = tiny(FAMILY), settings()
    requests = [REQUEST, {**REQUEST, "target_new": "the"}]
    for request, edit in zip(requests, make_edits(model, requests, hparams)):
        alone = make_edit(model, request, hparams).changes[0].dense()
        assert (edit.changes[0].dense() - alone).norm() <= 1e-4 * alone.norm()


def test_decoding_draws_noise_anew(tiny):
    """What is written stays; one seed, one text, alone or in a batch; another seed has other noise."""
    model = tiny(FAMILY)
    prompts = [torch.arange(20, 26), torch.arange(30, 38)]
    paths = decode(model, prompts, [5, 7])
    assert [sorted(path.step.tolist()) for path in paths] == [list(range(5)), list(range(7))]
    alone = decode(model, prompts[1:], [7])[0]
    assert torch.equal(alone.tokens, paths[1].tokens) and torch.equal(alone.step, paths[1].step)
    seen: list[torch.Tensor] = []
    own = model.token_logits
    model.token_logits = lambda ids, *args, **more: (seen.append(ids.clone()), own(ids, *args, **more))[1]
    decode(model, prompts[:1], [5])
    first = seen[0][0, 6:]
    for step, ids in enumerate(seen):
        canvas, written = ids[0, 6:], paths[0].step < step
        assert torch.equal(canvas[written], paths[0].tokens[written])
        assert step == 0 or not torch.equal(canvas[~written], first[~written])
    seen.clear()
    decode(model, prompts[:1], [5], DecodeConfig(seed=1))
    assert not torch.equal(seen[0][0, 6:], first)


def test_traces(tiny):
    """A trace restores the prompt's stream and reads the hidden slots, as for masks."""
    model = tiny(FAMILY)
    fact = TracedFact("The river of Ann is", "Ann", REQUEST["target_new"])
    trace = trace_fact(model, fact, TraceConfig(samples=2, revealed=(0, 1)))
    assert len(trace.states) == 2 and trace.joint["method"] == "exact"
    assert all(values.isfinite().all() for s in trace.states for kind in s.effects.values()
               for values in kind.values())  # fmt: skip
    assert max(float(v.abs().max()) for v in trace.states[0].effects["hidden"].values()) > 1e-3


def test_there_is_no_mask(tiny, tmp_path):
    """A mask id, masked text for the statistics, an expert's tensor as a site: refused, each by name."""
    model = tiny(FAMILY)
    with pytest.raises(ModelError, match="has no mask token"):
        load_model(tiny.folder(FAMILY), mask_id=5)
    with pytest.raises(ModelError, match="no matrix"):
        model.site(1, "model.decoder.layers.{}.experts")
    with pytest.raises(StatisticsError, match="noised"):
        text = TextSource("x", "0", lambda: iter(["a text"]))
        collect(model, [model.site(1)], text, CollectConfig(tokens=10, mask_ratio=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canvas_length": 0}, "canvas_length=0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ({"vision_config": None}, "lacks or misstates"),
        ({"text_config": {"use_bidirectional_attention": "all"}}, "'all' is not supported"),
        ({"text_config": {"hidden_size": 10**9}}, "hidden_size=1000000000"),
    ],
)
def test_configurations_are_checked(tmp_path, changes, message):
    """What the native class would not compute, or could not."""
    write_checkpoint(tmp_path, FAMILY)
    config = tiny_config(FAMILY, 192)
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_older_transformers(tmp_path, monkeypatch):
    """One sentence, with the version that has the class."""
    import transformers

    write_checkpoint(tmp_path, FAMILY)
    monkeypatch.setattr(transformers, "DiffusionGemmaForBlockDiffusion", None, raising=False)
    with pytest.raises(IncompatibleVersionError, match="it came with transformers 5.11"):
        load_model(tmp_path)
