"""The tables of this folder's README out of a run of `easyedit-mdm adapt`: its curve and its gates.

python benchmarks/adapt/report.py benchmarks/adapt/smollm2-block > benchmarks/adapt/smollm2-block/results.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NAMES = {
    "first_slot": "first slot: nats above the base",
    "known_facts": "one-token facts that the base knows",
    "codes": "codes of four words, exact in N steps",
    "steps": "tokens right: N steps less one step",
}


def curve(lines: list[dict[str, Any]]) -> str:
    """Held-out loss by mask ratio, a row for each point of the curve."""
    ratios = list(lines[0]["loss"])
    head = ["tokens", "masked slots", *ratios, "clean copy, next token", "base, next token"]
    rows = [
        [line["tokens"], line["slots"], *(f"{line['loss'][r]:.2f}" for r in ratios)]
        + [f"{line['next_token']:.2f}", f"{line['teacher']:.2f}"]
        for line in lines
    ]
    return table(head, rows)


def gates(report: dict[str, Any]) -> str:
    """Each gate: what was measured, on how many cases, what was needed."""
    rows = []
    for name, words in NAMES.items():
        gate = report[name]
        needed = f"{'at most' if name == 'first_slot' else 'at least'} {gate['needed']:.2f}"
        rows.append([words, f"{gate['value']:.3f}", needed, gate["n"], "yes" if gate["passed"] else "no"])
    return table(["gate", "value", "needed", "cases", "passed"], rows)


def details(report: dict[str, Any]) -> str:
    """What stands behind the gates."""
    first, codes, longer = report["first_slot"], report["codes"], report["steps"]["longer_facts"]
    rows = [
        ["first slot, loss in nats", f"{first['model']:.2f}", f"{first['teacher']:.2f}"],
        ["codes, exact", f"{codes['exact']:.2f}", f"{codes['teacher']:.2f}"],
        ["codes, tokens in N steps / in one", _both(codes), ""],
        [
            f"facts of 2 to 8 tokens that the base writes ({longer['n']}), exact",
            f"{longer['exact']:.2f}",
            "1.00",
        ],
        ["the same, tokens in N steps / in one", _both(longer), ""],
    ]
    for source, known in report["known_facts"]["by_source"].items():
        rows.append([f"one-token facts of {source} ({known['n']})", f"{known['value']:.2f}", "1.00"])
    return table(["", "model", "base"], rows)


def _both(scores: dict[str, Any]) -> str:
    return f"{scores['tokens_n_steps']:.2f} / {scores['tokens_one_step']:.2f}"


def samples(report: dict[str, Any]) -> str:
    """The page of samples."""
    return "\n".join(f"- **{s['prompt']}**{' '.join(s['text'].splitlines())}" for s in report["samples"])


def table(head: list[Any], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    points = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    measured = json.loads((folder / "gates.json").read_text())
    parts = {
        "Curve": curve(points),
        "Gates": gates(measured),
        "Behind them": details(measured),
        "Samples": samples(measured),
    }
    print("\n\n".join(f"## {title}\n{part}" for title, part in parts.items()))
