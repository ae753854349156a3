"""WeDLM: a causal Qwen whose hidden slots come last, so that they see all that is known; no shift."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.families._registry import FAMILIES
from easyedit_mdm.models.families.qwen3 import QWEN3, native_config
from easyedit_mdm.models.spec import Config


def with_norms(config: Config) -> dict[str, Any]:
    """Qwen3's configuration.

    Raises:
        CheckpointError: for the releases on Qwen2.5, which have biases in place of QK norms.
    """
    if not config.get("qk_norm", True) or config.get("attention_bias", False):
        raise CheckpointError(
            f"WeDLM with qk_norm={config.get('qk_norm')!r}, attention_bias={config.get('attention_bias')!r}"
            " is not supported: only Qwen3's arithmetic (true, false) is"
        )
    return native_config(config)


FAMILIES.register("wedlm")(
    replace(
        QWEN3,
        name="wedlm",
        paradigm="masked",
        architectures=("WeDLMForCausalLM",),
        native_config=with_norms,
        attention=Attention(masks_last=True),
        shift=False,
        native_model_types=(),
        releases="WeDLM-8B",
        verified=(
            "published code (hf_compat) on a tiny checkpoint: logits to 1e-4, generate_wedlm token for token;"
            " its engine was not run"
        ),
    )
)
