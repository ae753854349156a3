"""DiffusionGemma: a canvas of random tokens, denoised by a Gemma that reads what stands before it causally.

Its encoder and its decoder have the same weights, and other buffers. What the encoder makes of the prompt,
the decoder reads through a cache; so both are one stack of layers here, under one mask: the prompt causal,
the canvas full, each column with its own buffers.
"""

from __future__ import annotations

from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.families._registry import FAMILIES, pick
from easyedit_mdm.models.spec import Config, FamilySpec, ModulePaths

_KEYS = "canvas_length image_token_id boi_token_id eoi_token_id initializer_range".split()


def native_config(config: Config) -> dict[str, Any]:
    """Its own configuration, of text and of images.

    Raises:
        CheckpointError: for a prompt that is not read causally, weights that are not shared, or an impossible
            canvas.
    """
    text, length = config["text_config"], config.get("canvas_length", 256)
    if text.get("use_bidirectional_attention") == "all":
        raise CheckpointError(
            "DiffusionGemma with use_bidirectional_attention='all' is not supported: its prompt is read"
            " causally"
        )
    if not config.get("tie_word_embeddings", True):
        raise CheckpointError(
            "DiffusionGemma with tie_word_embeddings=false is not supported: encoder and decoder would have"
            " weights of their own, and one edit would not reach both"
        )
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise CheckpointError(
            f"config.json says canvas_length={length!r}: a canvas has a whole number of tokens, at least 1"
        )
    return {
        "text_config": dict(text),
        "vision_config": dict(config["vision_config"]),
        "tie_word_embeddings": True,
        **pick(config, _KEYS),
    }


def seen(config: Any) -> int:
    """Tokens that a token of a sliding layer sees on its left."""
    return config.sliding_window - 1


_BLOCK = "model.decoder.layers.{}"

FAMILIES.register("diffusion-gemma")(
    FamilySpec(
        name="diffusion-gemma",
        paradigm="noised",
        architectures=("DiffusionGemmaForBlockDiffusion",),
        probe="model.decoder.layers.0.router.per_expert_scale",
        native="DiffusionGemma",
        ending="ForBlockDiffusion",
        native_config=native_config,
        paths=ModulePaths(
            backbone="model.decoder",
            block=_BLOCK,
            mlp=_BLOCK + ".mlp",
            down=_BLOCK + ".mlp.down_proj",
            attention=_BLOCK + ".self_attn",
            embedding="model.decoder.embed_tokens",
            norm=("model.decoder.norm",),
            context_block="model.encoder.language_model.layers.{}",
            canvas_entry="model.decoder.self_conditioning",
            shares="model.encoder",
        ),
        attention=Attention(context="causal"),
        window=seen,
        softcap="final_logit_softcapping",
        tied=(r"lm_head\.weight", r"model\.encoder\.language_model\..*"),
        stored=True,
        native_model_types=("diffusion_gemma",),
        since="5.11",
        releases="DiffusionGemma-26B-A4B (text)",
        verified=(
            "transformers' own class on a tiny checkpoint: logits to 1e-4, generate token for token; no"
            " images"
        ),
    )
)
