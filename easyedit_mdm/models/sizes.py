"""How large a model is and what editing it takes, from its configuration alone: no weights are read, and
nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.loading import _dtype, _empty_model, read_config, tied_names, weight_files
from easyedit_mdm.models.recognise import by_architecture, detect
from easyedit_mdm.models.spec import FamilySpec

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
# of one pass of the value optimisation: `max_rows` of the large models' files, a prefix with its prompt,
# and a target
ROWS, LENGTH, SLOTS = 64, 48, 8
_MOST_LAYERS = 1000  # that are believed of a configuration without weights

_LLADA: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"], "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096, "weight_tying": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
_DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}  # fmt: skip
_SDAR: dict[str, Any] = {
    **_QWEN3, "architectures": ["SDARForCausalLM"], "hidden_size": 2560, "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32, "tie_word_embeddings": False, "block_size": 4,
}  # fmt: skip
_A2D: dict[str, Any] = {
    **_QWEN3, "architectures": ["A2DQwen3LMHeadModel"], "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16, "tie_word_embeddings": True,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"], "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "type_vocab_size": 2, "torch_dtype": "float32",
}  # fmt: skip
_MODERNBERT: dict[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"], "vocab_size": 50368, "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22, "num_attention_heads": 12, "max_position_embeddings": 8192,
    "torch_dtype": "float32",
}  # fmt: skip
_QWEN3_8B: dict[str, Any] = {
    **_QWEN3, "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
_RND1: dict[str, Any] = {
    **_QWEN3, "architectures": ["RND1LM"], "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    "tie_word_embeddings": False,
}  # fmt: skip
# of the next three no config.json was seen: the sizes are those that others report
_LLADA2: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"], "vocab_size": 157184, "hidden_size": 2048,
    "intermediate_size": 5120, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 32768, "num_experts": 256, "num_experts_per_tok": 8,
    "moe_intermediate_size": 512, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 8,
    "topk_group": 4, "routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5, "rope_theta": 600000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_LLADA_MOE: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"], "vocab_size": 157184, "hidden_size": 2048,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
    "dense_intermediate_size": 8192, "expert_intermediate_size": 1024, "num_experts": 64,
    "num_experts_per_tok": 8, "moe_layer_freq": [1] * 16, "qk_layernorm": True,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_DIFFUSION_GEMMA: dict[str, Any] = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"], "dtype": "bfloat16", "canvas_length": 256,
    "text_config": {
        "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "head_dim": 256, "global_head_dim": 512, "moe_intermediate_size": 704, "num_experts": 128,
        "top_k_experts": 8, "sliding_window": 1024, "max_position_embeddings": 262144,
    },
    "vision_config": {
        "model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72,
    },
}  # fmt: skip
# the sizes in the published config.json of the models that hyperparameter files ship for, for those who have
# not fetched them yet
PUBLISHED: dict[str, dict[str, Any]] = {
    "GSAI-ML/LLaDA-8B-Base": _LLADA, "GSAI-ML/LLaDA-8B-Instruct": _LLADA, "GSAI-ML/LLaDA-1.5": _LLADA,
    "Dream-org/Dream-v0-Base-7B": _DREAM, "Dream-org/Dream-v0-Instruct-7B": _DREAM,
    "Gen-Verse/MMaDA-8B-Base": {**_LLADA, "architectures": ["MMadaModelLM"], "vocab_size": 134656,
        "embedding_size": 134656},
    "JetLM/SDAR-4B-Chat": _SDAR,
    "google-bert/bert-base-uncased": _BERT, "answerdotai/ModernBERT-base": _MODERNBERT,
    "Efficient-Large-Model/Fast_dLLM_v2_7B": {**_DREAM, "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "bd_size": 32},
    "Qwen/Qwen3-8B": _QWEN3_8B, "tencent/WeDLM-8B-Base": {**_QWEN3_8B, "architectures": ["WeDLMForCausalLM"]},
    "radicalnumerics/RND1-Base-0910": _RND1, "inclusionAI/LLaDA2.0-mini": _LLADA2,
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": _LLADA_MOE,
    "google/diffusiongemma-26B-A4B-it": _DIFFUSION_GEMMA,
    "Gen-Verse/TraDo-4B-Instruct": _SDAR,  # trained from SDAR; its own config.json was not seen
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": _A2D, "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": _A2D,
}  # fmt: skip


@dataclass(frozen=True)
class ModelSize:
    """A model's measures.

    Attributes:
        family: its family's name.
        source: where the configuration was read: a folder, or `published` for the package's own note of it.
        parameters: how many, tied ones once.
        dtype: that of the checkpoint.
        layers, hidden, inner, vocabulary: number of layers, width of the residual stream, width of the keys,
            rows of the head.
    """

    family: str
    source: str
    parameters: int
    dtype: str
    layers: int
    hidden: int
    inner: int
    vocabulary: int

    def weights(self, dtype: str) -> int:
        """Bytes of the parameters in `dtype`."""
        return self.parameters * DTYPES[dtype]

    def statistics(self, layers: int = 1) -> int:
        """Bytes of the second moments of some layers, with the factor that solves with them: float64, on the
        CPU.
        """
        return 2 * 8 * self.inner**2 * layers

    def activations(self, dtype: str, rows: int = ROWS, length: int = LENGTH, slots: int = SLOTS) -> int:
        """Bytes that one pass of the value optimisation keeps for its gradient, at most: an estimate, for an
        edit at the first layer.
        """
        token = (
            DTYPES[dtype] * (8 * self.hidden + 3 * self.inner) + 4 * 4 * self.hidden
        )  # norms are taken in float32
        logits = 3 * 4 * rows * slots * self.vocabulary  # in float32, their softmax, the gradient
        return rows * length * (self.layers * token + DTYPES[dtype] * self.hidden) + logits


def model_size(name_or_folder: str | Path) -> ModelSize:
    """The measures of a model folder, of a hub id in the hub's cache, or of one whose sizes the package
    knows.

    Raises:
        CheckpointError: if it is none of these, or its configuration cannot be used.
    """
    folder = _here(str(name_or_folder))
    if folder is None:
        config, files = PUBLISHED[str(name_or_folder)], None
        spec = by_architecture(config)[0]
    else:
        config = read_config(folder)
        files = weight_files(folder) if any(folder.glob("model*.safetensors*")) else None
        spec = by_architecture(config)[0] if files is None else detect(config, files)
    model = _empty_model(spec, config, _MOST_LAYERS if files is None else len(files))
    blocks = model.get_submodule(spec.paths.block.rsplit(".", 1)[0])
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    inner = _inner(spec, config, model, hidden)
    parameters = sum(p.numel() for n, p in model.named_parameters() if n not in tied_names(spec, model))
    dtype = str(_dtype(None, config)).removeprefix("torch.")
    return ModelSize(
        spec.name, str(folder or "published"), parameters, dtype, len(blocks), hidden, inner, vocabulary
    )


def _inner(spec: FamilySpec, config: Mapping[str, Any], model: Any, hidden: int) -> int:
    """Width of the keys of the family's own site: of a mixture the shared expert's, or all that a token goes
    through.
    """
    if spec.experts is not None:
        experts = spec.experts(config)
        return experts.shared or experts.top * experts.inner
    down = tuple(model.get_submodule(spec.paths.down.format(0)).weight.shape)
    return next((n for n in down if n != hidden), hidden)


def _here(name: str) -> Path | None:
    """The model's folder on this machine; None where only its published sizes are known."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return Path(cached).parent
    if name in PUBLISHED:
        return None
    raise CheckpointError(
        f"{name!r} is neither a folder, nor one of the package's twins, nor in the hub's cache on this"
        f" machine, so its size is not known: fetch its config.json first (hf download {name} config.json),"
        " or give its folder"
    )
