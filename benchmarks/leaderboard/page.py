"""README's tables from the published boards.

python benchmarks/leaderboard/page.py --board board       # copies the board here, and remakes its table
python benchmarks/leaderboard/page.py --smollm2 smollm2   # the same for that of suite smollm2
python benchmarks/leaderboard/page.py                     # remakes the tables from what is here
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from easyedit_mdm.common.files import write_text

HERE = Path(__file__).parent
FILES = ("leaderboard.json", "leaderboard.md", "leaderboard.csv", "leaderboard.svg", "suite.yaml")
HEADS = (
    "method", "one fact", "interval", "one step", "unedited", "16 at once", "20 in a row", "CounterFact",
    "s",
)  # fmt: skip
COLUMNS = (("twins", "single"), ("twins", "batch"), ("twins", "sequence"), ("counterfact", "single"))


def cell(entries: list[dict[str, Any]]) -> str:
    """Success and what is kept of one run, as `0.95 / 0.98`."""
    if not entries:
        return "–"
    measures = entries[0]["measures"]
    means = [measures[name]["mean"] if name in measures else None for name in ("success", "locality_kept")]
    return " / ".join("–" if mean is None else f"{mean:.2f}" for mean in means)


def mean(entries: list[dict[str, Any]], name: str) -> str:
    """A measure's mean."""
    value = entries[0]["measures"].get(name, {}).get("mean") if entries else None
    return "–" if value is None else f"{value:.2f}"


def mean_interval(entries: list[dict[str, Any]]) -> str:
    """The 95 % interval of success."""
    if not entries or entries[0]["measures"].get("success", {}).get("mean") is None:
        return "–"
    success = entries[0]["measures"]["success"]
    return f"[{success['low']:.2f}, {success['high']:.2f}]"


def seconds(entries: list[dict[str, Any]]) -> str:
    """Median seconds of an edit."""
    median = entries[0]["cost"].get("edit_seconds", {}).get("median") if entries else None
    return "–" if median is None else f"{median:.1f}"


def page(board: dict[str, Any]) -> str:
    """A table for each model: success / locality of every method."""
    entries = board["entries"]
    out = []
    for model in dict.fromkeys(entry["model"] for entry in entries):
        out += [f"**`{model}`**", "", "| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
        for method in dict.fromkeys(entry["method"] for entry in entries):
            runs = {
                place: [e for e in entries if (e["model"], e["method"]) == (model, method)
                        and (e["dataset"], e["mode"]) == place]
                for place in COLUMNS
            }  # fmt: skip
            single = runs[COLUMNS[0]]
            cells = [
                method, cell(single), mean_interval(single), mean(single, "success_one_step"),
                mean(single, "success_before"),
                *(cell(runs[place]) for place in COLUMNS[1:]), seconds(single),
            ]  # fmt: skip
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def smollm2(board: dict[str, Any]) -> str:
    """One table: success / locality of every method on each model, and after a paraphrase."""
    entries = board["entries"]
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    heads = ["method", *(f"`{model}`" for model in models)]
    out = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for method in dict.fromkeys(entry["method"] for entry in entries):
        runs = [[e for e in entries if (e["model"], e["method"]) == (model, method)] for model in models]
        cells = [method, *(f"{cell(run)} / {mean(run, 'rephrase_exact')}" if run else "–" for run in runs)]
        out.append("| " + " | ".join(cells) + " |")
    before = (mean([e for e in entries if e["model"] == model][:1], "success_before") for model in models)
    kept = "1.00"  # by definition
    out.append("| no edit | " + " | ".join(f"{value} / {kept} / –" for value in before) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    """Copy and remake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--board", type=Path, help="the folder that leaderboard wrote")
    parser.add_argument("--smollm2", type=Path, help="the folder of suite smollm2")
    args = parser.parse_args()
    for name in FILES if args.board else ():
        shutil.copy(args.board / name, HERE / name)
    for kind in ("json", "md") if args.smollm2 else ():
        shutil.copy(args.smollm2 / f"leaderboard.{kind}", HERE / f"smollm2.{kind}")
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, file, made in (("board", "leaderboard", page), ("smollm2", "smollm2", smollm2)):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(begin)
        board = json.loads((HERE / f"{file}.json").read_text(encoding="utf-8"))
        text = head + begin + made(board) + end + rest.split(end)[1]
    write_text(readme, text)


if __name__ == "__main__":
    main()
