"""iLLaDA: a Llama that sees both sides, under Llama's own names; grouped heads, tied embeddings."""

from __future__ import annotations

from typing import Any

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.families._registry import FAMILIES, LLAMA_KEYS, pick
from easyedit_mdm.models.spec import Config, FamilySpec


def native_config(config: Config) -> dict[str, Any]:
    """Llama's configuration for an iLLaDA `config.json`.

    Raises:
        CheckpointError: for a variant whose arithmetic is not Llama's.
    """
    if config.get("layer_norm_eps") is not None:
        raise CheckpointError(
            f"iLLaDA with layer_norm_eps={config['layer_norm_eps']!r} is not supported natively: it has"
            " LayerNorms, Llama RMS norms"
        )
    return pick(
        config, [key for key in LLAMA_KEYS if key != "head_dim"]
    )  # its heads always share the width evenly


FAMILIES.register("illada")(
    FamilySpec(
        name="illada",
        paradigm="masked",
        architectures=("ILLaDAForCausalLM",),
        probe="model.layers.0.mlp.gate_proj.weight",
        native="Llama",
        native_config=native_config,
        mask_id=5,
        releases="iLLaDA-8B",
        verified=(
            "inference path copied out of the published code, on a tiny checkpoint (configuration file not"
            " found): logits to 1e-4, LLaDA's generate.py token for token"
        ),
    )
)
