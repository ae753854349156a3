"""examples/tutorial.ipynb runs from top to bottom, and is committed without anything of the machine that ran
it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tutorial.ipynb"


def outputs(cells: list) -> str:
    """All text that the cells show."""
    return "".join(
        text
        for cell in cells
        if cell["cell_type"] == "code"
        for out in cell["outputs"]
        for text in out.get("text", "")
    )


def test_it_is_committed_clean():
    """Text outputs alone: no paths, no times, no errors, no versions of Python."""
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 7 and all(
        out["output_type"] == "stream" and out["name"] == "stdout" for cell in code for out in cell["outputs"]
    )
    assert not re.search(
        r"/(home|root|tmp|usr|work|opt|Users)/|\d+(\.\d+)? ?(s|ms|seconds)\b|\d{4}-\d\d-\d\d",
        outputs(book["cells"]),
    )
    assert all(cell["metadata"] == {} for cell in book["cells"]) and book["metadata"]["language_info"] == {
        "name": "python"
    }


@pytest.mark.end_to_end
def test_it_runs(tmp_path, monkeypatch):
    """In a kernel of its own, in a folder of its own: its assertions hold, the edit is written, and the file
    gives it back.
    """
    nbclient = pytest.importorskip(
        "nbclient", reason="nbclient is not installed: pip install easyedit-mdm[test]"
    )
    nbformat = pytest.importorskip(
        "nbformat", reason="nbformat is not installed: pip install easyedit-mdm[test]"
    )
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install easyedit-mdm[test]")
    here = str(NOTEBOOK.parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("EASYEDIT_MDM_CACHE", str(tmp_path / "cache"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = outputs(book.cells)
    target = re.search(r"'target_new': '([^']+)'", shown)[1]
    assert f"from the file: {target} | asked for: {target}" in shown
    assert re.search(r"denoising-aware +\{'edit': True", shown) and re.search(
        r"no edit +\{'edit': False", shown
    )
    assert shown.count("step 4:") == 2 and "layer 7:" in shown
    real = "step 3: The Eiffel Tower is located in the city of New York City"
    assert real in shown or "make smollm2" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "it leaves nothing behind"
