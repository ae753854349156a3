"""ModernBERT (arXiv 2412.13663): a masked model with rotary positions, most of whose layers see only what is
near.
"""

from __future__ import annotations

from typing import Any

from easyedit_mdm.models.families._registry import FAMILIES, pick
from easyedit_mdm.models.spec import Config, FamilySpec, ModulePaths

_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_activation"
    " max_position_embeddings norm_eps norm_bias attention_bias attention_dropout embedding_dropout mlp_bias"
    " mlp_dropout local_attention layer_types global_attn_every_n_layers rope_parameters decoder_bias"
    " classifier_bias classifier_activation pad_token_id bos_token_id eos_token_id cls_token_id sep_token_id"
    " tie_word_embeddings"
).split()
_THETAS = {
    "full_attention": ("global_rope_theta", 160000.0),
    "sliding_attention": ("local_rope_theta", 10000.0),
}


def native_config(config: Config) -> dict[str, Any]:
    """ModernBERT's own configuration; the rotations' bases as older and as newer versions of transformers
    read them.
    """
    rotations = config.get("rope_parameters") or {}
    thetas = {
        kind: rotations.get(kind, {}).get("rope_theta", config.get(name, default))
        for kind, (name, default) in _THETAS.items()
    }
    return {
        **pick(config, _KEYS),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
        },
        **{_THETAS[kind][0]: theta for kind, theta in thetas.items()},
    }


FAMILIES.register("modernbert")(
    FamilySpec(
        name="modernbert",
        paradigm="masked",
        architectures=("ModernBertForMaskedLM",),
        probe="model.layers.0.attn.Wqkv.weight",
        native="ModernBert",
        ending="ForMaskedLM",
        native_config=native_config,
        paths=ModulePaths(
            down="model.layers.{}.mlp.Wo",
            attention="model.layers.{}.attn.Wo",
            embedding="model.embeddings.tok_embeddings",
            entry="model.embeddings",
            norm=("model.final_norm", "head"),
            head="decoder",
        ),
        bidirectional=True,
        window=lambda native: native.local_attention // 2,
        native_model_types=("modernbert",),
        tied=(r"decoder\.weight",),
        since="4.48",
        releases="ModernBERT, dLLM's ModernBERT-chat",
        verified=(
            "transformers' own class on a tiny checkpoint: logits to 1e-4, mask-predict and dLLM's"
            " MDLMSampler token for token"
        ),
    )
)
