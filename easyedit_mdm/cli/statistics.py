"""What `easyedit-mdm stats` does: collect second moments of several layers in one pass, and say how good they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from easyedit_mdm.api import load_model
from easyedit_mdm.common.files import write_json
from easyedit_mdm.common.ranks import launched
from easyedit_mdm.statistics import cache_folder, key_width, moments_for


def collect_statistics(
    model: str,
    dataset: str,
    layers: Sequence[int],
    tokens: int | None = None,
    mask_ratio: int | float | str = 0,
    settled: float | None = None,
    folder: str | Path | None = None,
    file: str | Path | None = None,
    eps: int | float = 1e-6,
    **options: Any,
) -> dict[str, Any]:
    """Find or make the second moments of some layers of a model, and report them.

    A second process that collects the same is refused. Processes that a launcher started together (torchrun,
    `accelerate launch`) share the text; the first one reports.

    Args:
        dataset, tokens, mask_ratio, settled, folder: see `easyedit_mdm.statistics.moments_for`.
        file: where to write the figures as JSON.
        eps: ridge under which the condition number is given.
        options: for `easyedit_mdm.load_model`.

    Returns:
        `{"model", "dataset", "folder", "layers": {layer: {"tokens", "condition", "effective_rank",
        "dimensions"}}}`.

    Raises:
        FileError: if another process is collecting the same; it is named.
    """
    ranks = launched()
    wanted = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    options["device"] = ranks.device(wanted)
    adapter = load_model(model, **options)
    sites = [adapter.site(layer) for layer in layers]
    collected = moments_for(
        adapter, sites, dataset, tokens, folder, mask_ratio, settled=settled, wait=False, ranks=ranks
    )
    report = {
        "model": str(model),
        "dataset": dataset,
        "mask_ratio": mask_ratio,
        "folder": str(cache_folder() if folder is None else folder),
        "eps": eps,
        "layers": {
            str(site.layer): {**moments.figures(eps), "dimensions": key_width(adapter, site)}
            for site, moments in zip(sites, collected)
        },
    }
    if ranks.first and file is not None:
        write_json(file, report)
    if ranks.first:
        _print_statistics(report)
    return report


def _print_statistics(report: dict[str, Any]) -> None:
    table = Table(
        title=f"second moments of {report['model']} over {report['dataset']}, in {report['folder']}"
    )
    for column in ("layer", "tokens", "dimensions", "effective rank", f"condition (eps {report['eps']:g})"):
        table.add_column(column, justify="right")
    for layer, figures in report["layers"].items():
        values = (
            figures["tokens"],
            figures["dimensions"],
            f"{figures['effective_rank']:.1f}",
            f"{figures['condition']:.3g}",
        )
        table.add_row(layer, *map(str, values))
    Console().print(table)
