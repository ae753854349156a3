"""Edits of real facts in masked models and the autoregressive one beside them (PROTOCOL.md).

    python benchmarks/real_facts/study.py run --data-dir DATA_DIR --out runs/block
    python benchmarks/real_facts/study.py run --data-dir DATA_DIR --out runs/mdm \
        --masked ROME_MDM/smollm2-mdm --causal none --control none
    python benchmarks/real_facts/study.py tables --out runs/block runs/mdm

`run` goes on where it was stopped: it edits fact after fact, each in every arm. With `--chosen`, layer and
clamp of each arm are those that search.py found. `tables` writes results.json and results.md from the lines
of all runs: facts that are finished in every arm. The lines hold the data sets' prompts, so they stay out of
the repository; results.json holds every fact's outcome without them. Other models: `--masked`, `--causal` and
`--control` name their hyperparameter files (../llada_8b.sh).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from easyedit_mdm import Session
from easyedit_mdm.common.files import append_line, write_json, write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.data.cases import BenchCase, load_cases
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import METHODS, MethodHyperParams
from easyedit_mdm.editing.request import target_ids
from easyedit_mdm.evaluation.records import Judgement, scores
from easyedit_mdm.models import Adapter
from easyedit_mdm.report.summaries import bootstrap_mean
from easyedit_mdm.runs.judge import Judge, kept
from easyedit_mdm.runs.methods import load_ours
from easyedit_mdm.runs.run import Kept

HERE = Path(__file__).parent
# how many times the file's steps an arm may take at most, and its states; None: an autoregressive model's
ARMS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "plain": (1, {"state_schedule": "full_mask"}),
    "plain x4": (4, {"state_schedule": "full_mask"}),
    "aware": (1, {"state_schedule": "stratified", "max_states": 4}),
    "aware x4": (4, {"state_schedule": "stratified", "max_states": 4}),
    "spread x4": (4, {"state_schedule": "spread", "max_states": 16}),
    "autoregressive": (1, None),
    "autoregressive x4": (4, None),
    "control x4": (4, None),
    "plain for N steps x4": (4, {"state_schedule": "full_mask"}),
    "cycle x4": (4, {"state_schedule": "cycle"}),
    "in context": (1, {}),
    "autoregressive in context": (1, None),
}
FOR_N_STEPS = "plain for N steps x4"  # plain at the try that was best in N steps; "plain x4": in one step
RUN = (
    "plain x4",
    "spread x4",
    "autoregressive x4",
    "control x4",
)  # the arms since the second run (PROTOCOL.md)
# a fact counts without these: the first was added after three facts of the first run, the second runs last
LATER = ("aware x4", "cycle x4")
IN_CONTEXT = "in context"  # nothing is optimised: IKE_MDM, its new fact before every prompt
LENGTHS = (1, 2, 3, 4)
# by seed: the runs whose facts are not drawn again
SEEN: dict[int, tuple[str, ...]] = {0: (), 1: ("pilots/first", "pilots/second")}
SEEN[2] = (*SEEN[1], "third")
SEEN[3] = (*SEEN[2], "search")
SEEN[4] = (*SEEN[3], "fourth")
IN_README = "fourth"  # the run whose table README shows
NEIGHBOURS = 2  # of a KAMEL fact: other facts of its relation
Rows = dict[str, list[dict[str, Any]]]


def chosen(model: Adapter, data_dir: Path, each: int, seed: int) -> list[BenchCase]:
    """`each` facts of every length, in turn; none that an earlier run had (`SEEN`)."""
    if seed not in SEEN:
        raise SystemExit(f"--seed {seed}: a run has a seed of its own, one of {sorted(SEEN)}; add it to SEEN")
    seen = {case for name in SEEN[seed] for case in edited(HERE / name / "results.json")}
    found: dict[int, list[BenchCase]] = {n: [] for n in LENGTHS}
    held_out = data_dir / "counterfact" / "counterfact_rome_700.json"  # not in the adapter's training text
    drawn = load_cases("counterfact", data_file=held_out, limit=4 * each, seed=seed).cases
    limit = 40 * (max(each, 15) if seed > 1 else each)
    kamel = load_cases("kamel", data_dir, limit=limit, seed=seed, tokenizer=model.tokenizer)
    drawn += kamel.cases
    if seed > 1:  # until the third run, KAMEL's first relations alone: load_cases keeps the files' order
        random.Random(seed).shuffle(drawn)
    for case in (case for case in drawn if case.case_id not in seen):
        n = len(target_ids(model, case.prompt, case.target_new))
        if n in found and (n == 1) == isinstance(case.case_id, int):
            found[n].append(case if n == 1 or seed < 2 else with_neighbours(case, kamel.cases))
    short = {n: len(cases) for n, cases in found.items() if len(cases) < each}
    if short:
        raise SystemExit(f"too few facts of some lengths: {short}; ask for fewer with --each")
    return [found[n][i] for i in range(each) for n in LENGTHS]


def edited(file: Path) -> set[int | str]:
    """All facts that a run edited, also those that it did not finish in every arm."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {line["case_id"] for line in kept["lines"]} | set(kept.get("unfinished", []))


def with_neighbours(case: BenchCase, others: Sequence[BenchCase]) -> BenchCase:
    """A KAMEL fact with prompts about other subjects of its relation: what an edit should leave alone."""
    relation = str(case.case_id).split("/")[0]
    near = [o for o in others if str(o.case_id).split("/")[0] == relation and o.subject != case.subject]
    near = random.Random(str(case.case_id)).sample(near, min(NEIGHBOURS, len(near)))
    return replace(
        case, locality={"relation": tuple((o.prompt, o.ground_truth) for o in near)} if near else {}
    )


def arms_of(args: argparse.Namespace) -> dict[str, tuple[Adapter, MethodHyperParams]]:
    """Each arm's model and settings; every model is loaded once."""
    tries = json.loads(Path(args.chosen).read_text(encoding="utf-8"))["chosen"] if args.chosen else None
    files = {"masked": args.masked, "causal": args.causal, "control": args.control}
    found, loaded = {}, {}
    for arm in args.arms:
        times, states = ARMS[arm]
        role = "masked" if states is not None else "control" if arm.startswith("control") else "causal"
        if files[role] == "none":
            continue
        loaded[role] = loaded.get(role) or load_ours("ROME_MDM", files[role], args.device)
        own, hparams = loaded[role]
        if IN_CONTEXT in arm:
            named = {"alg_name": "IKE_MDM", "model_name": hparams.model_name}
            found[arm] = (own, METHODS["IKE_MDM"].hparams(**named))
            continue
        steps = times * hparams.v_num_grad_steps
        found[arm] = (own, replace(hparams, v_num_grad_steps=steps, **(states or {})))
        if tries is not None:
            name = f"{arm}, {Path(hparams.model_name).name}"
            if name not in tries:
                raise SystemExit(f"{args.chosen} has no choice for {name!r}, only for {sorted(tries)}")
            found[arm] = (own, replace(found[arm][1], **tries[name]))
    if FOR_N_STEPS in found and "plain x4" in found and found[FOR_N_STEPS][1] == found["plain x4"][1]:
        del found[FOR_N_STEPS]  # the same edit
    return found


def run(args: argparse.Namespace) -> None:
    """Edit and judge, fact by fact."""
    if not args.data_dir:
        raise SystemExit("run needs --data-dir: the folder that holds counterfact/ and kamel/")
    if len(args.out) != 1:
        raise SystemExit(f"run writes into one folder, --out names {len(args.out)}")
    out = Path(args.out[0])
    out.mkdir(parents=True, exist_ok=True)
    arms, judge = arms_of(args), Judge(DecodeConfig(), rungs=False, fluency=False)
    before = {arm: Kept(model_fingerprint(model.native), judge) for arm, (model, _) in arms.items()}
    settings = {"seed": args.seed, "each": args.each, "arms": told(arms)}
    file = begun(out, settings)
    done = {(line["arm"], line["case_id"]) for line in read(file)}
    first = next(iter(arms.values()))[0]
    for case in chosen(first, Path(args.data_dir), args.each, args.seed):
        for arm, (model, hparams) in arms.items():
            if (arm, case.case_id) in done:
                continue
            line = one(model, hparams, case, judge, before[arm].get(model, case))
            with file.open("a", encoding="utf-8") as stream:
                named = {"arm": arm, "model": Path(hparams.model_name).name, "layers": hparams.layers, **line}
                append_line(stream, file, json.dumps(named, sort_keys=True))
            print(arm, case.case_id, line["n_tokens"], line["after"], f"{line['seconds']:.0f} s", flush=True)


def one(model: Adapter, hparams: Any, case: BenchCase, judge: Judge, before: Judgement) -> dict[str, Any]:
    """One fact in one arm."""
    began = time.perf_counter()
    with Session(model, hparams) as session:
        (edit,) = session.edit([case.request()])
        seconds = time.perf_counter() - began
        after = judge.judge(model, case)
        after |= kept(before, after)
    fact = edit.card["facts"][0]
    return {
        "case_id": case.case_id,
        "subject": case.subject,
        "n_tokens": fact["n_tokens"],
        "before": outcome(before),
        "after": outcome(after),
        "steps": fact["steps"],
        "layer_passes": fact["layer_passes"],
        "loss": fact["losses"][-1] if fact["losses"] else None,
        "seconds": seconds,
        "text": scores(after["multi_step"]["rewrite"])[0]["text"],
    }


def outcome(judged: Judgement) -> dict[str, float | None]:
    """Success in N steps and in one, paraphrase, locality."""
    sections = judged["multi_step"]
    (rewrite,) = scores(sections["rewrite"])
    paraphrases = scores(sections.get("rephrase"))
    once = [float(s["one_step_exact"]) for s in paraphrases if "one_step_exact" in s]
    stay = list(judged.get("locality_kept", {}).values())
    return {
        "exact": float(rewrite["exact"]),
        "tokens": rewrite["token_acc"],
        "one_step": float(rewrite["one_step_exact"]) if "one_step_exact" in rewrite else None,
        "one_step_tokens": rewrite.get("one_step"),
        "paraphrase": sum(float(s["exact"]) for s in paraphrases) / len(paraphrases) if paraphrases else None,
        "one_step_paraphrase": sum(once) / len(once) if once else None,
        "locality": sum(stay) / len(stay) if stay else None,
    }


def told(arms: Mapping[str, tuple[Adapter, MethodHyperParams]]) -> dict[str, Any]:
    """The settings of each arm, as they stand in a file."""
    return {arm: json.loads(json.dumps(hparams.to_dict(), default=str)) for arm, (_, hparams) in arms.items()}


def begun(out: Path, settings: dict[str, Any]) -> Path:
    """The file of a run's lines, ready for more; a last line that was not finished is cut off.

    Raises:
        SystemExit: if the folder holds a run with other settings.
    """
    card, file = out / "settings.json", out / "lines.jsonl"
    if card.exists() and (known := json.loads(card.read_text(encoding="utf-8"))) != settings:
        other = sorted(key for key in settings if known.get(key) != settings[key])
        raise SystemExit(f"{out} holds a run with other settings ({', '.join(other)}): give another --out")
    if file.exists() and not card.exists():
        raise SystemExit(f"{out} holds lines, but not their settings: give another --out")
    write_json(card, settings)
    if file.exists():
        whole = file.read_bytes()
        write_text(file, whole[: whole.rfind(b"\n") + 1].decode("utf-8"))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    """The finished lines."""
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines()]


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a results.json."""
    return json.loads(file.read_text(encoding="utf-8"))["lines"]


def tables(args: argparse.Namespace) -> None:
    """Facts that are finished in every arm, as tables."""
    folder = Path(args.results or (HERE / IN_README if args.committed else args.out[0]))
    if args.committed:
        lines = lines_of(folder / "results.json")
    else:
        lines = [line for out in args.out for line in read(Path(out) / "lines.jsonl")]
    if not lines:
        raise SystemExit(f"{folder if args.committed else args.out} holds no finished edits: run first")
    rows = finished(lines)
    private = ("subject", "text")  # the data sets'
    shown = [{k: v for k, v in line.items() if k not in private} for some in rows.values() for line in some]
    folder.mkdir(parents=True, exist_ok=True)
    known = {line["case_id"] for line in shown}
    if args.committed:
        unfinished = edited(folder / "results.json") - known
    else:
        unfinished = {line["case_id"] for line in lines} - known
    kept = {
        "facts": len(next(iter(rows.values()))),
        "unfinished": sorted(unfinished, key=str),
        "lines": shown,
    }
    write_json(folder / "results.json", kept)
    write_text(folder / "results.md", page(rows, folder))
    if folder.resolve() == HERE / IN_README:
        readme = HERE.parent.parent / "README.md"
        text = re.sub(
            r"(<!-- real-facts -->\n).*?(<!-- /real-facts -->)",
            lambda m: m[1] + short(rows) + m[2],
            readme.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        write_text(readme, text)


def finished(lines: Sequence[dict[str, Any]]) -> Rows:
    """Lines by arm (`plain x4, smollm2-mdm`), of the facts that are finished in every arm."""
    by_arm: dict[str, dict[Any, dict[str, Any]]] = {}
    for line in lines:
        masked = ARMS[line["arm"]][1] is not None
        name = f"{line['arm']}, {line['model']}" if masked and "model" in line else line["arm"]
        by_arm.setdefault(name, {})[line["case_id"]] = line
    order = list(ARMS)
    names = sorted(
        by_arm,
        key=lambda name: (ARMS[arm_of(name)][1] is None, model_of(name), order.index(arm_of(name))),
    )
    whole = [
        c for c in by_arm[names[0]] if all(c in by_arm[name] for name in names if arm_of(name) not in LATER)
    ]
    return {name: [by_arm[name][c] for c in whole if c in by_arm[name]] for name in names}


def arm_of(name: str) -> str:
    """The arm of a row."""
    return name.split(", ")[0]


def model_of(name: str) -> str:
    """Its masked model, where it is named."""
    return name.partition(", ")[2]


def page(rows: Rows, folder: Path) -> str:
    """results.md, to stand in a folder."""
    protocol = Path(os.path.relpath(HERE / "PROTOCOL.md", folder)).as_posix()
    out = [
        "# Edits of real facts: results",
        "",
        f"Made by `study.py tables`. [What was run]({protocol}).",
        "",
    ]
    for title, lengths in (("Targets of one token", (1,)), ("Targets of two to four tokens", (2, 3, 4))):
        some = {arm: [r for r in found if r["n_tokens"] in lengths] for arm, found in rows.items()}
        out += [f"## {title}: {len(next(iter(some.values())))} facts", ""]
        names = ("arm", "n", "N steps", "one step", "right tokens", "paraphrase", "locality", "steps")
        out += ["| " + " | ".join([*names, "layer-passes", "s"]) + " |"]
        out += ["| --- |" + " --- |" * 9]
        seen = set()
        for arm, found in some.items():
            alone = ARMS[arm_of(arm)][1] is None
            group = model_of(arm) or (arm.replace(f" {IN_CONTEXT}", " x4") if alone else "masked")
            if found and group not in seen:
                out.append(row(f"no edit ({group})", found, "before"))
            seen.add(group)
        out += [row(arm, found, "after") for arm, found in some.items() if found]
        out.append("")
    if any(model_of(arm) for arm in rows):
        out += by_length(rows)
    longer = {arm: [r for r in found if r["n_tokens"] > 1] for arm, found in rows.items()}
    if any(line["after"].get("one_step_paraphrase") is not None for some in longer.values() for line in some):
        out += ["## Two to four tokens: paraphrases", "", "| arm | n | N steps | one step |"]
        out += ["| --- | --- | --- | --- |"]
        for arm, found in longer.items():
            ways = [mean([r["after"].get(k) for r in found]) for k in ("paraphrase", "one_step_paraphrase")]
            out.append("| " + " | ".join([arm, str(len(found)), *ways]) + " |")
        out.append("")
    out += ["## Two to four tokens: differences, paired by fact", ""]
    out += ["| in N steps | minus | difference | n |", "| --- | --- | --- | --- |"]
    pairs = (
        ("aware", ("plain", "plain x4", "autoregressive")),
        ("aware x4", ("plain x4", "autoregressive")),
        ("spread x4", ("plain x4", FOR_N_STEPS, IN_CONTEXT, "autoregressive x4", "control x4")),
        ("cycle x4", ("plain x4", FOR_N_STEPS, "spread x4")),
        ("plain x4", ("autoregressive x4", "control x4")),
        ("autoregressive x4", ("control x4",)),
    )
    for wanted, others in pairs:
        for arm in (arm for arm in longer if arm_of(arm) == wanted):
            for other in (o for name in others for o in longer if arm_of(o) == name):
                if model_of(arm) and model_of(other) and model_of(arm) != model_of(other):
                    continue
                for way, key in (("N steps", "exact"), ("one step", "one_step")):
                    found = differences(longer[arm], longer[other], key)
                    if found:
                        out.append(f"| {arm} | {other}, {way} | {mean(found)} | {len(found)} |")
    return "\n".join([*out, *primary(longer)]) + "\n"


def by_length(rows: Rows) -> list[str]:
    """Success by the target's number of tokens, in N steps / in one."""
    sizes = {n: sum(r["n_tokens"] == n for r in next(iter(rows.values()))) for n in LENGTHS}
    out = ["## By target length: in N steps / in one step", ""]
    out += ["| arm | " + " | ".join(f"{n} ({size} facts)" for n, size in sizes.items()) + " |"]
    out += ["| --- |" + " --- |" * len(sizes)]
    for arm, found in rows.items():
        cells = []
        for n in sizes:
            mine = [r["after"] for r in found if r["n_tokens"] == n]
            ways = [[a[key] for a in mine if a[key] is not None] for key in ("exact", "one_step")]
            cells.append(" / ".join(f"{sum(way) / len(way):.2f}" for way in ways if way))
        out.append("| " + " | ".join([arm, *cells]) + " |")
    return [*out, ""]


def primary(longer: Rows) -> list[str]:
    """The third run's two tests: aware in N steps less plain in one step, at 97.5 % each."""
    models = [model_of(arm) for arm in longer if arm_of(arm) == "spread x4" and model_of(arm)]
    if len(models) != 2:
        return []
    out = [
        "",
        "## The two primary comparisons",
        "",
        "| model | spread, N steps, less plain, one step | 97.5 % | n |",
    ]
    out += ["| --- | --- | --- | --- |"]
    for model in models:
        found = differences(longer[f"spread x4, {model}"], longer[f"plain x4, {model}"], "one_step")
        made = bootstrap_mean(found, [str(i) for i in range(len(found))], level=0.975)
        out.append(
            f"| {model} | {made['mean']:.2f} | [{made['low']:.2f}, {made['high']:.2f}] | {len(found)} |"
        )
    return out


def short(rows: Rows) -> str:
    """README's table: targets of two to four tokens; what is kept, of all facts."""
    names = (
        "facts", "N steps", "less plain, N steps", "less plain, one step", "one step", "paraphrase",
        "layer-passes", "kept",
    )  # fmt: skip
    out = ["| edit | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    words = {
        "plain x4": "plain, `{}`", FOR_N_STEPS: "plain, tuned for N steps, `{}`",
        "spread x4": "denoising-aware, `{}`", "cycle x4": "the paper's schedule, `{}`",
        IN_CONTEXT: "in context, `{}`", "autoregressive x4": "`smollm2`, autoregressive",
        "autoregressive in context": "in context, `smollm2`, autoregressive",
        "control x4": "`smollm2-control`, autoregressive",
    }  # fmt: skip
    for arm, lines in rows.items():
        plain = rows.get(f"plain x4, {model_of(arm)}", [])
        whens = ("before", "after") if arm_of(arm) == "plain x4" else ("after",)
        for when in whens:
            longer = [line for line in lines if line["n_tokens"] > 1]
            exact, one_step, paraphrase = (
                mean([line[when][k] for line in longer]) or "-" for k in ("exact", "one_step", "paraphrase")
            )
            leads = ["-", "-"]
            if when == "after" and plain:
                others = [line for line in plain if line["n_tokens"] > 1]
                leads = [mean(differences(longer, others, key)) for key in ("exact", "one_step")]
                leads[0] = "-" if arm_of(arm) == "plain x4" else leads[0]
            passes = sum(line["layer_passes"] for line in longer) / max(1, len(longer))
            near = mean([line["after"]["locality"] for line in lines]) if when == "after" else "-"
            name = (
                f"none, `{model_of(arm)}`"
                if when == "before"
                else words.get(arm_of(arm), arm).format(model_of(arm))
            )
            cost = ["-" if when == "before" else f"{passes:,.0f}", near]
            out.append(
                "| " + " | ".join([name, str(len(longer)), exact, *leads, one_step, paraphrase, *cost]) + " |"
            )
    return "\n".join(out) + "\n"


def differences(lines: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> list[float]:
    """Success of an arm in N steps minus another's, of the facts that both have."""
    theirs = {line["case_id"]: line["after"][key] for line in others}
    return [
        line["after"]["exact"] - theirs[line["case_id"]]
        for line in lines
        if theirs.get(line["case_id"]) is not None
    ]


def row(name: str, lines: Sequence[dict[str, Any]], when: str) -> str:
    """A row of a table."""
    cells = [
        mean([line[when][key] for line in lines])
        for key in ("exact", "one_step", "tokens", "paraphrase", "locality")
    ]
    cost = ["", "", ""] if when == "before" else [
        f"{sum(line[key] for line in lines) / max(1, len(lines)):.0f}"
        for key in ("steps", "layer_passes", "seconds")
    ]  # fmt: skip
    return "| " + " | ".join([name, str(len(lines)), *cells, *cost]) + " |"


def mean(values: Sequence[float | None]) -> str:
    """A mean with its interval."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    found = bootstrap_mean(known, [str(i) for i in range(len(known))])
    if found["low"] is None:  # of one fact alone
        return f"{found['mean']:.2f}"
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "tables"))
    parser.add_argument("--data-dir")
    parser.add_argument(
        "--out", nargs="+", default=["runs/real_facts"], help="the run's folder; tables: folders"
    )
    parser.add_argument("--masked", default="ROME_MDM/smollm2-block", help="its hyperparameter file")
    parser.add_argument("--causal", default="ROME_MDM/smollm2", help="the same, or none")
    parser.add_argument("--control", default="ROME_MDM/smollm2-control", help="the same, or none")
    parser.add_argument("--device")
    parser.add_argument(
        "--results",
        help="folder for results.json and results.md: the first of --out by default, with --committed the one"
        f" whose table README shows ({IN_README})",
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(RUN))
    parser.add_argument("--each", type=int, default=15, help="facts of each length")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of the facts; 0: the pilots', 1: the third run's, 3: the fourth's",
    )
    parser.add_argument("--chosen", help="layer and clamp of each arm: search.py's chosen.json")
    parser.add_argument("--committed", action="store_true", help="tables from results.json, not from a run")
    args = parser.parse_args()
    {"run": run, "tables": tables}[args.what](args)


if __name__ == "__main__":
    main()
