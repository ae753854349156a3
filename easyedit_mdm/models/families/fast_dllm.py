"""Fast-dLLM v2 (arXiv 2509.26328): a Qwen2.5 that sees blocks and predicts token j at j - 1."""

from __future__ import annotations

from dataclasses import replace

from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.families._registry import FAMILIES
from easyedit_mdm.models.families.qwen2 import QWEN2
from easyedit_mdm.models.spec import Config, FamilySpec

_BLOCK = 32  # of its `generate`, whatever the configuration says; the release says 32 as well


def attention(config: Config) -> Attention:
    """Blocks of `bd_size`, counted from the row's start, the first token of each by itself."""
    return Attention(config.get("bd_size", _BLOCK), first_alone=True)


FAST_DLLM: FamilySpec = replace(
    QWEN2,
    name="fast-dllm-v2",
    paradigm="masked",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    attention=attention,
    mask_id=151665,
    native_model_types=(),
    releases="Fast-dLLM v2 1.5B, 7B",
    verified=(
        "published code on a tiny checkpoint: logits to 1e-4, generate with sub-blocks and thresholds token"
        " for token"
    ),
)
FAMILIES.register("fast-dllm-v2")(FAST_DLLM)
