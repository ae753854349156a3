"""Dream (arXiv 2508.15487): a Qwen2 that sees both sides and, having grown out of one, predicts token j at j
- 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_mdm.models.families._registry import FAMILIES, LLAMA_KEYS, pick
from easyedit_mdm.models.spec import FamilySpec


def native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen2's configuration for a Dream `config.json`: the same names, full attention everywhere."""
    return {**pick(config, LLAMA_KEYS), "use_sliding_window": False}


FAMILIES.register("dream")(
    FamilySpec(
        name="dream",
        paradigm="masked",
        architectures=("DreamModel",),
        probe="model.layers.0.self_attn.q_proj.bias",
        native="Qwen2",
        native_config=native_config,
        shift=True,
        mask_id=151666,
        tokenizer="Qwen2TokenizerFast",
        releases="Dream-7B Base and Instruct, Dream-Coder-7B, DiffuCoder-7B",
        verified=(
            "published code on a tiny checkpoint: logits to 1e-5, diffusion_generate token for token;"
            " Dream-Coder and DiffuCoder read only (same class)"
        ),
    )
)
