"""Hook of mkdocs: the site's pages are README.md, docs/ and what these link to, under their repository paths.

So a link works on the site as it does among the files. A link to a file that does not exist, or to a heading
that does not, fails `make docs`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?:\]\(|src=\")([^)#\s\"]+)")


def on_files(files: Files, config: Any) -> Files:
    """The files of the repository that are reached from README.md and docs/."""
    themes = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    wanted = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found: dict[str, File] = {}
    while wanted:
        path = wanted.pop(0)
        name = path.relative_to(ROOT).as_posix()
        if name in found or not path.is_file():
            continue
        found[name] = File.generated(config, name, abs_src_path=str(path))
        if path.suffix == ".md":
            linked = [(path.parent / target).resolve() for target in _LINK.findall(path.read_text("utf-8"))]
            wanted += [other for other in linked if other.is_relative_to(ROOT)]
    return Files([*themes, *found.values()])
