"""dLLM's A2D models (github.com/ZHZisZZ/dllm): Qwen3s adapted to denoising, `mdlm` with full attention and
`bd3lm` in blocks.

The two are published as one class with one configuration: which of them a folder holds is not written in it.
Full attention is assumed; give `block`, or write `block_size` into `config.json`, for the other.
"""

from __future__ import annotations

from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.families._registry import FAMILIES
from easyedit_mdm.models.families.qwen3 import native_config
from easyedit_mdm.models.spec import Config, FamilySpec


def attention(config: Config) -> Attention:
    """Full, or blocks that begin with the canvas."""
    return Attention(config.get("block_size"), edges="canvas")


FAMILIES.register("a2d-qwen3")(
    FamilySpec(
        name="a2d-qwen3",
        paradigm="masked",
        architectures=("A2DQwen3LMHeadModel",),
        probe="model.layers.0.self_attn.q_norm.weight",
        native="Qwen3",
        native_config=native_config,
        attention=attention,
        tokenizer="Qwen2TokenizerFast",
        since="4.51",
        releases="dLLM's Qwen3-0.6B-diffusion-mdlm and -bd3lm",
        verified=(
            "published code on a tiny checkpoint: logits to 1e-4, MDLMSampler and BD3LMSampler token for"
            " token"
        ),
    )
)
