"""The tables of README.md, made from the files in `results/`.

python benchmarks/batches/tables.py    # writes them between the marks in README.md
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from easyedit_mdm.report.summaries import bootstrap_mean

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCORES = ("exact", "one_step", "paraphrase", "neighbours", "untouched")


def rows(head: list[str], lines: list[list[Any]]) -> str:
    """A table in Markdown."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in every)


def read(pattern: str) -> list[tuple[Path, dict[str, Any]]]:
    """Every line of some files."""
    paths = sorted(RESULTS.glob(pattern))
    return [(path, json.loads(line)) for path in paths for line in path.read_text().splitlines()]


def test_table() -> str:
    """What `run.py` found, with intervals."""
    lines = []
    for _, line in read("test-*.jsonl"):
        cells = []
        for score in SCORES:
            values = line["scores"].get(score)
            found = bootstrap_mean(values, range(len(values))) if values else None
            cells.append(f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else "-")
        norm = line["scores"].get("norm_ratio")
        what = [f"{line['facts']} by {line['batch']}", f"`{line['model']}`", line["arm"]]
        lines.append([*what, *cells, "-" if norm is None else f"{norm:.1f}", line["cpu_seconds"]])
    lines.sort(key=lambda cells: (cells[0], cells[2], cells[1]))
    return rows(["facts", "model", "arm", *SCORES, "\\|\\|dW\\|\\| / \\|\\|W\\|\\|", "CPU s"], lines)


def tries_table() -> str:
    """The search on validation facts."""
    tries = json.loads((RESULTS / "tries.json").read_text())["tries"]
    lines = [
        [f"`{t['model']}`", t["layers"][0], t["arm"], *(f"{t[s]:.2f}" if s in t else "-" for s in SCORES)]
        for t in tries
    ]
    return rows(["model", "layer", "arm", *SCORES], lines)


def keys_table() -> str:
    """Ranks and what reaches whom, at lambda 100 and 1000."""
    lines = []
    for path, line in read("keys-*.jsonl"):
        by = {w["lambda"]: w for w in line["weights"]}
        cells = [f"`{path.stem.removeprefix('keys-')}`", line["layer"], line["rank_of_subject_keys"]]
        cells += [line["rank_of_all_keys"], f"{line['bare_key_from_mean_key']:.2f}"]
        for weight in (100, 1000):
            left, others = by[weight]["residual_at_bare_key"], by[weight]["reaches"]["other subject"]
            cells.append(f"{left:.2f}, {others:.2f}")
        lines.append(cells)
    lines.sort(key=lambda cells: (cells[0], cells[1]))
    head = ["model", "layer", "rank, 164 subjects", "rank, all tokens", "moves"]
    return rows([*head, "missing, others (lambda 100)", "missing, others (lambda 1000)"], lines)


def main() -> None:
    """Write the tables into README.md."""
    path = HERE / "README.md"
    text = path.read_text(encoding="utf-8")
    for mark, table in (("keys", keys_table()), ("tries", tries_table()), ("test", test_table())):
        text = re.sub(
            f"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
            lambda m, table=table: f"{m[1]}{table}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
