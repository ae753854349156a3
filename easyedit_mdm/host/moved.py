"""Names that EasyEdit imports and that newer versions of a package keep elsewhere, or no more."""

from __future__ import annotations

# where there is one that works, as `module:name`; asked only where the package lacks the name itself
MOVED = {
    # EasyEdit's wheel, for its BLIP-2
    "transformers.modeling_utils.apply_chunking_to_forward": (
        "transformers.pytorch_utils:apply_chunking_to_forward"
    ),
    "transformers.modeling_utils.prune_linear_layer": "transformers.pytorch_utils:prune_linear_layer",
    "transformers.modeling_utils.find_pruneable_heads_and_indices": (
        "transformers.pytorch_utils:find_pruneable_heads_and_indices"
    ),
    # UnKE and UnKE_ARE
    "transformers.modeling_attn_mask_utils._prepare_4d_causal_attention_mask": (
        "easyedit_mdm.host.masks:causal_attention_mask"
    ),
}

# the first version of the package that lacks a name, where it is known
LAST_WITH = {
    "transformers.modeling_utils.find_pruneable_heads_and_indices": "5",
    "transformers.modeling_attn_mask_utils": "5.24",
}
