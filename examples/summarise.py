"""Print means and 95 % bootstrap intervals of EasyEdit result files: python examples/summarise.py
RESULTS.json ...
"""

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

SEED, DRAWS = 0, 10_000


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over records."""
    array = np.asarray(values, dtype=float)
    draws = np.random.default_rng(SEED).choice(array, (DRAWS, len(array))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{array.mean():.2f} [{low:.2f}, {high:.2f}]"


def column(records: list[dict], section: str, key: str) -> str:
    """One figure of the multi-step section."""
    return interval(
        [r["post"]["multi_step"][section][key] for r in records if section in r["post"]["multi_step"]]
    )


table = Table(
    title=f"after the edit: mean over records, 95 % bootstrap interval ({DRAWS} draws, seed {SEED})"
)
for title in (
    "results",
    "n",
    "rewrite tokens",
    "rewrite exact",
    "first commit",
    "rephrase tokens",
    "locality",
):
    table.add_column(title)
for path in map(Path, sys.argv[1:]):
    records = json.loads(path.read_text())
    locality = interval([np.mean(r["post"]["locality"]["neighborhood_acc"]) for r in records])
    cells = [
        column(records, s, k)
        for s, k in (
            ("rewrite", "token_acc"),
            ("rewrite", "exact"),
            ("rewrite", "first_commit"),
            ("rephrase", "token_acc"),
        )
    ]
    table.add_row(path.parent.name, str(len(records)), *cells, locality)
Console(width=160).print(table)
