"""Where the twins can be edited: success of the optimised value as an activation, by layer and target length,
on the validation split.

    python benchmarks/twins_layers.py --model twin-llada --out benchmarks/twins_layers-twin-llada.json

For each layer, the first `--facts` validation facts are edited to a target of every length with the settings
of hparams/ROME_MDM/<model>.yaml, the value kept within `--clamp` times the norm of the MLP's output. The
value is added at the site while the model decodes; no weight is changed. So this is the ceiling of every
method that writes there. `--site` says which of the subject's tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from easyedit_mdm import EditRequest, ROMEMDMHyperParams, load_model
from easyedit_mdm.editing.activation import optimise_at, success_as_activation
from easyedit_mdm.twins.benchmark import cases
from easyedit_mdm.twins.world import World


def main() -> None:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="twin-llada")
    parser.add_argument("--schedule", help="state_schedule (default: the file's)")
    parser.add_argument("--site", default="subject_last", choices=("subject_last", "subject_first"))
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--clamp", type=float, default=4.0)
    parser.add_argument("--out")
    args = parser.parse_args()
    world, model = World.build(), load_model(args.model)
    hparams = ROMEMDMHyperParams.from_hparams(f"ROME_MDM/{args.model}")
    hparams = dataclasses.replace(
        hparams,
        clamp_norm_factor=args.clamp,
        fact_token=args.site,
        state_schedule=args.schedule or hparams.state_schedule,
    )
    chosen = [c for c in cases(world, "validation")][: args.facts * world.settings.max_length]
    requests, results, began = [EditRequest.of(c.request()) for c in chosen], [], time.monotonic()
    for layer in args.layers if args.layers is not None else range(model.layers):
        values = optimise_at(model, requests, dataclasses.replace(hparams, layers=[layer]))
        done = success_as_activation(model, values)
        for length in range(1, world.settings.max_length + 1):
            right = [d for d, c in zip(done, chosen) if c.length == length]
            ratio = [float(r) for r, c in zip(values.ratio, chosen) if c.length == length]
            results.append(
                {
                    "layer": layer,
                    "n_tokens": length,
                    "n": len(right),
                    "activation": sum(right) / len(right),
                    "norm_ratio": sum(ratio) / len(ratio),
                }
            )
        Console().print(
            f"layer {layer}: {[round(r['activation'], 2) for r in results if r['layer'] == layer]}"
        )
    tell(args.model, hparams, results)
    if args.out:
        report = {
            "model": args.model,
            "hyperparameters": hparams.to_dict(),
            "seconds": round(time.monotonic() - began),
            "results": results,
        }
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def tell(model: str, hparams: ROMEMDMHyperParams, results: list[dict]) -> None:
    """The table: a row a layer."""
    lengths = sorted({r["n_tokens"] for r in results})
    table = Table(
        title=(
            f"{model}, {hparams.state_schedule}, {results[0]['n']} validation facts, success as an activation"
        )
    )
    for column in ("layer", *(f"N = {n}" for n in lengths), "norm ratio"):
        table.add_column(column, justify="right")
    for layer in sorted({r["layer"] for r in results}):
        rows = [r for r in results if r["layer"] == layer]
        table.add_row(
            str(layer),
            *(f"{r['activation']:.2f}" for r in rows),
            f"{sum(r['norm_ratio'] for r in rows) / len(rows):.1f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
