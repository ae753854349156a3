"""lm-evaluation-harness on masked models, edited ones too: `easyedit-mdm lm-eval --model easyedit_mdm ...`,
and `easyedit-mdm damage`. Needs the extra `lm-eval`; `scoring` alone does not.
"""

from __future__ import annotations

from pathlib import Path

from easyedit_mdm.editing import Edit
from easyedit_mdm.errors import EditError


def load_edits(folder: str | Path) -> list[Edit]:
    """The edit of a folder, or those of the folders in it, in the order of their names.

    Raises:
        EditError: if there is none, or one cannot be read.
    """
    path = Path(folder)
    if (path / "edit.json").is_file():
        return [Edit.load(path)]
    folders = sorted(file.parent for file in path.glob("*/edit.json"))
    if not folders:
        raise EditError(
            f"{path} holds no edit: give a folder that easyedit-mdm edit wrote, or a folder of such folders"
        )
    return [Edit.load(each) for each in folders]
