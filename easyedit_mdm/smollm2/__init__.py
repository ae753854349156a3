"""SmolLM2-135M out of a pip package, and the masked models made of it."""

from easyedit_mdm.smollm2.folders import SMOLLM2, smollm2_folder

__all__ = ["SMOLLM2", "smollm2_folder"]
