"""Random models of a published shape, and facts to edit into them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm import load_model, wrap_model
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.families import FAMILIES
from easyedit_mdm.models.native import build
from easyedit_mdm.models.recognise import by_architecture
from easyedit_mdm.models.sizes import PUBLISHED, ModelSize, model_size
from easyedit_mdm.twins.benchmark import cases
from easyedit_mdm.twins.world import World

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_SMALL = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 512,
}  # fmt: skip
_SMALL_LLADA = {
    "d_model": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 192, "vocab_size": 2048,
    "embedding_size": 2048, "max_sequence_length": 512,
}  # fmt: skip
_LLADA, _DREAM = (
    PUBLISHED[f"{name}"] for name in ("GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B")
)


@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
        config: its `config.json`.
        file: the hyperparameter files that ship for it (`ROME_MDM/file`, `MEMIT_MDM/file`).
        causal: an autoregressive model, which EasyEdit edits as well.
        small: stands in for a large one in a rehearsal.
    """

    name: str
    config: Mapping[str, Any]
    file: str
    causal: bool = False
    small: bool = False

    def layers(self, method: str) -> list[int] | None:
        """The layers to edit, where they are not the file's: it may name more than a small shape has."""
        return None if not self.small else [1] if method == "ROME_MDM" else [0, 1, 2, 3]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llada-8b", _LLADA, "llada-8b"),
        Shape("dream-7b", _DREAM, "dream-7b"),
        Shape("llama-3-8b", _LLAMA_3, "llada-8b", causal=True),
        Shape("tiny-llada", {**_LLADA, **_SMALL_LLADA}, "llada-8b", small=True),
        Shape("tiny-dream", {**_DREAM, **_SMALL}, "dream-7b", small=True),
        Shape("tiny-llama", {**_LLAMA_3, **_SMALL}, "llada-8b", causal=True, small=True),
    )
}
SETS = {"tiny": ["tiny-llada", "tiny-llama", "tiny-dream"], "all": ["llada-8b", "llama-3-8b", "dream-7b"]}


def model_of(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> Adapter:
    """A random model of a shape, made on the device."""
    tokenizer = load_model("twin-llada").tokenizer
    config = {**shape.config, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    spec = FAMILIES["llama"] if shape.causal else by_architecture(config)[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.default_generator.manual_seed(0)
    try:
        with torch.device(device):
            if device.startswith("cuda"):
                torch.cuda.manual_seed(0)
            native = build(spec.native, spec.native_config(config)).eval()
    finally:
        torch.set_default_dtype(before)
    mask = {} if shape.causal else {"mask_id": tokenizer.mask_token_id}
    return wrap_model(native, tokenizer, family=spec.name, name=shape.name, **mask)


def size_of(shape: Shape, folder: Path) -> ModelSize:
    """What `doctor` takes a model of this shape for; `folder` gets its config.json."""
    place = folder / shape.name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(dict(shape.config)), encoding="utf-8")
    return model_size(place)


@cache
def _words() -> tuple[list[str], list[str], dict[int, list[str]]]:
    """First names, last names, and targets by their number of tokens, in the twins' vocabulary."""
    every = cases(World.build(), "test")
    names = [case.request()["subject"].split(" ") for case in every]
    targets = {n: [c.request()["target_new"] for c in every if c.length == n] for n in range(1, 5)}
    return list(dict.fromkeys(n[0] for n in names)), list(dict.fromkeys(n[-1] for n in names)), targets


def requests_of(n: int) -> list[dict[str, Any]]:
    """`n` facts of different subjects, with targets of 1, 2, 3, 4, 1, ... tokens."""
    first, last, targets = _words()
    pairs = itertools.islice(((a, b) for b in last for a in first), n)
    found = [
        {
            "prompt": f"{a} {b} was born in",
            "subject": f"{a} {b}",
            "target_new": targets[1 + i % 4][i // 4 % len(targets[1 + i % 4])],
        }
        for i, (a, b) in enumerate(pairs)
    ]
    assert len(found) == n, f"the world has names for {len(found)} facts"
    return found
