"""Edits: plain data in and out of a model (`change`, `stack`); sealed, saved, composed and exported (the
other files).
"""

from easyedit_mdm.editing.edit.attached import Attached
from easyedit_mdm.editing.edit.change import Change, Exact, LowRank
from easyedit_mdm.editing.edit.edit import Edit
from easyedit_mdm.editing.edit.side_memory import SideMemory
from easyedit_mdm.editing.edit.stack import PlainEdit, carried, identity, keeping, revert_all, write

__all__ = [
    "Attached",
    "Change",
    "Edit",
    "Exact",
    "LowRank",
    "PlainEdit",
    "SideMemory",
    "carried",
    "identity",
    "keeping",
    "revert_all",
    "write",
]
