"""Put the figures of benchmarks/ into the twins' model card (easyedit_mdm/twins/README.md), between its
markers.

python benchmarks/twins_card.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from multi_token.study import GRID

from easyedit_mdm.twins import TWINS

HERE = Path(__file__).parent
CARD = HERE.parent / "easyedit_mdm" / "twins" / "README.md"
LENGTHS = [str(n) for n in range(1, 9)]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def read(name: str) -> Any:
    """A results file."""
    return json.loads((HERE / name).read_text())


def training() -> str:
    """Last stage of each twin: steps, time, loss."""
    rows = []
    for name in TWINS:
        state = json.loads((CARD.parent / "weights" / name / "training.json").read_text())
        recipe = state["recipe"]
        start = recipe["start_from"] or "random"
        rows.append(
            [
                f"`{name}`",
                start,
                f"{state['step']:,}",
                f"{recipe['lessons']:.0%}",
                f"{state['seconds'] / 60:.0f} min",
                f"{state['loss']:.2f}",
            ]
        )
    return table(
        [
            "last stage",
            "starts from",
            "steps",
            "texts that are lessons",
            "time, one shared core",
            "last loss",
        ],
        rows,
    )


def evaluation() -> str:
    """Recall, held-out phrasings, canvas of 16, editability."""
    figures = read("twins_eval.json")
    rows = [
        [f"`{m}`", k, str(cells["1"]["n"]), *(f"{cells[n]['value']:.2f}" for n in LENGTHS)]
        for m in figures
        for k, cells in figures[m].items()
    ]
    return table(["model", "", "facts a length", *(f"N = {n}" for n in LENGTHS)], rows)


def search() -> str:
    """The study's tries on the validation split."""
    rows = []
    for path in sorted((HERE / "multi_token" / "results").glob("search-*.jsonl")):
        header, *found = (json.loads(line) for line in path.read_text().splitlines())
        for key in dict.fromkeys((r["method"], r["arm"], r["try"]) for r in found):
            some = [r for r in found if (r["method"], r["arm"], r["try"]) == key]
            tried = GRID[key[0]][key[2]]
            shares = [
                f"{sum(float(r.get(m) or 0) for r in some) / len(some):.2f}"
                for m in ("exact", "paraphrase", "kept")
            ]
            where = [str(tried["layers"]), f"{tried['clamp_norm_factor']:g}"]
            rows.append([f"`{header['model']}`", key[0], key[1], *where, str(len(some)), *shares])
    return table(
        ["model", "method", "states", "layers", "clamp", "edits", "exact", "paraphrase", "kept"], rows
    )


def main() -> None:
    """Rewrite the card."""
    text = CARD.read_text()
    for name, part in (("training", training), ("evaluation", evaluation), ("search", search)):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{CARD} has no place marked {name}")
        text = pattern.sub(lambda m, part=part: m[1] + part() + m[2], text)
    CARD.write_text(text)


if __name__ == "__main__":
    main()
