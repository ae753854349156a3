"""docs/extending.md followed to the letter: its code is run, and its family and method pass what every family
and method passes.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import conftest
import pytest
import test_adapter
import test_rome
import torch
import transformers

from easyedit_mdm import load_model, make_edit, make_edits
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.editing import METHODS
from easyedit_mdm.errors import CheckpointError, HyperParameterError, RequestError
from easyedit_mdm.models import FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
FAMILY, METHOD = "easyedit_mdm/models/families/toy.py", "easyedit_mdm/editing/methods/toy.py"
CONFIG, FILE, SCRIPT = "tests/conftest.py", "hparams/TOY_MDM/twin-llada.yaml", "try_it.py"
REQUESTS = [{**test_rome.REQUEST, "target_new": target} for target in ("red river", "old stone bridge")]


def code() -> dict[str, str]:
    """The page's blocks, by the file name in their first line."""
    return dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))


def imported(folder: Path, name: str, text: str) -> Any:
    """A module made of a text, as Python would import its file."""
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's code, registered for the length of this file."""
    folder, blocks = tmp_path_factory.mktemp("page"), code()
    imported(folder, "toy_family", blocks[FAMILY])
    imported(folder, "toy_method", blocks[METHOD])
    named: dict[str, Any] = {}
    exec(blocks[CONFIG], named)
    yield {**blocks, "config": named["TOY"]}
    for registry, name in ((FAMILIES, "toy"), (METHODS, "TOY_MDM")):
        del registry._things[name]
    for name in ("toy_family", "toy_method"):
        del sys.modules[name]


@pytest.fixture
def toy(page, tmp_path, tokenizer, monkeypatch):
    """Factory of toy models, as conftest's `tiny` is of the others."""
    theirs = conftest.tiny_config

    def with_toy(family: str, vocabulary: int) -> dict:
        return {**page["config"], "vocab": vocabulary} if family == "toy" else theirs(family, vocabulary)

    monkeypatch.setattr(conftest, "tiny_config", with_toy)

    def make(family: str = "toy", **options: Any):
        conftest.write_checkpoint(tmp_path / family, family, len(tokenizer))
        return load_model(tmp_path / family, tokenizer=tokenizer, **options)

    return make


def test_the_page_has_all_of_it():
    """Five blocks, each once; the architecture page leads here."""
    assert set(code()) == {FAMILY, METHOD, CONFIG, FILE, SCRIPT}
    assert "extending.md" in (PAGE.parent / "architecture.md").read_text(encoding="utf-8")


@torch.no_grad()
def test_the_family_computes_what_it_says(toy, tmp_path):
    """Its checkpoint has its own key names; its logits are those of a Llama that sees both sides, one place
    further on.
    """
    from safetensors.torch import load_file

    model = toy()
    stored = load_file(tmp_path / "toy" / "model.safetensors")
    assert {"net.2.attn.out.weight", "net.0.ff.down.weight", "head.weight"} <= set(
        stored
    ) and model.spec.name == "toy"
    config = transformers.LlamaConfig(
        vocab_size=len(stored["head.weight"]), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    native = transformers.LlamaForCausalLM(config).eval()
    native.load_state_dict({by_hand(key): value for key, value in stored.items()})
    ids = torch.randint(2, 150, (2, 7), generator=torch.Generator().manual_seed(0))
    raw = native(
        input_ids=ids, attention_mask=torch.zeros(2, 1, 7, 7)
    ).logits  # additive zeros: everything sees everything
    aligned = model.token_logits(ids)
    assert (aligned[:, 1:] - raw[:, :-1]).abs().max() < 1e-5
    causal = native(input_ids=ids).logits
    assert (causal - raw).abs().max() > 1e-2, "the masks make no difference: this test would prove nothing"


def by_hand(key: str) -> str:
    """Llama's name for a key of Toy's, written without the page's table."""
    for theirs, native in (
        ("attn.out", "self_attn.o_proj"), ("attn.q", "self_attn.q_proj"), ("attn.k", "self_attn.k_proj"),
        ("attn.v", "self_attn.v_proj"),
        ("ff.gate", "mlp.gate_proj"), ("ff.up", "mlp.up_proj"), ("ff.down", "mlp.down_proj"), ("norm1",
            "input_layernorm"),
        ("norm2", "post_attention_layernorm"),
    ):  # fmt: skip
        if f".{theirs}." in key:
            return key.replace(theirs, native).replace("net.", "model.layers.")
    return {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }[key]


@pytest.mark.parametrize(
    "battery",
    [
        test_adapter.test_padding_changes_nothing, test_adapter.test_from_any_layer_on,
        test_adapter.test_who_sees_whom, test_adapter.test_alignment,
        test_adapter.test_names_are_the_native_ones, test_adapter.test_sites,
        test_adapter.test_generate_has_transformers_signature,
    ],
)  # fmt: skip
def test_the_family_passes_the_battery(toy, battery):
    """The adapter's contract, as every family keeps it."""
    battery(toy, "toy")


def test_a_variant_is_refused(toy, tmp_path):
    """What Llama does not compute is an error, not a wrong answer."""
    toy()
    file = tmp_path / "toy" / "config.json"
    file.write_text(file.read_text().replace('"model_type"', '"activation": "gelu", "model_type"'))
    with pytest.raises(CheckpointError, match="activation='gelu'"):
        load_model(tmp_path / "toy")


@pytest.mark.parametrize("family", ["toy", "llama", "dream", "gpt2"])
def test_the_method_passes_the_battery(toy, family):
    """Edit, apply, revert, as every method does it, on the toy family and on others of both paradigms."""
    test_rome.test_edit_apply_revert(toy, family, "TOY_MDM")


def test_the_methods_closed_form(toy):
    """At strength 1 it is ROME_MDM without statistics; half the strength is half the update; several facts at
    once are the same edits.
    """
    model = toy()
    same = {"context_templates": ["{}", "The old song. {}"], "state_schedule": "enumerate"}
    ours = make_edit(model, REQUESTS[0], test_rome.hparams(alg_name="TOY_MDM", **same)).changes[0].dense()
    rome = make_edit(model, REQUESTS[0], test_rome.hparams(**same)).changes[0].dense()
    assert float((ours - rome).norm() / rome.norm()) < 1e-5
    half = test_rome.hparams(alg_name="TOY_MDM", strength=0.5, **same)
    assert torch.allclose(make_edit(model, REQUESTS[0], half).changes[0].dense(), ours / 2, atol=1e-6)
    for edit, request in zip(make_edits(model, REQUESTS, half), REQUESTS):
        alone = make_edit(model, request, half).changes[0].dense()
        assert float((edit.changes[0].dense() - alone).norm() / alone.norm()) < 1e-3
    with pytest.raises(RequestError, match="2 requests"):
        make_edit(model, REQUESTS, half)
    with pytest.raises(HyperParameterError, match="strength"):
        test_rome.hparams(alg_name="TOY_MDM", strength=-1)


def test_the_methods_file_and_a_model_that_knows_something(page, tmp_path, twin_llada, world):
    """The YAML is read, and with it the method writes a fact of two tokens into a twin."""
    file = tmp_path / "toy.yaml"
    file.write_text(page[FILE])
    hparams = METHODS["TOY_MDM"].hparams.from_hparams(file)
    assert hparams.strength == 1.0 and hparams.alg_name == "TOY_MDM"
    from easyedit_mdm import score_prompts
    from easyedit_mdm.twins.benchmark import cases

    case = next(c for c in cases(world, "test") if c.length == 2)
    before = parameter_hashes(twin_llada)
    edit = make_edit(twin_llada, case.request(), hparams)
    with_edit = edit.apply(twin_llada)
    try:
        assert with_edit and score_prompts(twin_llada, [case.fact.prompt()], [case.target])[0]["exact"]
    finally:
        edit.revert(twin_llada)
    assert parameter_hashes(twin_llada) == before
    file.write_text(page[FILE].replace("strength", "strenght"))
    with pytest.raises(HyperParameterError, match="did you mean 'strength'"):
        METHODS["TOY_MDM"].hparams.from_hparams(file)


def test_both_together(toy, page, tmp_path, tokenizer, monkeypatch):
    """The script at the end of the page."""
    before = parameter_hashes(toy())
    (tmp_path / "toy").rename(tmp_path / "toy-model")
    monkeypatch.chdir(tmp_path)
    ran: dict[str, Any] = {"tokenizer": tokenizer}
    exec(page[SCRIPT], ran)
    assert ran["model"].spec.name == "toy" and len(ran["edit"].card["facts"][0]["losses"]) > 1
    assert parameter_hashes(ran["model"]) == before
