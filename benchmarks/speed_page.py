"""Tables of docs/speed.md, put in from committed files.

python benchmarks/speed_page.py
"""

from __future__ import annotations

import json
from pathlib import Path

import growth
import large
import many_facts

from easyedit_mdm.common.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed.md"
TABLES = {"growth": growth.table, "large": large.table, "many_facts": many_facts.table}


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        found = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
        head, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition(f"<!-- /{name} -->")
        text = f"{head}<!-- {name} -->\n{table(found)}<!-- /{name} -->{after}"
    return text


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
