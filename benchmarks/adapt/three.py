"""SmolLM2's two masked models and their autoregressive control, one after another, in minutes that are given.

    python benchmarks/adapt/three.py --data-dir DATA_DIR --out runs/three --minutes 2.5 2.5 0.7

All read the same text and the model's own samples; full attention begins with the adapter of the block model.
Each folder under OUT is one of `easyedit-mdm adapt`, and goes on where it was stopped. The gates:
`easyedit-mdm adapt --gates OUT/NAME/adapter`.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

from easyedit_mdm.training.commands import AdaptJob, adapt_model
from easyedit_mdm.training.recipe import Recipe

NAMES = {"smollm2-block": "block", "smollm2-mdm": "full", "smollm2-control": "causal"}
KEPT = ("adapter", "curve.jsonl", "log.jsonl")


def main() -> None:
    """Train the three."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, nargs=3, required=True, help="block, full, causal")
    parser.add_argument(
        "--lr", type=float, nargs=3, default=[8e-4, 6e-4, 3e-4], help="highest rates, likewise"
    )
    parser.add_argument("--rows", type=int, default=128, help="rows of a step, 256 columns each")
    parser.add_argument("--parts", type=Path, help="a folder that gets what was made so far, in 16 MB pieces")
    args = parser.parse_args()
    samples = None
    for (name, attention), minutes, lr in zip(NAMES.items(), args.minutes, args.lr):
        began, out = time.monotonic(), args.out / name
        adapt_model(
            AdaptJob(
                "smollm2", out, Recipe(attention, rows=args.rows, lr=lr), minutes=minutes, gates=False,
                data_dir=args.data_dir, samples=samples, save_seconds=120,
                start_from=str(args.out / "smollm2-block" / "adapter") if attention == "full" else None,
            )
        )  # fmt: skip
        samples = samples or str(out / "samples.jsonl")
        print(f"{name}: {time.monotonic() - began:.0f} s in all", flush=True)
        if args.parts:
            pack(args.out, args.parts)


def pack(out: Path, parts: Path) -> None:
    """Adapters and logs, in pieces that small channels take: `cat OUT.* | tar x`."""
    files = [
        str((out / name / kept).relative_to(out)) for name in NAMES for kept in KEPT if (out / name).exists()
    ]
    command = f"tar c -C {out} {' '.join(files)} {next(iter(NAMES))}/samples.jsonl"
    subprocess.run(f"{command} | split -b 16000000 - {parts}/three.", shell=True, check=True)


if __name__ == "__main__":
    main()
