"""One file a family. A new one registers a `FamilySpec` and is imported here; nothing else changes."""

from easyedit_mdm.models.families import (  # noqa: F401  (registration)
    a2d,
    bert,
    diffusion_gemma,
    dream,
    fast_dllm,
    gpt2,
    illada,
    llada,
    llada2,
    llada_moe,
    llama,
    mmada,
    modernbert,
    qwen2,
    qwen3,
    qwen3_moe,
    sdar,
    stable_diffcoder,
    wedlm,
)
from easyedit_mdm.models.families._registry import FAMILIES

__all__ = ["FAMILIES"]
