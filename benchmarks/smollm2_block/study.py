"""Edits of real facts in a masked model and the autoregressive one beside it (PROTOCOL.md).

    python benchmarks/smollm2_block/study.py run --data-dir DATA_DIR --out runs/smollm2_block
    python benchmarks/smollm2_block/study.py tables --out runs/smollm2_block

`run` goes on where it was stopped: it edits fact after fact, each in every arm. `tables` writes results.json
and results.md from the lines. The lines hold the data sets' prompts, so they stay out of the repository;
results.json holds every fact's outcome without them. Other models: `--masked` and `--causal` name their
hyperparameter files (../llada_8b.sh).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from easyedit_mdm import Session
from easyedit_mdm.common.files import append_line, write_json, write_text
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.data.cases import BenchCase, load_cases
from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.editing import ROMEMDMHyperParams
from easyedit_mdm.editing.request import target_ids
from easyedit_mdm.evaluation.records import Judgement, scores
from easyedit_mdm.models import Adapter
from easyedit_mdm.report.summaries import bootstrap_mean
from easyedit_mdm.runs.judge import Judge, kept
from easyedit_mdm.runs.methods import load_ours
from easyedit_mdm.runs.run import Kept

HERE = Path(__file__).parent
# how many times the file's steps an arm may take at most, and its states; None: the autoregressive model's
ARMS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "plain": (1, {"state_schedule": "full_mask"}),
    "plain x4": (4, {"state_schedule": "full_mask"}),
    "aware": (1, {"state_schedule": "stratified", "max_states": 4}),
    "aware x4": (4, {"state_schedule": "stratified", "max_states": 4}),
    "spread x4": (4, {"state_schedule": "spread", "max_states": 16}),
    "autoregressive": (1, None),
    "autoregressive x4": (4, None),
}
SECOND = ("plain x4", "spread x4", "autoregressive x4")  # the arms of the second run (PROTOCOL.md)
LATER = "aware x4"  # added after three facts of the first run; a fact counts without it
LENGTHS, SEED = (1, 2, 3, 4), 0


def chosen(model: Adapter, data_dir: Path, each: int) -> list[BenchCase]:
    """`each` facts of every length, in turn."""
    found: dict[int, list[BenchCase]] = {n: [] for n in LENGTHS}
    held_out = data_dir / "counterfact" / "counterfact_rome_700.json"  # not in the adapter's training text
    drawn = load_cases("counterfact", data_file=held_out, limit=4 * each, seed=SEED).cases
    drawn += load_cases("kamel", data_dir, limit=40 * each, seed=SEED, tokenizer=model.tokenizer).cases
    for case in drawn:
        n = len(target_ids(model, case.prompt, case.target_new))
        if n in found and (n == 1) == isinstance(case.case_id, int):
            found[n].append(case)
    short = {n: len(cases) for n, cases in found.items() if len(cases) < each}
    if short:
        raise SystemExit(f"too few facts of some lengths: {short}; ask for fewer with --each")
    return [found[n][i] for i in range(each) for n in LENGTHS]


def arms_of(args: argparse.Namespace) -> dict[str, tuple[Adapter, ROMEMDMHyperParams]]:
    """Each arm's model and settings; both models are loaded once."""
    model, masked = load_ours("ROME_MDM", args.masked, args.device)
    wanted = [arm for arm in args.arms if args.causal != "none" or ARMS[arm][1] is not None]
    found, causal = {}, None
    for arm in wanted:
        times, states = ARMS[arm]
        if states is None and causal is None:
            causal = load_ours("ROME_MDM", args.causal, args.device)
        own, hparams = (model, masked) if states is not None else causal
        steps = times * hparams.v_num_grad_steps
        found[arm] = (own, replace(hparams, v_num_grad_steps=steps, **(states or {})))
    return found


def run(args: argparse.Namespace) -> None:
    """Edit and judge, fact by fact."""
    if not args.data_dir:
        raise SystemExit("run needs --data-dir: the folder that holds counterfact/ and kamel/")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    arms, judge = arms_of(args), Judge(DecodeConfig(), rungs=False, fluency=False)
    before = {arm: Kept(model_fingerprint(model.native), judge) for arm, (model, _) in arms.items()}
    file = out / "lines.jsonl"
    done = {(line["arm"], line["case_id"]) for line in read(file)}
    first = next(iter(arms.values()))[0]
    for case in chosen(first, Path(args.data_dir), args.each):
        for arm, (model, hparams) in arms.items():
            if (arm, case.case_id) in done:
                continue
            line = one(model, hparams, case, judge, before[arm].get(model, case))
            with file.open("a", encoding="utf-8") as stream:
                append_line(stream, file, json.dumps({"arm": arm, **line}, sort_keys=True))
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
        "loss": fact["losses"][-1],
        "seconds": seconds,
        "text": scores(after["multi_step"]["rewrite"])[0]["text"],
    }


def outcome(judged: Judgement) -> dict[str, float | None]:
    """Success in N steps and in one, paraphrase, locality."""
    sections = judged["multi_step"]
    (rewrite,) = scores(sections["rewrite"])
    paraphrases = scores(sections.get("rephrase"))
    stay = list(judged.get("locality_kept", {}).values())
    return {
        "exact": float(rewrite["exact"]),
        "tokens": rewrite["token_acc"],
        "one_step": float(rewrite["one_step_exact"]) if "one_step_exact" in rewrite else None,
        "paraphrase": sum(float(s["exact"]) for s in paraphrases) / len(paraphrases) if paraphrases else None,
        "locality": sum(stay) / len(stay) if stay else None,
    }


def read(file: Path) -> list[dict[str, Any]]:
    """The finished lines."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def tables(args: argparse.Namespace) -> None:
    """Facts that are finished in every arm, as tables."""
    folder = Path(args.results)
    source = folder / "results.json" if args.committed else Path(args.out) / "lines.jsonl"
    lines = json.loads(source.read_text())["lines"] if args.committed else read(source)
    arms = [arm for arm in ARMS if any(line["arm"] == arm for line in lines)]
    if not arms:
        raise SystemExit(f"{source} holds no finished edits: `study.py run` first")
    by_arm = {arm: {line["case_id"]: line for line in lines if line["arm"] == arm} for arm in arms}
    whole = [c for c in by_arm[arms[0]] if all(c in by_arm[arm] for arm in arms if arm != LATER)]
    rows = {arm: [by_arm[arm][c] for c in whole if c in by_arm[arm]] for arm in arms}
    private = ("subject", "text")  # the data sets'
    shown = [{k: v for k, v in line.items() if k not in private} for arm in arms for line in rows[arm]]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {"facts": len(whole), "lines": shown})
    write_text(folder / "results.md", page(rows))
    if folder == HERE:
        readme = HERE.parent.parent / "README.md"
        text = re.sub(
            r"(<!-- pilot -->\n).*?(<!-- /pilot -->)",
            lambda m: m[1] + short(rows) + m[2],
            readme.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        write_text(readme, text)


def page(rows: dict[str, list[dict[str, Any]]]) -> str:
    """results.md."""
    out = ["# Results of the pilot", "", "Made by `study.py tables`. [What was run](PROTOCOL.md).", ""]
    rows = {arm: found for arm, found in rows.items() if found}
    masked, causal = (
        next((arm for arm in rows if (ARMS[arm][1] is None) == alone), "") for alone in (False, True)
    )
    for title, lengths in (("Targets of one token", (1,)), ("Targets of two to four tokens", (2, 3, 4))):
        some = {arm: [r for r in found if r["n_tokens"] in lengths] for arm, found in rows.items()}
        out += [f"## {title}: {len(some[masked])} facts", ""]
        names = ("arm", "n", "N steps", "one step", "right tokens", "paraphrase", "locality", "steps")
        out += ["| " + " | ".join([*names, "layer-passes", "s"]) + " |"]
        out += ["| --- |" + " --- |" * 9]
        for arm, name in ((masked, "masked"), (causal, "autoregressive")):
            if some.get(arm):
                out.append(row(f"no edit ({name})", some[arm], "before"))
        out += [row(arm, found, "after") for arm, found in some.items() if found]
        out.append("")
    longer = {arm: [r for r in found if r["n_tokens"] > 1] for arm, found in rows.items()}
    out += ["## Two to four tokens: differences, paired by fact", ""]
    out += ["| in N steps | minus | difference | n |", "| --- | --- | --- | --- |"]
    for arm, others in (
        ("aware", ("plain", "plain x4", "autoregressive")),
        (LATER, ("plain x4", "autoregressive")),
        ("spread x4", ("plain x4", "autoregressive x4")),
        ("plain x4", ("autoregressive x4",)),
    ):
        for other in others:
            for way, key in (("N steps", "exact"), ("one step", "one_step")):
                found = differences(longer.get(arm, []), longer.get(other, []), key)
                if found:
                    out.append(f"| {arm} | {other}, {way} | {mean(found)} | {len(found)} |")
    return "\n".join(out) + "\n"


def short(rows: dict[str, list[dict[str, Any]]]) -> str:
    """README's table: targets of two to four tokens, facts that are finished in every arm shown.

    What is kept is known of the facts of one token alone.
    """
    shown = {arm: rows.get(arm, []) for arm in SECOND}
    common = set.intersection(*({line["case_id"] for line in lines} for lines in shown.values()))
    names = (
        "facts", "N steps", "less plain, N steps", "less plain, one step", "one step", "paraphrase",
        "layer-passes", "kept",
    )  # fmt: skip
    plain = [line for line in shown["plain x4"] if line["case_id"] in common and line["n_tokens"] > 1]
    out = ["| edit | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for arm, when, name in (
        ("plain x4", "before", "none, `smollm2-block`"),
        ("plain x4", "after", "plain, `smollm2-block`"),
        ("spread x4", "after", "denoising-aware, `smollm2-block`"),
        ("autoregressive x4", "after", "`smollm2`"),
    ):
        lines = [line for line in shown[arm] if line["case_id"] in common]
        longer = [line for line in lines if line["n_tokens"] > 1]
        exact, one_step, paraphrase = (
            mean([line[when][k] for line in longer]) or "-" for k in ("exact", "one_step", "paraphrase")
        )
        leads = ["-", "-"]
        if when == "after":
            leads = [mean(differences(longer, plain, key)) for key in ("exact", "one_step")]
            leads[0] = "-" if arm == "plain x4" else leads[0]
        cells = [exact, *leads, one_step, paraphrase]
        passes = sum(line["layer_passes"] for line in longer) / max(1, len(longer))
        near = mean([line[when]["locality"] for line in lines if line["n_tokens"] == 1]) or "-"
        cost = ["-" if when == "before" else f"{passes:,.0f}", near]
        out.append("| " + " | ".join([name, str(len(longer)), *cells, *cost]) + " |")
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
    parser.add_argument("--out", default="runs/smollm2_block")
    parser.add_argument("--masked", default="ROME_MDM/smollm2-block", help="its hyperparameter file")
    parser.add_argument("--causal", default="ROME_MDM/smollm2", help="the same, or none")
    parser.add_argument("--device")
    parser.add_argument("--results", default=str(HERE), help="folder for results.json and results.md")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(SECOND))
    parser.add_argument("--each", type=int, default=10, help="facts of each length")
    parser.add_argument("--committed", action="store_true", help="tables from results.json, not from a run")
    args = parser.parse_args()
    {"run": run, "tables": tables}[args.what](args)


if __name__ == "__main__":
    main()
