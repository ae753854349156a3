"""From a training checkpoint to a model folder in the hub's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from easyedit_mdm.common.files import write_json, write_tensors
from easyedit_mdm.models.families import FAMILIES
from easyedit_mdm.training.loop import CHECKPOINT, read_checkpoint
from easyedit_mdm.training.twins import RELATIVES, Recipe

_LLADA_FIXED = {
    "activation_type": "silu", "alibi": False, "attention_layer_norm": False, "bias_for_layer_norm": False,
    "block_type": "llama",
    "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False, "weight_tying": False, "model_type": "llada", "architectures": ["LLaDAModelLM"],
}  # fmt: skip


def export(checkpoint: Path, out: Path, tokenizer: Any, dtype: torch.dtype = torch.float16) -> dict:
    """Write `config.json`, `model.safetensors`, the tokenizer and `training.json` of a finished training run.

    Returns:
        the run's state: recipe, steps, seconds, loss.
    """
    trained, state = read_checkpoint(checkpoint / CHECKPOINT)
    recipe = Recipe(**state["recipe"])
    spec = FAMILIES[family_of(recipe)]
    tensors = {k[6:]: v for k, v in trained.items() if k.startswith("model.")}
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(
        out / "model.safetensors",
        {spec.hub_name(k): v.to(dtype) for k, v in tensors.items()},
        {"format": "pt"},
    )
    config = hub_config(
        recipe,
        len(tokenizer),
        tokenizer.eos_token_id,
        tokenizer.mask_token_id,
        "float32",  # what it is loaded in; half precision on the disk keeps the package small
    )
    write_json(out / "config.json", config)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", _tokenizer_config(tokenizer, recipe.positions))
    if state["recipe"]["start_from"]:
        state["recipe"]["start_from"] = RELATIVES.get(
            recipe.name, "another twin"
        )  # which twin, not which folder
    write_json(out / "training.json", state)
    return state


def family_of(recipe: Recipe) -> str:
    """The family in whose format a twin is written."""
    return {
        ("llama", "causal"): "llama",
        ("llama", "masked"): "llada",
        ("qwen2", "causal"): "qwen2",
        ("qwen2", "masked"): "dream",
    }[recipe.backbone, recipe.objective]


def hub_config(recipe: Recipe, vocabulary: int, eos: int, mask: int, dtype: str) -> dict:
    """`config.json` in the family's own fields."""
    common = {
        "vocab_size": vocabulary,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": dtype,
    }
    if family_of(recipe) == "llada":
        return {
            **_LLADA_FIXED, **common, "embedding_size": vocabulary, "d_model": recipe.hidden,
            "n_layers": recipe.layers,
            "n_heads": recipe.heads, "n_kv_heads": recipe.heads, "mlp_hidden_size": recipe.mlp,
            "mask_token_id": mask,
            "max_sequence_length": recipe.positions,
        }  # fmt: skip
    shape = {
        **common, "hidden_size": recipe.hidden, "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads, "intermediate_size": recipe.mlp, "hidden_act": "silu",
        "max_position_embeddings": recipe.positions,
        "tie_word_embeddings": False,
    }  # fmt: skip
    own = {
        "llama": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
        },
        "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
        "dream": {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": mask},
    }
    return {**shape, **own[family_of(recipe)]}


def _tokenizer_config(tokenizer, positions: int) -> dict:
    # the class that 4.x and 5.x both know; saving through transformers 5 names one that 4.x lacks
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "mask_token": tokenizer.mask_token, "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
