"""BERT: masked models from before diffusion. Learned positions; a norm after each half of a block, the
residual inside it.
"""

from __future__ import annotations

from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.families._registry import FAMILIES, pick
from easyedit_mdm.models.spec import Config, FamilySpec, ModulePaths

_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act"
    " max_position_embeddings type_vocab_size layer_norm_eps hidden_dropout_prob attention_probs_dropout_prob"
    " pad_token_id tie_word_embeddings"
).split()


def native_config(config: Config) -> dict[str, Any]:
    """BERT's own configuration, unknown entries left out.

    Raises:
        CheckpointError: for a decoder, or positions that are not learned and absolute.
    """
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise CheckpointError("BERT with is_decoder=true is not a masked model: its attention is causal")
    if config.get("position_embedding_type", "absolute") not in ("absolute", None):
        raise CheckpointError(
            f"BERT with position_embedding_type={config['position_embedding_type']!r} is not supported"
        )
    return {"tie_word_embeddings": True, **pick(config, _KEYS)}


FAMILIES.register("bert")(
    FamilySpec(
        name="bert",
        paradigm="masked",
        architectures=("BertForMaskedLM",),
        probe="bert.encoder.layer.0.intermediate.dense.weight",
        native="Bert",
        ending="ForMaskedLM",
        native_config=native_config,
        paths=ModulePaths(
            backbone="bert",
            block="bert.encoder.layer.{}",
            mlp="bert.encoder.layer.{}.output.dense",
            down="bert.encoder.layer.{}.output.dense",
            attention="bert.encoder.layer.{}.attention.output.dense",
            embedding="bert.embeddings.word_embeddings",
            entry="bert.embeddings",
            norm=("cls.predictions.transform",),
            head="cls.predictions.decoder",
        ),
        tokenizer="BertTokenizerFast",
        absolute_positions=True,
        bidirectional=True,
        native_model_types=("bert",),
        tied=(r"cls\.predictions\.decoder\.(weight|bias)",),
        unused=(r"^bert\.pooler\.", r"^cls\.seq_relationship\.", r"embeddings\.position_ids$"),
        aliases=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
        releases="BERT and what has its class",
        verified=(
            "transformers' own class on a tiny checkpoint: logits to 1e-4, mask-predict and dLLM's"
            " MDLMSampler token for token"
        ),
    )
)
