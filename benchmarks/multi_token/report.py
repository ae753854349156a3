"""Tables and figure of PROTOCOL.md from `results/` and the other committed run files and reports.

python benchmarks/multi_token/report.py freeze      (the search's choice -> frozen.yaml)
python benchmarks/multi_token/report.py best        (the choice of the ablations and of `beat` -> best.yaml)
python benchmarks/multi_token/report.py tables      (results.md, success.svg, marked tables of README files)
python benchmarks/multi_token/report.py tables --out D   (the same into the folder D)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pages
import tables as t
import yaml
from evidence import FAMILIES, LENGTHS, METHODS, MODELS, Line, Runs, estimate, of_length
from study import ABLATIONS, ARMS, BEAT, BEST, FROZEN, GRID, HERE, plan

ROOT = HERE.parent.parent
COLOURS = {
    "autoregressive": "#7a7a7a",
    "masked, plain": "#d1495b",
    "masked, plain, one step": "#3d348b",
    "masked, aware": "#1f7a8c",
    "masked, best": "#e9a23b",
}


def freeze(runs: Runs) -> None:
    """Choose by the rule of the protocol, and print every try's score beside the choice."""
    chosen: Line = {}
    for model in MODELS:
        for method in METHODS:
            for arm in ARMS:
                rows = [r for r in runs.lines("search", model) if (r["method"], r["arm"]) == (method, arm)]
                scores = [t.score([r for r in rows if r["try"] == i]) for i in range(len(GRID[method]))]
                if not rows:
                    continue
                best = max(range(len(scores)), key=lambda i: (scores[i] or 0.0, -i))
                chosen.setdefault(model, {}).setdefault(method, {})[arm] = dict(GRID[method][best])
                print(
                    model,
                    method,
                    arm,
                    [None if s is None else round(s, 3) for s in scores],
                    GRID[method][best],
                )
    _write(FROZEN, "freeze", chosen)


def best(runs: Runs) -> None:
    """Choose ROME_MDM's schedule by the ablations, and MEMIT_MDM's settings of each masked twin by `beat`.

    By the search's score over N = 2, 4, 8. For the schedule it is averaged over the masked twins, and ties go
    to fewer forwards.
    """
    masked = [model for _, model in FAMILIES]
    settings: Line = {model: {"ROME_MDM": {"state_schedule": _schedule(runs, masked)}} for model in masked}
    for model in masked:
        some = [r for r in runs.lines("beat", model) if r["n_tokens"] > 1]
        scores = [t.score([r for r in some if r["try"] == i]) for i in range(len(BEAT))]
        print(model, [None if s is None else round(s, 4) for s in scores])
        if None not in scores:
            tries = [changes for _, changes in plan("beat", model, True, ["MEMIT_MDM"])]
            settings[model]["MEMIT_MDM"] = tries[max(range(len(scores)), key=lambda i: (scores[i], -i))]
    _write(BEST, "best", settings)


def _schedule(runs: Runs, masked: Sequence[str]) -> str:
    found = {}
    for name in (name for name, change in ABLATIONS.items() if list(change) == ["state_schedule"]):
        rows = [
            [
                r
                for r in runs.lines("ablate", m)
                if (r["method"], r["ablation"]) == ("ROME_MDM", name) and r["n_tokens"] > 1
            ]
            for m in masked
        ]
        scores = [t.score(some) for some in rows]
        cost = sorted(r["forwards"] for some in rows for r in some)
        if None not in scores:
            found[name] = (sum(scores) / len(scores), -cost[len(cost) // 2])
            print(f"{name}: {found[name][0]:.4f}, median forwards {-found[name][1]}")
    return max(found, key=lambda name: (round(found[name][0], 3), found[name][1]))


def _write(path: Path, command: str, chosen: Line) -> None:
    made = f"# chosen on the validation split by `python benchmarks/multi_token/report.py {command}`\n"
    path.write_text(made + yaml.safe_dump(json.loads(json.dumps(chosen))))


def figure(runs: Runs, path: Path) -> None:
    """Success against target length: one panel a family and method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "multi_token"
    drawn, axes = pyplot.subplots(
        len(METHODS), len(FAMILIES), figsize=(9, 1 + 3 * len(METHODS)), sharex=True, sharey=True
    )
    for i, method in enumerate(METHODS):
        for j, (causal, masked) in enumerate(FAMILIES):
            plain = runs.series(masked, method, "plain")
            curves = {
                "autoregressive": (runs.series(causal, method, "plain"), "exact"),
                "masked, plain": (plain, "exact"),
                "masked, plain, one step": (plain, "one_step_exact"),
                "masked, aware": (runs.series(masked, method, "aware"), "exact"),
                "masked, best": (runs.series(masked, method, "best"), "exact"),
            }
            for (name, (rows, measure)), shift in zip(curves.items(), (-0.12, -0.06, 0.0, 0.06, 0.12)):
                _curve(axes[i][j], name, rows, measure, shift)
            axes[i][j].set_title(f"{method}: {causal}, {masked}", fontsize=9)
            axes[i][j].set_ylim(0, 1.03)
            axes[i][j].grid(alpha=0.3)
    axes[-1][0].legend(fontsize=8, loc="lower left")
    drawn.supxlabel("tokens of the target")
    drawn.supylabel("whole target right (N steps)")
    drawn.tight_layout()
    drawn.savefig(path, metadata={"Date": None})
    pyplot.close(drawn)


def _curve(axis: Any, name: str, rows: Sequence[Line], measure: str, shift: float) -> None:
    points = [(n + shift, estimate(of_length(rows, n), measure)) for n in LENGTHS]
    x, y = [at for at, _ in points], [e["mean"] for _, e in points]
    errors = [
        [max(0.0, e["mean"] - e["low"]) for _, e in points],
        [max(0.0, e["high"] - e["mean"]) for _, e in points],
    ]
    style = "--" if name.endswith("one step") else "-"
    axis.errorbar(
        x, y, errors, label=name, color=COLOURS[name], linestyle=style, marker="o", markersize=3, capsize=2
    )


def write_tables(out: Path | None) -> None:
    """results.md, success.svg and the README files with their tables made anew, in `out` or in place."""
    runs = Runs()
    texts = {
        HERE / "results.md": pages.results(runs),
        **{path: pages.filled(path, runs) for path in pages.MARKED},
    }
    for path, text in texts.items():
        target = path if out is None else out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    drawn = HERE / "success.svg"
    figure(runs, drawn if out is None else out / drawn.relative_to(ROOT))


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("freeze", "best", "tables"))
    parser.add_argument("--out", type=Path, help="of tables: a folder to write into")
    args = parser.parse_args()
    if args.command == "tables":
        write_tables(args.out)
    else:
        {"freeze": freeze, "best": best}[args.command](Runs())


if __name__ == "__main__":
    main()
