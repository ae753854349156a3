"""Adapters: what a language model is to an editor, whatever its family and paradigm."""

from easyedit_mdm.models.adapter import Adapter, adapt
from easyedit_mdm.models.families import FAMILIES
from easyedit_mdm.models.loading import load_adapter
from easyedit_mdm.models.spec import FamilySpec, ModulePaths

__all__ = ["FAMILIES", "Adapter", "FamilySpec", "ModulePaths", "adapt", "load_adapter"]
