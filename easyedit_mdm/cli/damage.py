"""What `easyedit-mdm damage` prints."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.harness.damage import HEADS, DamageJob, cells, damage
from easyedit_mdm.harness.scoring import Scoring


def print_damage(
    model: str,
    edits: str,
    tasks: str,
    include_path: str | None = None,
    limit: int | None = None,
    out: str | None = None,
    *,
    samples: int = 128,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Measure, and print the table.

    Raises:
        HyperParameterError: if no task is named.
        EasyEditMDMError: as `harness.damage.damage`.
    """
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise HyperParameterError("--tasks names no task: give some, with commas between them")
    scoring = Scoring(samples=samples, seed=seed)
    rows = damage(DamageJob(model, edits, names, include_path, limit, scoring, device), out)
    table = Table(*HEADS)
    for row in rows:
        table.add_row(*map(escape, cells(row)))
    Console().print(table)
