from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.models.spec import FamilySpec

FAMILIES: Registry[FamilySpec] = Registry("model family")


def pick(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The entries of `config` that are present, not None, and in `names`.

    RND1 says `rope_scaling: false` for none, which transformers 4 takes for a mapping.
    """
    given = {name: config[name] for name in names if config.get(name) is not None}
    return {name: value for name, value in given.items() if name != "rope_scaling" or value is not False}


LLAMA_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    " hidden_act max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling"
    " rope_parameters attention_bias attention_dropout mlp_bias head_dim tie_word_embeddings bos_token_id"
    " eos_token_id pad_token_id"
).split()
