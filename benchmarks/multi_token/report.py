"""Tables and figure of PROTOCOL.md from `results/`.

python benchmarks/multi_token/report.py freeze      (the search's choice -> frozen.yaml)
python benchmarks/multi_token/report.py best        (the ablations' choice for ROME_MDM and that of `beat` for MEMIT_MDM -> best.yaml)
python benchmarks/multi_token/report.py tables      (-> results.md, success.svg)
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from study import ABLATIONS, APART, ARMS, BEAT, BEST, FROZEN, GRID, HERE, RESULTS, plan

from easyedit_mdm.bench.statistics_of_runs import bootstrap_mean

MODELS = ("twin-llama", "twin-llada", "twin-qwen", "twin-dream")
FAMILIES = (("twin-llama", "twin-llada"), ("twin-qwen", "twin-dream"))
METHODS = ("ROME_MDM", "MEMIT_MDM")
MEASURES = (
    "exact",
    "paraphrase",
    "kept",
    "same_subject_kept",
    "first_commit",
    "one_step",
    "activation",
    "canvas16",
    "random",
    "left_to_right",
    "half_steps",
)
COLOURS = {"autoregressive": "#7a7a7a", "masked, plain": "#d1495b", "masked, aware": "#1f7a8c", "masked, best": "#e9a23b"}
Line = dict[str, Any]


def lines(command: str, model: str, known: bool = True) -> list[Line]:
    """The lines of a command, those of facts that the model knew where it is about edits; [] if it was not run."""
    path = RESULTS / f"{command}-{model}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    return [row for row in rows if row["known"]] if known else rows


def value(line: Line, measure: str) -> float | None:
    """One measure of one edit; a failed optimisation succeeded in nothing."""
    found = line.get(measure)
    if found is None:
        return 0.0 if "error" in line and measure in ("exact", "paraphrase", "first_commit", "one_step") else None
    return float(found)


def estimate(rows: Sequence[Line], measure: str) -> Line:
    """Mean and interval, clustered by subject."""
    return bootstrap_mean([value(row, measure) for row in rows], [row["subject"] for row in rows])


def told(e: Line, signed: bool = False, digits: int = 2) -> str:
    """`0.95 [0.93, 0.97]`."""
    if e["mean"] is None:
        return "-"
    form = "{:+.3f}" if signed else f"{{:.{digits}f}}"
    low, high = ("-" if x is None else form.format(x) for x in (e["low"], e["high"]))
    return f"{form.format(e['mean'])} [{low}, {high}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def freeze() -> None:
    """Choose by the rule of the protocol, and write every try's score beside the choice."""
    chosen: Line = {}
    for model in MODELS:
        rows = lines("search", model)
        for method in METHODS:
            for arm in ARMS:
                scores = [_score([r for r in rows if (r["method"], r["arm"], r["try"]) == (method, arm, i)]) for i in range(len(GRID[method]))]
                if all(s is None for s in scores):
                    continue
                best = max(range(len(scores)), key=lambda i: (scores[i] or 0.0, -i))
                chosen.setdefault(model, {}).setdefault(method, {})[arm] = dict(GRID[method][best])
                print(model, method, arm, [None if s is None else round(s, 3) for s in scores], GRID[method][best])
    FROZEN.write_text(
        "# chosen on the validation split by `python benchmarks/multi_token/report.py freeze`\n" + yaml.safe_dump(json.loads(json.dumps(chosen)))
    )


def best() -> None:
    """Choose ROME_MDM's schedule by the ablations: the search's score over N = 2, 4, 8, averaged over the masked twins; ties go to fewer forwards.

    MEMIT_MDM's settings, for each masked twin, are those of `beat` with the best score.
    """
    names = [name for name, change in ABLATIONS.items() if list(change) == ["state_schedule"]]
    found = {}
    for name in names:
        rows = {m: [r for r in lines("ablate", m) if (r["method"], r["ablation"]) == ("ROME_MDM", name) and r["n_tokens"] > 1] for _, m in FAMILIES}
        scores = [_score(some) for some in rows.values()]
        cost = sorted(r["forwards"] for some in rows.values() for r in some)
        if None not in scores:
            found[name] = (sum(scores) / len(scores), -cost[len(cost) // 2])
            print(f"{name}: {found[name][0]:.4f}, median forwards {-found[name][1]}")
    chosen = max(found, key=lambda name: (round(found[name][0], 3), found[name][1]))
    settings: Line = {model: {"ROME_MDM": {"state_schedule": chosen}} for _, model in FAMILIES}
    for model in settings:
        some = [r for r in lines("beat", model) if r["n_tokens"] > 1]
        scores = [_score([r for r in some if r["try"] == i]) for i in range(len(BEAT))]
        print(model, [None if s is None else round(s, 4) for s in scores])
        if None not in scores:
            tries = [changes for _, changes in plan("beat", model, True, ["MEMIT_MDM"])]
            settings[model]["MEMIT_MDM"] = tries[max(range(len(scores)), key=lambda i: (scores[i], -i))]
    text = yaml.safe_dump(json.loads(json.dumps(settings)))
    BEST.write_text(f"# chosen on the validation split by `python benchmarks/multi_token/report.py best`\n{text}")


def _score(rows: Sequence[Line]) -> float | None:
    if not rows:
        return None
    parts = []
    for measure in ("exact", "paraphrase", "kept"):
        by_length = defaultdict(list)
        for row in rows:
            if (found := value(row, measure)) is not None:
                by_length[row["n_tokens"]].append(found)
        means = [sum(v) / len(v) for v in by_length.values()]
        parts.append(sum(means) / len(means))
    return sum(parts) / len(parts)


def series(model: str, method: str, arm: str) -> list[Line]:
    """One arm of the frozen test."""
    return [row for row in lines("best" if arm == "best" else "run", model) if (row["method"], row["arm"]) == (method, arm)]


def methods_run() -> list[str]:
    """The methods that some model was run with."""
    return [method for method in METHODS if any(series(model, method, "plain") for model in MODELS)]


def arms_of(model: str) -> list[str]:
    """The arms that a model was run with."""
    return [arm for arm in (*ARMS, APART, "best") if any(series(model, m, arm) for m in METHODS)]


def paired(first: Sequence[Line], second: Sequence[Line], measure: str = "exact", keep: Callable[[int], bool] = lambda n: n > 1) -> Line:
    """First minus second on the cases that both have, lengths that `keep` holds for."""
    other = {(row["subject"], row["n_tokens"]): value(row, measure) for row in second}
    pairs = [(value(row, measure), other.get((row["subject"], row["n_tokens"])), row["subject"]) for row in first if keep(row["n_tokens"])]
    pairs = [p for p in pairs if p[0] is not None and p[1] is not None]
    return bootstrap_mean([a - b for a, b, _ in pairs], [s for *_, s in pairs])


def verdict(e: Line) -> str:
    """Yes, no or undecided, by the protocol."""
    if e["low"] is None:
        return "-"
    if e["low"] > 0 and e["mean"] >= 0.05:
        return "yes"
    return "no" if e["low"] > -0.05 and e["high"] < 0.05 else "undecided"


def primary() -> str:
    """Success by length, the paired differences and the verdicts."""
    lengths, differences = [], []
    for masked, method in ((pair, m) for pair in FAMILIES for m in methods_run()):
        for model in masked:
            for arm in arms_of(model):
                rows = series(model, method, arm)
                if not rows:
                    continue
                cells = [told(estimate([r for r in rows if r["n_tokens"] == n], "exact")) for n in range(1, 9)]
                lengths.append([f"`{model}`", method, arm, str(len(rows)), *cells])
        plain, aware, reference = series(masked[1], method, "plain"), series(masked[1], method, "aware"), series(masked[0], method, "plain")
        gain, room = paired(aware, plain), paired(reference, plain)
        null = paired(series(masked[1], method, "null"), plain, keep=lambda n: n == 1)
        gap = [paired(reference, aware, keep=lambda n, k=k: n == k) for k in range(1, 9)]
        closed = all(g["mean"] is not None and abs(g["mean"]) <= 0.02 and g["low"] >= -0.05 and g["high"] <= 0.05 for g in gap)
        differences.append(
            [
                f"`{masked[1]}`",
                method,
                told(gain, True),
                verdict(gain),
                told(room, True),
                told(null, True),
                f"{max((g['mean'] or 0) for g in gap):+.3f}",
                "yes" if closed else "no",
            ]
        )
    head = [
        "masked model",
        "method",
        "aware - plain, N = 2..8",
        "restores?",
        "autoregressive - plain, N = 2..8",
        "null control, N = 1",
        "largest gap to autoregressive (aware)",
        "no gap?",
    ]
    return table(["model", "method", "arm", "edits", *(f"N = {n}" for n in range(1, 9))], lengths) + "\n" + table(head, differences)


def by_length() -> str:
    """Paired differences at each length: where a gain comes from (looked at afterwards: exploratory)."""
    rows = []
    for (causal, masked), method in ((pair, m) for pair in FAMILIES for m in methods_run()):
        plain, aware, chosen, apart = (series(masked, method, arm) for arm in ("plain", "aware", "best", APART))
        reference = series(causal, method, "plain")
        for what, first, second in (
            ("aware - plain", aware, plain), ("autoregressive - aware", reference, aware),
            ("best - plain", chosen, plain), ("autoregressive - best", reference, chosen), ("aware - plain with aware's settings", aware, apart),
        ):  # fmt: skip
            if first and second:
                cells = [told(paired(first, second, keep=lambda n, k=k: n == k), True) for k in range(1, 9)]
                rows.append([f"`{masked}`", method, what, *cells, told(paired(first, second), True)])
    return table(["masked model", "method", "what", *(f"N = {n}" for n in range(1, 9)), "N = 2..8"], rows)


def failures() -> str:
    """The edits that failed: whether the value failed already as an activation, and how near they came."""
    rows = []
    for model, method in ((model, m) for model in MODELS for m in methods_run()):
        for arm in arms_of(model):
            some = [r for r in series(model, method, arm) if not value(r, "exact") and "error" not in r]
            if not some:
                continue
            works = [r for r in some if r["activation"]]
            near = [r for r in some if r["token_acc"] * r["n_tokens"] >= r["n_tokens"] - 1.01 and r["n_tokens"] > 1]
            lengths = ", ".join(f"{n}: {k}" for n in range(1, 9) if (k := sum(r["n_tokens"] == n for r in some)))
            first = sum(bool(r["first_commit"]) for r in some)
            rows.append([f"`{model}`", method, arm, str(len(some)), lengths, *map(str, (first, len(near), len(some) - len(works), len(works)))])
    head = ["model", "method", "arm", "failed", "by N", "first token committed is right", "one token wrong"]
    return table([*head, "value fails as an activation too", "value works as an activation"], rows)


def keys() -> str:
    """Cosine of the key with the target partly revealed and with nothing revealed, and the share of delta that arrives, by layer."""
    rows = []
    for model in MODELS:
        found = lines("keys", model, known=False)
        for layer in sorted({r["layer"] for r in found}):
            some = [r for r in found if r["layer"] == layer]
            subjects = [r["subject"] for r in some]
            cells = []
            for measure in ("cos", "delivered"):
                cells.append(told(bootstrap_mean([sum(r[measure]) / len(r[measure]) for r in some], subjects), digits=3))
                cells.append(f"{min(min(r[measure]) for r in some):.2f}")
            rows.append([f"`{model}`", str(layer), str(len(some)), *cells])
    return table(["model", "layer", "targets", "cos(k(S), k(empty))", "least", "share of delta that arrives in S", "least"], rows)


def secondary() -> str:
    """All other outcomes, over all lengths."""
    rows = []
    for model in MODELS:
        for method in methods_run():
            for arm in arms_of(model):
                some = series(model, method, arm)
                if not some:
                    continue
                rows.append([f"`{model}`", method, arm, *(told(estimate(some, m)) for m in MEASURES)])
    return table(["model", "method", "arm", *(m.replace("_", " ") for m in MEASURES)], rows)


def closed() -> str:
    """Closed list of whole names against compositional objects, N = 2..8."""
    rows = []
    for model in MODELS:
        for method in methods_run():
            for arm in arms_of(model):
                some = [r for r in lines("closed", model) if (r["method"], r["arm"]) == (method, arm) and r["n_tokens"] > 1]
                own = [r for r in series(model, method, arm) if r["n_tokens"] in (2, 4, 8)]
                if some:
                    rows.append([f"`{model}`", method, arm, told(estimate(some, "exact")), told(estimate(own, "exact"))])
    return table(["model", "method", "arm", "closed list, N = 2, 4, 8", "compositional, the same N"], rows)


def ablations(command: str = "ablate") -> str:
    """One change at a time, N = 2, 4, 8."""
    rows = []
    for model in MODELS:
        found = lines(command, model)
        for key in dict.fromkeys((r["method"], r.get("arm", ""), r["ablation"]) for r in found):
            some = [r for r in found if (r["method"], r.get("arm", ""), r["ablation"]) == key and r["n_tokens"] > 1]
            cost = sorted(r["forwards"] for r in some if "forwards" in r)
            rows.append(
                [
                    f"`{model}`",
                    *key,
                    *(told(estimate(some, m)) for m in ("exact", "paraphrase", "kept", "first_commit")),
                    str(cost[len(cost) // 2]) if cost else "-",
                ]
            )
    return table(["model", "method", "arm", "what", "exact", "paraphrase", "kept", "first commit", "median forwards"], rows)


def tried() -> str:
    """Each try of `beat`, N = 2, 4, 8."""
    rows = []
    for model in MODELS:
        found = [r for r in lines("beat", model) if r["n_tokens"] > 1]
        for i, changes in enumerate(BEAT) if found else ():
            some = [r for r in found if r["try"] == i]
            words = ", ".join(f"{k} {v}" for k, v in changes.items())
            eight = estimate([r for r in some if r["n_tokens"] == 8], "exact")
            score = _score(some)
            cells = (told(estimate(some, "exact")), told(eight), *(told(estimate(some, m)) for m in ("paraphrase", "kept", "activation")))
            rows.append([f"`{model}`", words, *cells, "-" if score is None else f"{score:.3f}"])
    return table(["model", "settings", "exact", "exact, N = 8", "paraphrase", "kept", "as an activation", "score"], rows)


def figure(path: Path) -> None:
    """Success against target length: one panel a family and method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "multi_token"
    drawn, axes = pyplot.subplots(len(methods_run()), len(FAMILIES), figsize=(9, 1 + 3 * len(methods_run())), sharex=True, sharey=True, squeeze=False)
    for i, method in enumerate(methods_run()):
        for j, (causal, masked) in enumerate(FAMILIES):
            curves = {
                "autoregressive": series(causal, method, "plain"),
                "masked, plain": series(masked, method, "plain"),
                "masked, aware": series(masked, method, "aware"),
                "masked, best": series(masked, method, "best"),
            }
            for (name, rows), shift in zip(curves.items(), (-0.09, -0.03, 0.03, 0.09)):
                _curve(axes[i][j], name, rows, shift)
            axes[i][j].set_title(f"{method}: {causal}, {masked}", fontsize=9)
            axes[i][j].set_ylim(0, 1.03)
            axes[i][j].grid(alpha=0.3)
    axes[-1][0].legend(fontsize=8, loc="lower left")
    drawn.supxlabel("tokens of the target")
    drawn.supylabel("exact after decoding")
    drawn.tight_layout()
    drawn.savefig(path, metadata={"Date": None})


def _curve(axis: Any, name: str, rows: Sequence[Line], shift: float) -> None:
    estimates = [(n, estimate([r for r in rows if r["n_tokens"] == n], "exact")) for n in range(1, 9)]
    points = [
        (n + shift, e["mean"], e["mean"] - (e["low"] or 0), (e["high"] or 0) - e["mean"])
        for n, e in estimates
        if e["mean"] is not None and e["low"] is not None
    ]
    if points:
        x, y, low, high = zip(*points)
        axis.errorbar(
            x, y, [[max(0.0, v) for v in low], [max(0.0, v) for v in high]], label=name, color=COLOURS[name], marker="o", markersize=3, capsize=2
        )


def main() -> None:
    """See the top of the file."""
    if sys.argv[1:] == ["freeze"]:
        freeze()
    elif sys.argv[1:] == ["best"]:
        best()
    elif sys.argv[1:] == ["tables"]:
        parts = {
            "Primary outcome": primary(), "Differences at each length (exploratory)": by_length(), "Edits that failed": failures(),
            "Secondary outcomes, all lengths": secondary(), "Keys of the edited place by state (validation, N = 2, 4, 8)": keys(),
            "Closed list and compositional objects": closed(), "Then beat it: MEMIT_MDM (validation, N = 2, 4, 8)": tried(),
            "Ablations (validation, N = 2, 4, 8)": ablations(), "Batches of 16 facts (validation, N = 2, 4, 8)": ablations("batches"),
        }  # fmt: skip
        counts = [(m, *(len({r["subject"] for r in lines("run", m, known=k)}) for k in (True, False))) for m in MODELS]
        known = [f"{m}: {knows} of {run} facts known" for m, knows, run in counts if run]
        text = "<!-- made by `python benchmarks/multi_token/report.py tables` -->\n" + "; ".join(known) + ".\n"
        parts = {title: part for title, part in parts.items() if part.count("\n") > 2}  # what was not run is left out
        (HERE / "results.md").write_text(text + "".join(f"\n## {title}\n{part}" for title, part in parts.items()))
        figure(HERE / "success.svg")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
