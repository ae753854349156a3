"""Tables of results.md from the reports and run files of the other benchmarks."""

from __future__ import annotations

import json
from typing import Any

from evidence import LENGTHS, Line, difference, plain_number, table, told, whole
from study import HERE

from easyedit_mdm.evaluation.records import read_run
from easyedit_mdm.report.summaries import bootstrap_mean, key_of, subject_of

BENCHMARKS = HERE.parent


def report_of(folder: str) -> dict[str, Any]:
    """The figures of an `easyedit-mdm compare` that is committed."""
    return json.loads((BENCHMARKS / folder / "report.json").read_text())


def short(name: str) -> str:
    """A run's name in few words."""
    return name.replace("denoising-aware", "aware").replace("as an activation", "activation")


def measured(run: dict[str, Any], name: str, digits: int = 2) -> str:
    """One measure of a report's run, with its interval."""
    found = run["measures"].get(name)
    return told(found, digits) if found else "-"


def compared(report: dict[str, Any], first: str, second: str, measure: str) -> Line:
    """First minus second, of the report's own paired differences."""
    for pair in report["pairs"]:
        if (pair["first"], pair["second"]) == (first, second):
            return dict(pair["measures"][measure])
        if (pair["first"], pair["second"]) == (second, first):
            e = pair["measures"][measure]
            return {**e, "mean": -e["mean"], "low": -e["high"], "high": -e["low"]}
    raise KeyError(f"no comparison of {first!r} and {second!r}")


def of_report(folder: str) -> str:
    """One row a run."""
    rows = []
    for run in report_of(folder)["runs"]:
        cells = [measured(run, name) for name in ("success", "ladder.one_step", "locality_kept")]
        more = [
            plain_number((run["measures"].get(m) or {}).get("mean"))
            for m in ("token_acc", "rephrase_exact", "portability_exact")
        ]
        cost = whole(run["cost"]["forwards"]["median"])
        rows.append([short(run["name"]).replace("EasyEdit's", "EasyEdit"), *cells, *more, cost])
    head = ["run", "N steps", "one step", "neighbours kept", "tokens", "para.", "port.", "forw."]
    return table(head, rows)


def real_text_differences() -> str:
    """What the runs on 200 zsRE records differ by."""
    report = report_of("multi_token/zsre")
    masked, causal = "twin-llada, denoising-aware", "twin-llama"
    rows = [
        ["aware - plain, both through the weights", masked, "twin-llada, plain"],
        ["through the weights - as an activation, masked", masked, f"{masked}, as an activation"],
        ["through the weights - as an activation, autoregressive", causal, f"{causal}, as an activation"],
    ]
    body = [
        [n, *(difference(compared(report, a, b, m)) for m in ("success", "locality_kept"))]
        for n, a, b in rows
    ]
    return table(["what", "whole targets", "neighbours kept"], body)


def real_text_by_length() -> str:
    """Whole targets of 200 zsRE records by length, to N = 8."""
    report = report_of("multi_token/zsre")
    by_name = {run["name"]: run["success_by_length"] for run in report["runs"]}
    masked = ("twin-llada, plain", "twin-llada, denoising-aware", "twin-llama")
    body = []
    for n in map(str, LENGTHS):
        body.append([n, str(by_name[masked[0]][n]["n"]), *(told(by_name[name][n]) for name in masked)])
    return table(["N", "records", *map(short, masked)], body)


def side_by_side_difference() -> str:
    """Aware in N steps minus plain in one step, 100 edits of the twins' world, from the run files."""
    first, second = (
        read_run(BENCHMARKS / "side_by_side" / "runs" / f"twins-llada-{arm}.jsonl")
        for arm in ("aware", "plain")
    )
    theirs = {key_of(case): case["post"]["ladder"] for case in second.cases}
    rows = []
    for what, ours, other in (
        ("aware, N steps - plain, one step", "multi_step", "one_step"),
        ("aware - plain, N steps", *["multi_step"] * 2),
    ):
        pairs = [
            (case["post"]["ladder"][ours]["exact"] - theirs[key_of(case)][other]["exact"], subject_of(case))
            for case in first.cases
        ]
        e = bootstrap_mean([d for d, _ in pairs], [s for _, s in pairs])
        rows.append([what, difference(e), str(e["n"]), str(e["subjects"])])
    return table(["what", "difference", "edits", "subjects"], rows)


def pretrained() -> str:
    """SmolLM2-135M, autoregressive: EasyEdit's ROME and ROME_MDM."""
    averages = json.loads((BENCHMARKS / "smollm2-averages.json").read_text())
    rows = []
    for data, name in (("counterfact", "CounterFact"), ("zsre", "zsRE")):
        for method in ("EasyEdit's ROME", "ROME_MDM"):
            found = averages[data][method]
            rows.append(
                [name, method, *(told(found[m]) for m in ("success", "rephrase_exact", "locality_kept"))]
            )
    return table(["50 records of", "method", "whole targets", "paraphrase", "neighbours kept"], rows)


def many_facts() -> str:
    """Sixty-four facts in one run, as the benchmark of speed left them."""
    found = json.loads((BENCHMARKS / "edit_speed-twins.json").read_text())["rows"]
    rows = [
        [row["what"], f"{row['success']:.2f}", f"{row['seconds_per_fact']:.3f}"]
        for row in found
        if row["facts"] == 64
    ]
    return table(["64 facts", "written", "s a fact"], rows)
