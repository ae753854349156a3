"""The small models that ship with the package, the world they know, and how they were trained."""

from easyedit_mdm.twins.folders import TWINS, twin_folder

__all__ = ["TWINS", "twin_folder"]
