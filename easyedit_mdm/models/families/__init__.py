"""One file a family. A new one registers a `FamilySpec` and is imported here; nothing else changes."""

from easyedit_mdm.models.families import a2d, dream, gpt2, llada, llama, qwen2, qwen3, sdar  # noqa: F401  (registration)
from easyedit_mdm.models.families._registry import FAMILIES

__all__ = ["FAMILIES"]
