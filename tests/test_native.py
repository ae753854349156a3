"""Everything that depends on a version of transformers, against the model's own forward."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from easyedit_mdm.errors import IncompatibleVersionError, ModelError
from easyedit_mdm.models import FAMILIES, adapt, geometry
from easyedit_mdm.models.native import Stack, build, native_classes, tokenizer_classes
from easyedit_mdm.models.prefix import can_keep, logits_after, read_prefix

families = pytest.mark.parametrize("family", list(FAMILIES))
causal = pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].denoises])


def batch(pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of unequal length, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 150, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, missing in enumerate((0, 2, 5)):
        ids[row, :missing], mask[row, :missing] = pad, 0
    return ids, mask


PROMPT = 7  # columns before the canvas, for models that read it apart


def forward(model, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """The logits of the model's own forward, and what `Stack` is told of the canvas. A model that reads the
    canvas apart gives zeros before it.
    """
    positions = geometry.positions(mask)
    if not model.hidden.noise:
        return model(ids, mask, position_ids=positions).logits, {}
    prompt, canvas = slice(PROMPT), slice(PROMPT, None)
    out = model(
        ids[:, prompt], mask[:, prompt], position_ids=positions[:, prompt],
        decoder_input_ids=ids[:, canvas], decoder_position_ids=positions[:, canvas],
        decoder_attention_mask=mask,
    )  # fmt: skip
    before = out.logits.new_zeros(*ids[:, prompt].shape, out.logits.shape[-1])
    return torch.cat([before, out.logits], 1), {
        "canvas": (torch.arange(ids.shape[1]) >= PROMPT).expand_as(ids)
    }


def read(model, mask: torch.Tensor) -> torch.Tensor:
    """Where `forward` gives logits."""
    return mask.bool() & (torch.arange(mask.shape[1]) >= (PROMPT if model.hidden.noise else 0))


def sight(model, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Who sees whom in these rows."""
    return model.sight(mask, torch.full((len(ids),), PROMPT) if model.hidden.noise else None, ids)


@families
@torch.no_grad()
def test_layers_one_by_one_are_the_whole_model(tiny, family):
    """Embedding, each layer, norm and head, run here, give the logits of the model's own forward."""
    model = tiny(family)
    ids, mask = batch(model.ids.pad)
    positions = geometry.positions(mask)
    own, told = forward(model, ids, mask)
    hidden = model.stack.embedded(ids, positions, **told)
    for layer in range(model.layers):
        hidden = model.stack.run(hidden, range(layer, layer + 1), sight(model, mask, ids), positions, **told)
    ours = model.stack.logits(model.stack.normed(hidden))
    assert (ours - own)[read(model, mask)].abs().max() < 1e-5
    assert own[mask.bool()].std() > 0.1


@families
def test_gradients_are_the_whole_model_s(tiny, family):
    """The gradient of a weight in the middle, through the layers run here and through the model's own
    forward.
    """
    model = tiny(family)
    ids, mask = batch(model.ids.pad)
    site = model.site(1)
    weight = model.weight_of(site.parts[0] if site.routed else site.name)
    own, told = forward(model, ids, mask)
    states = model.stack.run(
        model.stack.embedded(ids, geometry.positions(mask), **told),
        range(model.layers),
        sight(model, mask, ids),
        geometry.positions(mask),
        **told,
    )
    ours = model.stack.logits(model.stack.normed(states))
    (one,) = torch.autograd.grad(own[read(model, mask)].square().mean(), weight)
    (other,) = torch.autograd.grad(ours[read(model, mask)].square().mean(), weight)
    assert (one - other).abs().max() < 1e-5 * one.abs().max().clamp(min=1)
    assert one.abs().max() > 0


@causal
@torch.no_grad()
def test_kept_columns_change_nothing(tiny, family):
    """Keys and values of the first columns, kept, and the rest run after them: the logits of the whole
    row.
    """
    model = tiny(family)
    if not can_keep(model):
        pytest.skip("learned positions: nothing is kept")
    ids, mask = batch(model.ids.pad)
    at = torch.tensor([[8, 10], [7, 9], [9, 10]])
    for layer in (0, 1, 2):
        hidden = model.hidden_before(layer, ids, mask)
        prefix = read_prefix(model, layer, hidden[:, :6], mask)
        whole = model.token_logits(ids, mask, at=at)
        assert (logits_after(model, prefix, hidden[:, 6:], mask, at) - whole).abs().max() < 1e-5
        order = torch.tensor([2, 0])
        some = logits_after(model, prefix.take(order), hidden[order, 6:], mask[order], at[order])
        assert (some - whole[order]).abs().max() < 1e-5


@families
def test_classes_by_name(family):
    """Each family's classes exist in this transformers; the model is built with attention that takes additive
    masks.
    """
    config, model = native_classes(FAMILIES[family].native, ending=FAMILIES[family].ending)
    assert issubclass(model, nn.Module)
    assert config.__name__.startswith(FAMILIES[family].native)


def test_a_class_that_is_gone(monkeypatch):
    """A version without a family's class: one sentence, with the version and what was tested."""
    import transformers

    monkeypatch.setattr(transformers, "__version__", "99.0")
    with pytest.raises(
        IncompatibleVersionError, match=r"in transformers 99.0 there is no Lambda language model. .*tested"
    ):
        build("Lambda", {})


def test_tokenizer_classes():
    """Those that are there, in order, each once, the generic one last; what is no tokenizer is left out."""
    import transformers

    generic = transformers.PreTrainedTokenizerFast
    assert tokenizer_classes([None, "NoSuchTokenizer", "LlamaForCausalLM"]) == [generic]
    assert tokenizer_classes(["PreTrainedTokenizerFast", "PreTrainedTokenizerFast"]) == [generic]
    assert tokenizer_classes(["GPT2TokenizerFast"])[0] is transformers.GPT2TokenizerFast


class _Strange(nn.Module):
    """A layer of some later transformers: no argument by any name that we know."""

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """As it came."""
        return stream


class _Uncached(nn.Module):
    """A layer that takes a cache and never asks it anything."""

    def forward(self, stream, attention_mask=None, position_embeddings=None, cache=None, use_cache=False):
        """As it came."""
        return stream


@torch.no_grad()
def test_layers_of_another_version(tiny, monkeypatch):
    """Renamed arguments, a vanished rotary embedding, a cache that is not used: one sentence each, and no
    wrong numbers.
    """
    model = tiny("llama")
    ids, mask = batch(model.ids.pad)
    hidden = model.hidden_before(1, ids, mask)
    model.model.layers[1] = _Strange()
    with pytest.raises(
        IncompatibleVersionError, match=r"_Strange.forward lacks attention_mask, position_embeddings"
    ):
        model.hidden_before(2, ids, mask)
    model.model.layers[1] = _Uncached()
    assert torch.equal(model.hidden_before(2, ids, mask), hidden)
    with pytest.raises(IncompatibleVersionError, match=r"does not call a cache's update\(\)"):
        read_prefix(model, 1, hidden[:, :6], mask)
    del model.model.rotary_emb
    with pytest.raises(IncompatibleVersionError, match="has no 'rotary_emb'"):
        model.token_logits(ids, mask)


def test_attention_that_takes_no_mask(tiny):
    """Flash attention would silently see to the left only: refused."""
    native = tiny("llama").native
    native.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="attn_implementation='flash_attention_2'"):
        adapt(native)


def test_only_one_file_touches_what_moves():
    """No other file of the package reaches for a private name of transformers, a cache, or a class by
    name.
    """
    import re
    from pathlib import Path

    import easyedit_mdm

    pattern = re.compile(
        r"DynamicCache|past_key_value|_attn_implementation|_no_split_modules"
        r"|getattr\(transformers|\b_modules\b"
    )
    root = Path(easyedit_mdm.__file__).parent
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        if path.name != "native.py" and "host" not in path.parts
        for line in path.read_text().splitlines()
        if pattern.search(line)
        and not line.strip().startswith("def _modules")
        and "_modules(recipe" not in line
    ]
    assert found == []


def test_a_stack_of_part_of_the_layers_leaves_the_model_alone(tiny):
    """Running part of the layers registers no module and changes no attribute."""
    model = tiny("qwen2")
    before = [name for name, _ in model.named_modules()]
    ids, mask = batch(model.ids.pad)
    model.hidden_before(2, ids, mask)
    assert [name for name, _ in model.named_modules()] == before
    assert isinstance(model.stack, Stack)


@pytest.mark.parametrize(
    "command",
    [
        [
            "edit",
            "--hparams",
            "ROME_MDM/twin-llama",
            "--prompt",
            "Ann Lee lives in",
            "--subject",
            "Ann Lee",
            "--target",
            "Rome",
            "--save",
        ],
        [
            "bench",
            "--alg",
            "ROME_MDM",
            "--hparams",
            "ROME_MDM/twin-llama",
            "--dataset",
            "twins",
            "--limit",
            "1",
            "--out",
        ],
        ["stats", "--model", "twin-llama", "--dataset", "twins", "--layers", "0", "--out"],
        ["trace", "--model", "twin-llama", "--limit", "1", "--out"],
    ],
    ids=lambda command: command[0],
)
def test_a_later_transformers_without_what_we_use(monkeypatch, tmp_path, capsys, twin_llama, command):
    """A class is gone in version 99: every command says so in one line, with the version and the cure; so
    does `doctor`.
    """
    import importlib.metadata

    from easyedit_mdm.cli import main

    transformers = sys.modules["transformers"]  # what an import finds now
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "99.0" if name == "transformers" else real(name)
    )
    monkeypatch.setattr(transformers, "__version__", "99.0")
    monkeypatch.setattr(transformers, "LlamaForCausalLM", None)
    assert main([*command, str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "in transformers 99.0 there is no Llama language model" in line
    assert "outside the tested range" in line
    assert "pip install 'transformers" in line
    if command[0] == "edit":
        assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert "99.0, outside the tested range" in shown
        assert "there is no Llama language model" in shown
