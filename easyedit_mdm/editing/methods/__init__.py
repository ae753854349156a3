"""The methods, a file each; a new one is imported here, which registers it."""

from easyedit_mdm.editing.methods import (  # noqa: F401  (registration)
    alphaedit,
    ft,
    grace,
    ike,
    lora,
    memit,
    r_rome,
    residual_memory,
    rome,
    wise,
)
from easyedit_mdm.editing.methods._registry import METHODS, Method

__all__ = ["METHODS", "Method"]
