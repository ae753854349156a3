"""results.md, and the tables between markers (`<!-- name -->`, `<!-- /name -->`) in README files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import reports
import tables as t
from evidence import (
    FAMILIES,
    LENGTHS,
    Line,
    Runs,
    difference,
    longer,
    mean,
    of_length,
    paired,
    plain_number,
    table,
    told,
    whole,
)
from study import ABLATIONS, HERE

from easyedit_mdm.report.summaries import bootstrap_mean

ROOT = HERE.parent.parent
INTRODUCTION = """\
<!-- made by `python benchmarks/multi_token/report.py tables` -->
# Results

- Shares of edits, with 95 % bootstrap intervals clustered by subject. Pooled: over N = 2..8 unless said.
- **N steps**: the whole target is right after decoding exactly N masks in N steps, most confident slot first.
- **One step**: the whole target is right when all N masks are committed at once (masked models only).
- **plain**, **aware**: states `full_mask` and `enumerate`. **best**: chosen later, see "Then beat it".
- `enumerate` holds all states up to N = 4 only. Beyond, it is one draw of N states, kept for all steps.
- Confirmatory: "The test of the protocol" and its controls. **Everything else is exploratory.**
- **kept**: share of the neighbours' tokens that the edit left as they were.
"""
COST = """\
Means an edit. A *forward* is a row through the layers above the edit. A *layer-pass* is a row through one
layer: those above the edit, those up to it (once with fixed states, at every step with redrawn ones), and
roll-outs. Left out: backward passes (layers above the edit, one a forward but for the last step), keys, the
closed form.
"""
WORK = (
    "Steps and loss: medians. cap: share of edits that took all {cap} steps; the stop is a loss of {stop}.\n"
)


def results(runs: Runs) -> str:
    """results.md."""
    counts = f"- Facts written before the edit (only those count): {t.known(runs)}.\n"
    counts += f"- Optimisations that left the finite numbers: {t.failed(runs)}.\n"
    lengths = [_by_length(runs, pair) for pair in t.PAIRS]
    changes = [_ablations(runs, pair) for pair in t.PAIRS]
    parts = [*_claims(runs), *lengths, *_places(runs), *changes, *_many(runs), *_others()]
    return "\n".join([INTRODUCTION + counts, *parts])


def _claims(runs: Runs) -> list[str]:
    """What the claims rest on: the test split, N = 2..8."""
    later = "Not in the protocol: exploratory. Paired by case."
    clamps = "Aware minus plain, both in N steps. The clamps differ on `twin-llada` with MEMIT_MDM."
    converged = "Success where the optimisation converged, and where it did not"
    return [
        _part("The test of the protocol", clamps, t.confirmatory(runs)),
        _part("Controls of the protocol", "", t.controls(runs)),
        _part("The test by halves", "Exploratory: which facts were run first.", t.halves(runs)),
        _part("Against plain in one step", later, t.against_one_step(runs)),
        _part("Aware, N steps - plain, one step, by length", later, t.against_one_step_by_length(runs)),
        _part("What goes wrong: partly revealed states", _MECHANISM, t.mechanism(runs)),
        _part("Edits that are wrong in N steps", _FAILURES, t.failures(runs)),
        _part(converged, _CONVERGED, t.success_where_converged(runs)),
        _part("Compute", COST, t.compute(runs)),
    ]


def _places(runs: Runs) -> list[str]:
    tries = [t.tried(runs, model) for model in t.MASKED]
    return [
        _part("Autoregressive twins, N = 2..8", "", t.secondary_causal(runs)),
        _part("Keys of the edited place by state (validation, N = 2, 4, 8)", "", t.keys(runs)),
        _part("Closed list and compositional objects (N = 2, 4, 8)", "", t.closed(runs)),
        _part("Then beat it: MEMIT_MDM (validation, N = 2, 4, 8)", _BEAT, *tries),
    ]


def _many(runs: Runs) -> list[str]:
    causal = t.ablations_causal(runs)
    return [
        _part("Ablations of the autoregressive twins (validation, N = 2, 4, 8)", "", causal),
        _part("Batches of 16 facts (validation, N = 2, 4, 8)", "", t.batches(runs)),
        _part("64 facts in one run", "", reports.many_facts()),
    ]


def _others() -> list[str]:
    """From the reports of other benchmarks."""
    zsre, older, twins = (reports.of_report(name) for name in ("multi_token/zsre", *SIDE_BY_SIDE))
    more = reports.real_text_differences(), reports.real_text_by_length()
    return [
        _part("200 zsRE records", _ZSRE, zsre, *more),
        _part("50 zsRE records, an earlier file, values as activations", "", older),
        _part(
            "100 edits of the twins' world, the shipped files", "", twins, reports.side_by_side_difference()
        ),
        _part("SmolLM2-135M, autoregressive", "", reports.pretrained()),
    ]


SIDE_BY_SIDE = ("side_by_side/zsre", "side_by_side/twins")
_MECHANISM = """\
Masked twins, N = 2..8. "Right in one" and "wrong in both" divide those that are wrong in N steps. "First
right": the first token committed is right. Right in one step and wrong in N: through partly revealed states.
"""
_FAILURES = """\
N = 2..8. "One token": all but one are right. "Wrong as activation": the value fails with no weight changed,
and the solver is not to blame.
"""
_CONVERGED = (
    "Converged: the last loss is below the stop. Those are the easy edits, no random draw. N = 2..8.\n"
)
_BEAT = (
    "Averaged keys and `stratified` states; 50 steps, lambda 100, unmasked C but where others are named.\n"
)
_ZSRE = (
    "Medians of forwards. One step was not measured. The run files hold the records and are not kept here.\n"
)


def _part(title: str, text: str, *made: str, level: str = "##") -> str:
    text = text if not text or text.endswith("\n") else text + "\n"
    return f"{level} {title}\n" + text + ("\n" if text else "") + "\n".join(made)


def _by_length(runs: Runs, pair: t.Pair) -> str:
    text = f"## {str(pair).replace('`', '')}: by length\nLayer {pair.layer} in both arms.\n\n"
    made = [
        ("Success", "", t.success(runs, pair)),
        ("Success of the arms that were added", "", t.success_of_others(runs, pair)),
        ("Differences in N steps", "", t.differences(runs, pair)),
        ("Convergence and compute", WORK.format(cap=t.CAP, stop=t.STOP), t.work(runs, pair)),
        (
            "All outcomes, N = 2..8",
            "Canvas of 16, orders and N/2 steps: every third subject.",
            t.secondary(runs, pair),
        ),
    ]
    return text + "\n".join(_part(*part, level="###") for part in made)


def _ablations(runs: Runs, pair: t.Pair) -> str:
    text = "12 facts: 36 edits a row. Two or three edits apart are no difference."
    against = (
        f"Against `{t.LONG_PLAIN}`, paired: whole targets, and its cost as a multiple of that one's.\n\n"
    )
    name = str(pair).replace("`", "")
    made = t.ablations(runs, pair), against + t.against_long_plain(runs, pair)
    return _part(f"Ablations of {name} (validation, N = 2, 4, 8)", text, *made)


def answer(runs: Runs) -> str:
    """The protocol's test beside the remedy that costs nothing."""
    rows = []
    for pair in t.PAIRS:
        plain, aware = (runs.series(pair.masked, pair.method, arm) for arm in ("plain", "aware"))
        ends = paired(aware, plain), paired(aware, plain, *t.BOTH)
        rows.append(
            [
                f"{pair}, {pair.layer}",
                difference(ends[0]),
                t.verdict(ends[0]),
                t.lengths_above(aware, plain),
                difference(ends[1]),
            ]
        )
    head = [
        "twin, method, layer",
        "aware - plain, N steps",
        "restores?",
        "at N",
        "aware, N steps - plain, one step",
    ]
    return table(head, rows)


def arms(runs: Runs) -> str:
    """Success beside what the edit did to the rest."""
    measures = ("exact", "one_step_exact", "paraphrase", "kept", "same_subject_kept", "canvas16")
    rows = []
    for causal, masked in FAMILIES:
        for method in t.METHODS:
            for model, arm in [*((masked, arm) for arm in runs.arms(masked, method)), (causal, "plain")]:
                found = longer(runs.series(model, method, arm))
                cells = [plain_number(mean(found, m)) for m in measures]
                rows.append([f"`{model}` {method}", arm if model == masked else "-", str(len(found)), *cells])
    head = ["N steps", "one step", "paraphrase", "neighbours", "same subject", "canvas 16"]
    return table(["model, method", "arm", "edits", *head], rows)


def convergence(runs: Runs) -> str:
    """Plain: how far the optimisation came."""
    rows = []
    for pair in t.PAIRS:
        plain = runs.series(pair.masked, pair.method, "plain")
        cells = [", ".join(t.convergence_of(of_length(plain, n))) for n in (2, 4, 6, 8)]
        rows.append([str(pair), *cells])
    return table(["twin, method", *(f"N = {n}" for n in (2, 4, 6, 8))], rows)


def ablations(runs: Runs) -> str:
    """All ablations: N steps, one step."""
    found = {pair: t.ablated(runs, pair) for pair in t.PAIRS}
    rows = []
    for name in ABLATIONS:
        cells = [
            " / ".join(plain_number(mean(parts[name], m)) for m in t.BOTH) if name in parts else "-"
            for parts in found.values()
        ]
        dream = found[t.PAIRS[-1]].get(name, [])
        rows.append([name, *cells, *(whole(mean(dream, m)) for m in ("forwards", "layer_passes"))])
    return table(
        ["what", *(f"{p.masked.removeprefix('twin-')} {p.method}" for p in t.PAIRS), "forw.", "passes"], rows
    )


def gap(runs: Runs) -> str:
    """Autoregressive minus masked."""
    rows = []
    for pair in t.PAIRS:
        reference = runs.series(pair.causal, pair.method, "plain")
        for arm, how, measure in (
            ("plain", "one step", "one_step_exact"),
            ("aware", "N steps", "exact"),
            ("best", "N steps", "exact"),
        ):
            found = runs.series(pair.masked, pair.method, arm)
            gaps = [
                paired(reference, found, "exact", measure, keep=t.only(n))["mean"] for n in LENGTHS if n > 1
            ]
            e = paired(reference, found, "exact", measure)
            kept = mean(longer(found), "kept"), mean(longer(reference), "kept")
            rows.append(
                [
                    str(pair),
                    f"{arm}, {how}",
                    str(e["subjects"]),
                    difference(e),
                    f"{max(gaps):+.2f}",
                    *map(plain_number, kept),
                ]
            )
    head = [
        "twin, method",
        "arm",
        "facts",
        "autoregressive - it",
        "largest gap",
        "neighbours",
        "autoregressive's",
    ]
    return table(head, rows)


def real_text(_: Runs) -> str:
    """200 zsRE records."""
    return reports.of_report("multi_token/zsre")


def front(runs: Runs) -> str:
    """The table of results of the README at the top."""
    rows = []
    for pair in reversed(t.PAIRS):
        limits = {"MEMIT_MDM": "1, 2", "ROME_MDM": "1"}[pair.method]
        plain = runs.series(pair.masked, pair.method, "plain")
        for arm in ("plain", "aware"):
            marked = (
                f"{limits}, 3"
                if (pair.masked, pair.method, arm) == ("twin-dream", "MEMIT_MDM", "plain")
                else limits
            )
            rows.append(
                _front(f"{pair} {arm}", longer(runs.series(pair.masked, pair.method, arm)), plain, marked)
            )
        if pair.masked == "twin-dream" and pair.method == "MEMIT_MDM":
            rows.append(
                _front(f"{pair} best", longer(runs.series(pair.masked, pair.method, "best")), plain, "1, 4")
            )
        rows.append(
            _front(
                f"`{pair.causal}` {pair.method}",
                longer(runs.series(pair.causal, pair.method, "plain")),
                plain,
                "1",
            )
        )
    rows += _front_batches(runs) + _front_reports()
    return table(["edits", "N steps", "one step", "N steps - plain in one", "kept", "port.", "limits"], rows)


def _front(name: str, rows: Sequence[Line], plain: Sequence[Line], limits: str) -> list[str]:
    once, kept = plain_number(mean(rows, "one_step_exact")), plain_number(mean(rows, "kept"))
    against = difference(paired(rows, plain, *t.BOTH))
    return [name, told(t.estimate(rows, "exact")), once, against, kept, "-", limits]


def _front_batches(runs: Runs) -> list[list[str]]:
    rows = []
    for model in ("twin-dream", "twin-llada"):
        found = longer(runs.lines("batches", model))
        for arm in ("plain", "aware"):
            some = [row for row in found if (row["arm"], row["ablation"]) == (arm, "mixed lengths")]
            once, kept = (plain_number(mean(some, m)) for m in ("one_step_exact", "kept"))
            rows.append(
                [
                    f"16 at once, `{model}` {arm}",
                    told(t.estimate(some, "exact")),
                    once,
                    "-",
                    kept,
                    "-",
                    "1, 2, 5",
                ]
            )
    many = json.loads((reports.BENCHMARKS / "edit_speed-twins.json").read_text())["rows"]
    for what, model in (("masked, full_mask", "twin-llada"), ("autoregressive", "twin-llama")):
        (found,) = (row for row in many if row["facts"] == 64 and row["what"] == f"MEMIT_MDM, {what}")
        rows.append([f"64 at once, `{model}` plain", f"{found['success']:.2f}", "-", "-", "-", "-", "1, 5"])
    return rows + _front_many()


def _front_many() -> list[list[str]]:
    """64 test facts in one batch, from benchmarks/batches: the shipped file, and the one for batches."""
    rows = []
    for model in ("twin-llada", "twin-llama"):
        file = reports.BENCHMARKS / "batches" / "results" / f"test-{model}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for arm, name in (("file", "file"), ("joint, 1000, 150 steps", "batch file")):
            (found,) = (line for line in lines if (line["arm"], line["facts"]) == (arm, 64))
            values = found["scores"]["exact"]
            exact = told(bootstrap_mean(values, range(len(values))))
            once, kept = (found["scores"].get(name) for name in ("one_step", "neighbours"))
            shares = ["-" if some is None else f"{sum(some) / len(some):.2f}" for some in (once, kept)]
            rows.append(
                [f"64 test facts at once, `{model}` {name}", exact, shares[0], "-", shares[1], "-", "1, 10"]
            )
    return rows


def _front_reports() -> list[list[str]]:
    names = {"twin-llada, plain": "`twin-llada` plain", "twin-llada, denoising-aware": "`twin-llada` aware"}
    names |= {"twin-llama": "`twin-llama`"}
    rows = []
    for folder, what, limits in (
        ("multi_token/zsre", "200 zsRE", "1, 6"),
        ("side_by_side/zsre", "50 zsRE", "1, 7"),
        ("side_by_side/twins", "100 edits", "1, 8"),
    ):
        for run in reports.report_of(folder)["runs"]:
            if run["name"] in names:
                once, kept, further = (
                    run["measures"].get(m, {}).get("mean")
                    for m in ("ladder.one_step", "locality_kept", "portability_exact")
                )
                cells = [
                    reports.measured(run, "success"),
                    plain_number(once),
                    "-",
                    plain_number(kept),
                    plain_number(further),
                    limits,
                ]
                rows.append([f"{what}, {names[run['name']]}", *cells])
    averages = json.loads((reports.BENCHMARKS / "smollm2-averages.json").read_text())
    for data, name in (("counterfact", "50 CounterFact"), ("zsre", "50 zsRE")):
        found = averages[data]["ROME_MDM"]
        rows.append(
            [
                f"{name}, SmolLM2-135M",
                told(found["success"]),
                "-",
                "-",
                plain_number(found["locality_kept"]["mean"]),
                plain_number(found.get("portability_exact", {}).get("mean")),
                "9",
            ]
        )
    return rows


_SHORT = re.compile(r"twin-llada` (ROME|MEMIT)|twin-dream` MEMIT|64 test facts|200 zsRE|SmolLM2")


def short(runs: Runs) -> str:
    """The rows of the front table that a reader needs first; the limits stand in docs/results.md."""
    lines = front(runs).splitlines()
    rows = [*lines[:2], *(line for line in lines[2:] if _SHORT.search(line))]
    return "".join(line.rsplit("|", 2)[0] + "|\n" for line in rows)


MARKED: dict[Path, dict[str, Callable[[Runs], str]]] = {
    ROOT / "README.md": {"results": short},
    ROOT / "docs" / "results.md": {"results": front},
    HERE / "README.md": {
        "answer": answer,
        "arms": arms,
        "mechanism": t.mechanism,
        "convergence": convergence,
        "compute": t.compute,
        "ablations": ablations,
        "gap": gap,
        "zsre": real_text,
        "zsre-differences": lambda _: reports.real_text_differences(),
        "pretrained": lambda _: reports.pretrained(),
    },
    HERE.parent / "side_by_side" / "README.md": {
        "twins": lambda _: reports.of_report("side_by_side/twins"),
        "zsre": lambda _: reports.of_report("side_by_side/zsre"),
    },
}


def filled(path: Path, runs: Runs) -> str:
    """A page with its marked tables made anew."""
    text = path.read_text()
    for name, make in MARKED[path].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(
                f"{path} has no place marked {name}: put <!-- {name} --> and <!-- /{name} --> there"
            )
        text = pattern.sub(lambda m, make=make: m[1] + make(runs) + m[2], text)
    return text
