"""The only door to EasyEdit: finding it, importing it, joining it. Nothing else in the package imports
`easyeditor`.
"""

from __future__ import annotations

from typing import Any

from easyedit_mdm.host.finding import Host, find_easyedit
from easyedit_mdm.host.importing import import_easyedit
from easyedit_mdm.host.joining import register

__all__ = ["BaseEditor", "Host", "find_easyedit", "import_easyedit", "register"]


def __getattr__(name: str) -> Any:
    if name == "BaseEditor":
        return register().editor_class
    raise AttributeError(f"module 'easyedit_mdm.host' has no attribute {name!r}")
