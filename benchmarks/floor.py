"""How near edits come to the time that their matrix products take by themselves: the floor.

    python benchmarks/floor.py --part twins --facts 16 --steps 10 --repeats 2 --out FILE
    python benchmarks/floor.py --part wide --facts 2 --steps 2 --repeats 1 --out FILE
    python benchmarks/floor.py --tables

`--tables` writes docs/speed.md from benchmarks/floor-twins.json and floor-wide.json.

The floor of an edit is the time of the products of the linear maps above the edit that the optimisation must
make: at every step, for every row, forward and (but for the last step) backward to the input, without
padding; the head at the slots that are scored. Weights get no gradient, so that a third product is never
made. Those products are replayed, pass by pass, with `torch.mm` on the model's own weights, into memory that
is there already. Attention's own products, what lies below the edit, keys and the closed form are not in the
floor.

Edit and replay take turns, `--repeats` times; what counts is the median of the CPU's seconds, one thread.
`twins`: twin-llama and twin-llada. `wide`: random models of 12 layers and width 768. ROME_MDM edits one fact
of three tokens at layer 4, MEMIT_MDM `--facts` facts of 1 to 4 tokens at layers 2 to 4, six context prefixes,
no early stop; statistics are made beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from edit_speed import hparams_of, requests_of, wide_model

from easyedit_mdm import load_model, make_edit
from easyedit_mdm.editing import ROMEMDMHyperParams
from easyedit_mdm.editing.solve import value
from easyedit_mdm.models import Adapter

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed.md"
FILES = {part: ROOT / "benchmarks" / f"floor-{part}.json" for part in ("twins", "wide")}
TOP = 12  # operations of a profile that are kept
GROUPS = {  # of an operation's name, without `aten::`
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_softmax"),
    "softmax over the vocabulary": ("_log_softmax", "exp"),
    "copies and indices": (
        "copy_",
        "index",
        "cat",
        "gather",
        "scatter",
        "fill_",
        "zero_",
        "clone",
        "_to_copy",
    ),
    "sums and norms": ("sum", "mean", "norm", "linalg", "rsqrt", "pow"),
    "elementwise": ("mul", "add", "silu", "neg", "sub", "div", "where", "cos", "sin", "masked_fill"),
}


class Pass(NamedTuple):
    """One pass of the optimisation, from layer `first` up.

    Attributes:
        tokens, slots: that must run, and that are scored.
        run_tokens, run_slots: with padding.
    """

    first: int
    tokens: int
    slots: int
    run_tokens: int
    run_slots: int
    backward: bool


@dataclass
class Watched:
    """What an edit's optimisation did: its passes, and the CPU's seconds inside it."""

    passes: Counter[Pass] = field(default_factory=Counter)
    seconds: float = 0.0


@contextlib.contextmanager
def watching() -> Iterator[Watched]:
    """Note the passes of every optimisation in the block."""
    found, backward = Watched(), [True]
    losses, chunk, whole = value._Forward.losses, value._Forward._chunk, value._optimise

    def noted_losses(self, step, active, deltas, initial, backward: bool):
        now[0] = backward
        return losses(self, step, active, deltas, initial, backward)

    def noted_chunk(self, rows, below, deltas, place):
        must = rows.mask[:, below.start :].sum()
        scored = (rows.weights != 0).sum() + rows.anchor.sum()
        made = Pass(self.layer, int(must), int(scored), below.hidden[..., 0].numel(), rows.at.numel(), now[0])
        found.passes[made] += 1
        return chunk(self, rows, below, deltas, place)

    def timed(*args, **kwargs):
        began = time.process_time()
        done = whole(*args, **kwargs)
        found.seconds += time.process_time() - began
        return done

    now = backward
    with (
        mock.patch.object(value._Forward, "losses", noted_losses),
        mock.patch.object(value._Forward, "_chunk", noted_chunk),
        mock.patch.object(value, "_optimise", timed),
    ):
        yield found


class Replay:
    """The matrix products of passes, on a model's own weights, and nothing else."""

    def __init__(self, adapter: Adapter):
        self.blocks = [
            [m.weight.detach() for m in adapter.module(path).modules() if isinstance(m, torch.nn.Linear)]
            for path in (adapter.spec.paths.block.format(i) for i in range(adapter.layers))
        ]
        self.head = adapter.weight_of(adapter.spec.paths.head).detach()

    def weights(self, made: Pass) -> list[tuple[int, torch.Tensor]]:
        """(rows of the product, weight) of one pass, in order."""
        above = [w for block in self.blocks[made.first :] for w in block]
        return [*((made.tokens, w) for w in above), (made.slots, self.head)]

    def flops(self, made: Pass) -> float:
        """2 x rows x inputs x outputs of each product."""
        return sum(2.0 * n * w.numel() for n, w in self.weights(made)) * (2 if made.backward else 1)

    @torch.no_grad()
    def seconds(self, made: Pass) -> float:
        """The CPU's, for one pass."""
        todo = self.weights(made)
        pairs = [(n, w, torch.randn(n, w.shape[1]), torch.randn(n, w.shape[0])) for n, w in todo[:7]]
        by_shape = {w.shape: (x, y) for _, w, x, y in pairs}
        by_shape[self.head.shape] = (
            torch.randn(made.slots, self.head.shape[1]),
            torch.randn(made.slots, self.head.shape[0]),
        )
        began = time.process_time()
        for _, w in todo:
            x, y = by_shape[w.shape]
            torch.mm(x, w.T, out=y)
        for _, w in reversed(todo) if made.backward else ():
            x, y = by_shape[w.shape]
            torch.mm(y, w, out=x)
        return time.process_time() - began


@dataclass
class Arm:
    """One way to edit."""

    model: str
    adapter: Adapter
    method: str
    aware: bool
    hparams: ROMEMDMHyperParams
    requests: list[dict]

    def edit(self) -> float:
        """The CPU's seconds of the edit, which is not applied."""
        began = time.process_time()
        make_edit(self.adapter, self.requests, self.hparams)
        return time.process_time() - began


def arms(part: str, facts: int, steps: int, folder: str) -> list[Arm]:
    """All arms of a part; the aware ones are of the masked model, with the schedules of the large models'
    files.
    """
    if part == "twins":
        models = {name: load_model(name) for name in ("twin-llama", "twin-llada")}
    else:
        models = {"wide, autoregressive": wide_model(), "wide, masked": wide_model(masked=True)}
    found = []
    for name, adapter in models.items():
        for method, layers, aware in (("ROME_MDM", [4], "enumerate"), ("MEMIT_MDM", [2, 3, 4], "spread")):
            requests = requests_of(3)[2:] if method == "ROME_MDM" else requests_of(facts)
            for schedule in ("full_mask", aware) if adapter.masked else ("full_mask",):
                hparams = dataclasses.replace(
                    hparams_of(method, layers, schedule, False, "twins"), v_num_grad_steps=steps,
                    mom2_n_tokens=1000, mom2_eps=1e-2, stats_dir=folder,
                )  # fmt: skip
                found.append(Arm(name, adapter, method, schedule != "full_mask", hparams, requests))
    return found


def measured(arm: Arm, repeats: int) -> dict[str, Any]:
    """Edit and replay in turns."""
    brief = dataclasses.replace(arm.hparams, v_num_grad_steps=2)
    make_edit(arm.adapter, arm.requests[:1], brief)  # statistics and first calls are not timed
    replay = Replay(arm.adapter)
    edits, inside, floors = [], [], []
    for _ in range(repeats):
        with watching() as watched:
            edits.append(arm.edit())
        passes = watched.passes
        inside.append(watched.seconds)
        floors.append(sum(times * replay.seconds(made) for made, times in passes.items()))
    flops = sum(times * replay.flops(made) for made, times in passes.items())
    must = sum(times * made.tokens for made, times in passes.items())
    floor = statistics.median(floors)
    return {
        "model": arm.model, "method": arm.method, "states": arm.hparams.state_schedule, "aware": arm.aware,
        "facts": len(arm.requests), "steps": arm.hparams.v_num_grad_steps, "gflop": flops / 1e9,
        "passes": sum(passes.values()), "tokens_a_pass": must / sum(passes.values()),
        "padded": sum(times * made.run_tokens for made, times in passes.items()) / must,
        "floor_seconds": floor, "floor_gflop_per_second": flops / floor / 1e9,
        "edit_seconds": statistics.median(edits), "optimisation_seconds": statistics.median(inside),
        "ratio": statistics.median(edits) / floor, "optimisation_ratio": statistics.median(inside) / floor,
        "all_floor_seconds": floors, "all_edit_seconds": edits,
    }  # fmt: skip


def profiled(arm: Arm) -> dict[str, Any]:
    """Where the operations' own time of one edit goes: by group, and the operations with the most of it.

    The profiler counts by the clock, and has the operations alone: not Python between them.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        arm.edit()
    events = profile.key_averages()
    own = {event.key: event.self_cpu_time_total / 1e6 for event in events}
    calls = {event.key: event.count for event in events}
    groups = {name: 0.0 for name in (*GROUPS, "other operations")}
    for name, time_of in own.items():
        groups[_group(name)] += time_of
    total = sum(groups.values())
    return {
        "groups": {name: part / total for name, part in groups.items()},
        "operations": [
            {"name": name, "calls": calls[name], "seconds": own[name]}
            for name in sorted(own, key=own.__getitem__, reverse=True)[:TOP]
        ],
    }


def _group(operation: str) -> str:
    name = operation.removeprefix("aten::")
    for group, names in GROUPS.items():
        exact = group == "matrix products"
        if name in names if exact else name.startswith(names):
            return group
    return "other operations"


def reports() -> list[dict[str, Any]]:
    """Those that have been measured."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in FILES.values() if file.exists()]


def tables(reports: list[dict[str, Any]]) -> str:
    """The page's two tables: ratios, and where the time goes."""
    names = ("model", "method", "states", "facts", "floor, s", "GFLOP a s", "edit, s", "edit / floor",
             "optimisation / floor", "padding")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "| " + " | ".join("---" for _ in names) + " |"]
    shares = [*reports[0]["rows"][0]["profile"]["groups"]]
    more = ["| model | method | states | " + " | ".join(shares) + " |"]
    more += ["| " + " | ".join("---" for _ in range(3 + len(shares))) + " |"]
    for row in (row for report in reports for row in report["rows"]):
        head = f"| {row['model']} | {row['method']} | {row['states']} |"
        lines.append(
            f"{head} {row['facts']} | {row['floor_seconds']:.3g} | {row['floor_gflop_per_second']:.0f} |"
            f" {row['edit_seconds']:.3g} | {row['ratio']:.1f} | {row['optimisation_ratio']:.1f} |"
            f" {row['padded'] - 1:.0%} |"
        )
        groups = row["profile"]["groups"]
        more.append(f"{head} " + " | ".join(f"{groups[name]:.0%}" for name in shares) + " |")
    return "\n".join([*lines, "", *more])


def written(page: str, text: str) -> str:
    """The page with the tables in their place."""
    before, rest = page.split("<!-- floor -->\n")
    return f"{before}<!-- floor -->\n{text}\n<!-- /floor -->{rest.split('<!-- /floor -->')[1]}"


def main() -> None:
    """Measure one part, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=[*FILES], default="twins")
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    parser.add_argument("--tables", action="store_true", help="write docs/speed.md from the files")
    args = parser.parse_args()
    if args.tables:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(written(page, tables(reports())), encoding="utf-8")
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {"part": args.part, "threads": 1, "repeats": args.repeats, "rows": []}
    report["torch"] = torch.__version__
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms(args.part, args.facts, args.steps, folder):
            report["rows"].append(measured(arm, args.repeats) | {"profile": profiled(arm)})
            print(tables([{**report, "rows": report["rows"][-1:]}]), flush=True)
            if args.out:
                Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
