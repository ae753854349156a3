"""How fast edits are on one accelerator, within a time that is given; see run.sh.

Writes `kit.json` and `kit.md` after every figure. What does not fit into the time is listed with the reason;
what fails is listed with its error, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # imports are part of the minutes
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from measures import PARTS, Loaded, Run, free, loaded  # noqa: E402
from page import page  # noqa: E402
from rich.console import Console  # noqa: E402
from shapes import SETS, SHAPES  # noqa: E402

from easyedit_mdm import __version__  # noqa: E402

AIMS = {"plain_seconds_per_fact": 0.3, "aware_seconds_per_fact": 1.0, "statistics_seconds_per_million": 30.0}
# shares of the time that is left, in this order: seconds of 540, if all goes as planned
FIRST = {"load": 15, "statistics": 40, "edits": 170, "decoding": 10, "profile": 20, "error": 25}
CAUSAL = {"load": 10, "easyedit": 45, "edits": 25}
THEN = {"load": 15, "statistics": 50, "edits": 75, "decoding": 10, "profile": 10}


class Report:
    """What has been measured so far, on the disk after every row."""

    def __init__(self, out: Path, head: dict[str, Any], began: float):
        self.out, self.began = out, began
        self.found: dict[str, Any] = {**head, "finished": False, "seconds": 0.0, "aims": AIMS, "left_out": []}

    def note(self, part: str, **row: Any) -> None:
        """Add a row to a part."""
        self.found.setdefault(part, []).append(row)
        told = {k: v for k, v in row.items() if isinstance(v, (str, int, float)) and not isinstance(v, bool)}
        short = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())
        Console(width=200, highlight=False).print(f"{part}: {short}")
        self.write()

    def leave_out(self, what: str, why: str) -> None:
        """Note what is not measured."""
        self.found["left_out"].append({"what": what, "why": why})
        Console(width=200, highlight=False).print(f"left out: {what}: {why}")
        self.write()

    def write(self, finished: bool = False) -> None:
        """Both files, whole."""
        self.found |= {"finished": finished, "seconds": time.perf_counter() - self.began}
        for name, text in (("kit.json", json.dumps(self.found, indent=1)), ("kit.md", page(self.found))):
            new = self.out / f"{name}.new"
            new.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
            new.replace(self.out / name)


def head(args: argparse.Namespace) -> dict[str, Any]:
    """What was run, and on what."""
    import transformers

    cuda = args.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "what": "edit speed, random weights", "shapes": args.shapes, "device": device,
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None, "transformers": transformers.__version__,
        "easyedit_mdm": __version__, "commit": commit, "minutes": args.minutes, "facts": args.facts,
        "steps": args.steps, "parts": args.parts,
    }  # fmt: skip


def plan(names: list[str], parts: list[str]) -> list[tuple[str, str, float]]:
    """(shape, part, its share) of everything, in order."""
    found = []
    for i, name in enumerate(names):
        shares = CAUSAL if SHAPES[name].causal else FIRST if i == 0 else THEN
        found += [(name, part, share) for part, share in shares.items() if part == "load" or part in parts]
    return found


@contextlib.contextmanager
def stopped_at(end: float, minutes: float) -> Iterator[None]:
    """Whatever is running at `end` is broken off with a TimeoutError, once."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"the {minutes:g} minutes were over in the middle of it")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(end - time.perf_counter(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(run: Run, todo: list[tuple[str, str, float]], began: float) -> None:
    """Run the parts; each has its share of what is left when it begins."""
    model: Loaded | None = None
    for i, (name, part, share) in enumerate(todo):
        now = time.perf_counter()
        left = began + run.minutes * 60 - now
        run.ends = now + left * share / sum(share for _, _, share in todo[i:])
        if part == "load":
            model = None
            free()
        if run.left <= 0 or (model is None and part != "load"):
            why = f"the {run.minutes:g} minutes are over" if run.left <= 0 else "its model was not made"
            run.leave_out(f"{name}, {part}", why)
            continue
        failed = ""
        try:
            with stopped_at(began + run.minutes * 60, run.minutes):
                if part == "load":
                    model = loaded(run, name)
                elif model is not None:
                    PARTS[part](run, model)
        except Exception as error:  # whatever it is, the minutes on a card are too few to lose the rest
            failed = f"failed: {type(error).__name__}: {error}"[:500]
        if failed:
            run.leave_out(f"{name}, {part}", failed)
            free()  # the error, which held on to tensors, is gone


def main(arguments: list[str] | None = None, began: float | None = None) -> Path:
    """Measure, and return the folder with the report. `began`: when the minutes began; now, by default."""
    began = time.perf_counter() if began is None else began
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", default=["all"], choices=[*SETS, *SHAPES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--steps", type=int, default=25, help="v_num_grad_steps")
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--out", required=True)
    args = parser.parse_args(arguments)
    args.shapes = [name for given in args.shape for name in SETS.get(given, [given])]
    warnings.simplefilter("ignore")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, head(args), began)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            report.note,
            report.leave_out,
            args.device,
            args.minutes,
            args.facts,
            args.steps,
            out,
            Path(folder),
        )
        measure(run, plan(args.shapes, args.parts), began)
    report.write(finished=True)
    return out


if __name__ == "__main__":
    main(began=BEGAN)
