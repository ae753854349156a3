"""LLaDA (arXiv 2502.09992): a Llama that sees both sides. The hub's key names are OLMo's; the arithmetic is
Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.families._registry import FAMILIES, pick
from easyedit_mdm.models.spec import FamilySpec

_MUST_BE = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "activation_type": "silu",
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "include_bias": False,
    "bias_for_layer_norm": False,
    "include_qkv_bias": False,
}


def native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama's configuration for a LLaDA `config.json`.

    Raises:
        CheckpointError: for a variant whose arithmetic is not Llama's.
    """
    for key, wanted in _MUST_BE.items():
        if config.get(key, wanted) not in (wanted, None):
            raise CheckpointError(
                f"LLaDA with {key}={config[key]!r} is not supported natively (only {wanted!r} is Llama's"
                " arithmetic)"
            )
    heads = config["n_heads"]
    return {
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or heads,
        "max_position_embeddings": config["max_sequence_length"],
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_theta": config.get("rope_theta", 10000.0),
        "tie_word_embeddings": bool(config.get("weight_tying", False)),
        **pick(config, ("eos_token_id", "pad_token_id")),
        "bos_token_id": None,
    }


_BLOCK, _LAYER = "model.transformer.blocks.{}.", "model.layers.{}."

LLADA = FamilySpec(
    name="llada",
    paradigm="masked",
    architectures=("LLaDAModelLM", "LLaDAModel"),
    probe="model.transformer.blocks.0.ff_proj.weight",
    native="Llama",
    native_config=native_config,
    rename=(
        (_BLOCK + "q_proj.", _LAYER + "self_attn.q_proj."),
        (_BLOCK + "k_proj.", _LAYER + "self_attn.k_proj."),
        (_BLOCK + "v_proj.", _LAYER + "self_attn.v_proj."),
        (_BLOCK + "attn_out.", _LAYER + "self_attn.o_proj."),
        (_BLOCK + "ff_proj.", _LAYER + "mlp.gate_proj."),
        (_BLOCK + "up_proj.", _LAYER + "mlp.up_proj."),
        (_BLOCK + "ff_out.", _LAYER + "mlp.down_proj."),
        (_BLOCK + "attn_norm.", _LAYER + "input_layernorm."),
        (_BLOCK + "ff_norm.", _LAYER + "post_attention_layernorm."),
        ("model.transformer.wte.", "model.embed_tokens."),
        ("model.transformer.ln_f.", "model.norm."),
        ("model.transformer.ff_out.", "lm_head."),
    ),
    mask_id=126336,
    releases="LLaDA-8B Base and Instruct, LLaDA-1.5",
    verified=(
        "published code on a tiny checkpoint: logits to 1e-5, generate.py token for token; LLaDA-1.5 read"
        " only (same class)"
    ),
)
FAMILIES.register("llada")(LLADA)
