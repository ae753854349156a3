"""Shared pieces: tiny models of every family, a tokenizer, and where the benchmark data and EasyEdit are.

What takes time to make is made once a process and kept; what a test may change is handed out as a copy.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import third_party
import torch
import transformers
from packaging.version import Version

# tiny matrices gain nothing from threads, which wait for each other where something else runs; neither here
# nor in processes that tests start
torch.set_num_threads(1)
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


# One process can import one form of EasyEdit. Tests use PyPI's wheel, but for those that ask for the clone
# and start a process of their own with it; so the variable that every search obeys goes under another name,
# which xdist's workers see.
_CLONE = "EASYEDIT_MDM_CLONE"
if (
    "head" not in (os.environ.get("HOST_FORM"), os.environ.get("ORACLE_FORM"))
    and "EASYEDIT_HOME" in os.environ
):
    os.environ[_CLONE] = os.environ.pop("EASYEDIT_HOME")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(third_party)
    # warnings of third parties at import or by deprecation inside them are not ours to mend; ours stay errors
    for line in (
        "ignore::DeprecationWarning:easyeditor.*",
        "ignore::SyntaxWarning",
        "ignore:.*SwigPy.*:DeprecationWarning",
        "ignore:.*swigvarlink.*:DeprecationWarning",
        "ignore::FutureWarning:easyeditor.*",
        "ignore::FutureWarning:transformers.*",
        "ignore::FutureWarning:accelerate.*",
        "ignore::UserWarning:torch.*",
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ):
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """On other versions, a test of a family whose class the installed transformers lacks is skipped."""
    try:
        return (yield)
    except Exception as error:
        missing = re.search(r"there is no \w+ language model", str(error))
        if third_party.other_versions() and missing and type(error).__name__ == "IncompatibleVersionError":
            pytest.skip(str(error))
        raise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("EASYEDIT_MDM_LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="a long test: set EASYEDIT_MDM_LONG=1"))


def wheel_edits_batches(family: str) -> bool:
    """Whether MEMIT of EasyEdit's wheel runs: it reads a layer's output as a tuple. Since transformers 4.54
    the layers of Llama and Qwen give a tensor, since 5 those of GPT-2 do.
    """
    return Version(transformers.__version__) < Version("5" if family == "gpt2" else "4.54")


@pytest.fixture(scope="session")
def tokenizer():
    """The twins' tokenizer: byte-level BPE, so that any text can be tokenised."""
    from easyedit_mdm import load_model

    return load_model("twin-llama").tokenizer


@pytest.fixture(scope="session")
def twin_llada():
    """The masked twin, shared: tests must leave it as they found it."""
    from easyedit_mdm import load_model

    return load_model("twin-llada")


@pytest.fixture(scope="session")
def twin_llama():
    """The autoregressive twin, shared: tests must leave it as they found it."""
    from easyedit_mdm import load_model

    return load_model("twin-llama")


@pytest.fixture(scope="session")
def world():
    """The world that the twins know."""
    from easyedit_mdm.twins.world import World

    return World.build()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the benchmark data."""
    folder = os.environ.get("EASYEDIT_MDM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EASYEDIT_MDM_DATA names no folder of benchmark data")
    return Path(folder)


@pytest.fixture(scope="session")
def easyedit_home() -> Path:
    """A clone of EasyEdit's repository."""
    home = os.environ.get(_CLONE) or os.environ.get("EASYEDIT_HOME")
    if not home or not (Path(home) / "easyeditor").is_dir():
        pytest.skip("EASYEDIT_HOME names no clone of EasyEdit")
    return Path(home)


@pytest.fixture
def oracle_on_the_head(easyedit_home):
    """Run a file's tests called `..._equals_easyedit` against the clone, in a process of its own; so many
    have to pass.
    """
    if os.environ.get("ORACLE_FORM") == "head":
        pytest.skip("this is that process")

    def run(file: str, passed: int) -> None:
        """The tests of one file."""
        environment = {**os.environ, "ORACLE_FORM": "head", "EASYEDIT_HOME": str(easyedit_home)}
        command = [sys.executable, "-m", "pytest", "-q", "-x", file, "-k", "equals_easyedit"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        assert f"{passed} passed" in done.stdout

    return run


def tiny_config(family: str, vocabulary: int) -> dict:
    """`config.json` of a tiny model in the hub's own fields."""
    common = {
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu", "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    masked = {"mask_token_id": 1}
    adapted = {
        "attention": "block",
        "block_size": 4,
        "edges": "canvas",
        "context": "causal",
        "logit_shift": True,
    }
    qwen3 = {**common, **sizes, "head_dim": 16, "tie_word_embeddings": True}
    return {
        "qwen3": {**qwen3, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        **{
            name: {
                **qwen3, **mask, "architectures": [cls], "model_type": name.replace("-", "_"),
                "num_experts": 6,
                "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True,
                "mlp_only_layers": [2],
                "tie_word_embeddings": False, "decoder_sparse_step": 1,
            }
            for name, cls, mask in (
                ("qwen3-moe", "Qwen3MoeForCausalLM", {}), ("rnd1", "RND1LM", masked),
                ("sdar-moe", "SDARMoeForCausalLM", {**masked, "block_size": 4}),
            )
        },
        "sdar": {
            **qwen3, **masked, "architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": 4,
            "tie_word_embeddings": False,
        },
        "a2d-qwen3": {**qwen3, **masked, "architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"},
        "masked-qwen3": {
            **qwen3, **masked, "architectures": ["Qwen3ForMaskedDiffusion"], "model_type": "qwen3",
            "masked_diffusion": adapted,
        },
        "masked-qwen2": {
            **common, **sizes, **masked, "architectures": ["Qwen2ForMaskedDiffusion"], "model_type": "qwen2",
            "masked_diffusion": {**adapted, "context": "blocks", "logit_shift": False},
        },
        "masked-llama": {
            **common, **sizes, **masked, "architectures": ["LlamaForMaskedDiffusion"], "model_type": "llama",
            "masked_diffusion": {**adapted, "attention": "full", "block_size": None, "context": "blocks"},
        },
        "llada": {
            **common, "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama",
            "layer_norm_type": "rms", "rope": True,
            "activation_type": "silu", "embedding_size": vocabulary, "d_model": 32, "n_layers": 3,
            "n_heads": 4, "n_kv_heads": 4,
            "mlp_hidden_size": 48, "mask_token_id": 1, "max_sequence_length": 128, "weight_tying": False,
        },
        "stable-diffcoder": {
            **common, **sizes, **masked, "architectures": ["StableDiffcoderForCausalLM"],
            "model_type": "llama",
            "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
        },
        "fast-dllm-v2": {
            **common, **sizes, **masked, "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "model_type": "Fast_dLLM_Qwen",
            "bd_size": 4, "tie_word_embeddings": True,
        },
        "bert": {
            "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "hidden_act": "gelu", "max_position_embeddings": 128, "type_vocab_size": 2,
            "layer_norm_eps": 1e-12, "pad_token_id": 0,
            "tie_word_embeddings": True, "architectures": ["BertForMaskedLM"], "model_type": "bert",
            "mask_token_id": 1,
            "torch_dtype": "float32",
        },
        "modernbert": {
            "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "hidden_activation": "gelu", "max_position_embeddings": 128, "local_attention": 8,
            "global_attn_every_n_layers": 3,
            "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "pad_token_id": 0, "bos_token_id": 2,
            "cls_token_id": 2,
            "eos_token_id": 3, "sep_token_id": 3, "architectures": ["ModernBertForMaskedLM"],
            "model_type": "modernbert",
            "mask_token_id": 1, "torch_dtype": "float32",
        },
        "llada-moe": {
            **common, **sizes, **masked, "architectures": ["LLaDAMoEModelLM"], "model_type": "llada",
            "num_key_value_heads": 4,
            "num_experts": 6, "num_experts_per_tok": 2, "expert_intermediate_size": 12,
            "dense_intermediate_size": 48,
            "moe_layer_freq": [1, 1, 1], "qk_layernorm": True,
        },
        "llada2": {
            **common, **sizes, **masked, "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe",
            "head_dim": 16,
            "first_k_dense_replace": 1, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "num_shared_experts": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "partial_rotary_factor": 0.5, "block_size": 4,
        },
        "wedlm": {
            **qwen3, **masked, "architectures": ["WeDLMForCausalLM"], "model_type": "wedlm", "qk_norm": True,
            "attention_bias": False, "tie_word_embeddings": False,
        },
        "diffusion-gemma": {
            "architectures": ["DiffusionGemmaForBlockDiffusion"], "model_type": "diffusion_gemma",
            "canvas_length": 16, "tie_word_embeddings": True, "dtype": "float32", "image_token_id": 7,
            "text_config": {
                "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                "global_head_dim": 16, "num_global_key_value_heads": 1,
                "max_position_embeddings": 128, "num_experts": 4, "top_k_experts": 2,
                "moe_intermediate_size": 16, "sliding_window": 4, "use_bidirectional_attention": "vision",
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True,
            },
            "vision_config": {
                "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "head_dim": 8,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 2,
                "pooling_kernel_size": 1, "position_embedding_size": 16, "standardize": False,
            },
        },
        "mmada": {
            **common, "architectures": ["MMadaModelLM"], "model_type": "mmada", "block_type": "llama",
            "layer_norm_type": "rms",
            "rope": True, "activation_type": "silu", "embedding_size": vocabulary, "d_model": 32,
            "n_layers": 3, "n_heads": 4,
            "n_kv_heads": 4, "mlp_hidden_size": 48, "mask_token_id": 1, "max_sequence_length": 128,
            "weight_tying": False,
            "llm_vocab_size": vocabulary - 32, "codebook_size": 32, "new_vocab_size": vocabulary,
        },
        "illada": {
            **common, **sizes, **masked, "architectures": ["ILLaDAForCausalLM"], "model_type": "illada",
            "layer_norm_eps": None,
            "tie_word_embeddings": True,
        },
        "dream": {**common, **sizes, "architectures": ["DreamModel"], "model_type": "Dream",
            "mask_token_id": 1},
        "llama": {**common, **sizes, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "qwen2": {**common, **sizes, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        "gpt2": {
            "vocab_size": vocabulary, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4,
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2", "eos_token_id": 0, "bos_token_id": 0, "torch_dtype": "float32",
            "tie_word_embeddings": True,
        },
    }[family]  # fmt: skip


# mean and standard deviation of tensors: norms on every branch would make the prompt of a random model count
# for nothing
OWN_WEIGHTS = {"diffusion-gemma": {"layer_scalar": (0.4, 0.05), "embed_tokens.weight": (0.0, 0.2)}}


def write_checkpoint(
    folder: Path, family: str, vocabulary: int = 192, seed: int = 0, shards: int = 1
) -> dict[str, torch.Tensor]:
    """A tiny random checkpoint in the hub's key names; returns its tensors."""
    from safetensors.torch import save_file

    from easyedit_mdm.errors import IncompatibleVersionError
    from easyedit_mdm.models.families import FAMILIES
    from easyedit_mdm.models.loading import _empty_model, kept, tied_names

    config = tiny_config(family, vocabulary)
    spec = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    try:
        model = _empty_model(spec, config)
    except IncompatibleVersionError as error:  # an older transformers without the native class
        pytest.skip(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, list[torch.Size]] = {}
    for name, parameter in kept(spec, model):
        if name not in tied_names(spec, model):
            made = spec.made_of(config, name)
            shapes.setdefault(spec.hub_name(name) if made is None else made[0], []).append(parameter.shape)
    tensors = {}
    for name, parts in shapes.items():  # several where they are rows of one tensor
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        center, spread = (1.0 if len(shape) == 1 and "bias" not in name else 0.0), 0.15
        for ending, own in OWN_WEIGHTS.get(family, {}).items():
            center, spread = own if name.endswith(ending) else (center, spread)
        tensors[name] = torch.randn(shape, generator=generator) * spread + center
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors


def edited_site(model: Any, layer: int) -> Any:
    """A layer's own site; of a mixture without a shared expert, all its experts as one map."""
    site = model.site(layer)
    return model.through(site, range(len(site.parts))) if site.routed else site


class TinyModels:
    """Tiny random models with the twins' tokenizer: `tiny("llada", dtype="bfloat16")`.

    Each is written, loaded and kept once a process; every call gives a copy, which the caller may change.
    Their folders are shared and only read.
    """

    def __init__(self, root: Path, tokenizer: Any):
        self.root, self.tokenizer = root, tokenizer
        self.kept: dict[tuple, Any] = {}

    def folder(self, family: str) -> Path:
        """The checkpoint's folder."""
        folder = self.root / family
        if not folder.exists():
            write_checkpoint(folder, family, len(self.tokenizer))
        return folder

    def __call__(self, family: str, **options: Any) -> Any:
        """A model of the family, loaded with these options of `load_model`."""
        from easyedit_mdm import load_model

        which = (family, *sorted(options.items()))
        if which not in self.kept:
            self.kept[which] = load_model(self.folder(family), tokenizer=self.tokenizer, **options)
        return copy.deepcopy(self.kept[which], {id(self.tokenizer): self.tokenizer})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> TinyModels:
    """Factory of tiny models: a copy each time."""
    return TinyModels(tmp_path_factory.mktemp("tiny"), tokenizer)
