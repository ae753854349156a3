"""`easyedit-mdm demo`: everything that the package is for, on the smallest model, in under a minute.

Where SmolLM2 is installed, a fact about the real world comes after it.

The facts are drawn from the twin's world by a seed, not picked by outcome. What is claimed is checked, and
the exit status is 0 only if every claim holds; how the plain transfer fares on longer targets is shown, not
claimed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from easyedit_mdm.common.files import explained, write_json, write_text
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.demo import real
from easyedit_mdm.demo.frames import frames
from easyedit_mdm.editing import ROMEMDMHyperParams
from easyedit_mdm.host import register
from easyedit_mdm.models import Adapter
from easyedit_mdm.session import Session
from easyedit_mdm.twins.benchmark import Case, cases
from easyedit_mdm.twins.world import World
from easyedit_mdm.version import __version__

MODEL = "twin-llada"
SEED = 0
LENGTHS = (1, 2, 4, 6, 8)
SHOWN_LENGTH = 4
FACTS_A_LENGTH = 2


def call(case: Case) -> dict[str, Any]:
    """Arguments for EasyEdit's `BaseEditor.edit`."""
    near = case.neighbours[:4]
    return {
        "prompts": [case.fact.prompt()],
        "target_new": [case.target],
        "subject": [case.fact.subject],
        "rephrase_prompts": [case.fact.paraphrase()],
        "locality_inputs": {
            "neighborhood": {
                "prompt": [[n.prompt() for n in near]],
                "ground_truth": [[n.object for n in near]],
            }
        },
    }


def draw_cases(seed: int = SEED) -> list[Case]:
    """`FACTS_A_LENGTH` edits for each of `LENGTHS`, of different test facts of the twins' world, drawn by
    `seed`.
    """
    every = cases(World.build(), "test")
    of_length = {length: [c for c in every if c.length == length] for length in LENGTHS}
    facts = random.Random(seed).sample(range(len(of_length[LENGTHS[0]])), FACTS_A_LENGTH * len(LENGTHS))
    return [of_length[length][facts.pop()] for length in LENGTHS for _ in range(FACTS_A_LENGTH)]


def run_demo(out: str | Path, easyedit_home: str | None = None) -> bool:
    """Run the demo; writes `demo.json` and `demo.html` into `out`.

    Returns:
        whether every claim holds.
    """
    began = time.monotonic()
    console = Console()
    console.rule(f"[bold]easyedit_mdm {__version__}[/bold]")
    joined = register(easyedit_home)
    aware = ROMEMDMHyperParams.from_hparams(f"ROME_MDM/{MODEL}")
    plain = replace(aware, state_schedule="full_mask")
    with _quietly():
        editor = joined.editor_class.from_hparams(aware)
    model: Adapter = editor.model
    before = parameter_hashes(model)
    console.print(
        f"{MODEL}: {sum(p.numel() for p in model.parameters()):,} parameters; EasyEdit: {joined.host.form} at"
        f" {joined.host.root.name}\n"
    )
    drawn = draw_cases()
    results = [_edit_both(editor, case, plain, aware, console) for case in drawn]
    shown = next(r for r in results if r["n_tokens"] == SHOWN_LENGTH)
    paths = _watch(model, drawn[results.index(shown)], aware)
    restored = parameter_hashes(model) == before
    with console.status(f"a fact about the real world, in {real.MODEL}"):
        world = real.edit_the_real_world() if real.installed() else None
    claims = _claims(results, shown, restored, world)
    report = {
        "version": __version__,
        "model": MODEL,
        "easyedit": joined.host.form,
        "seed": SEED,
        "claims": claims,
        "seconds": round(time.monotonic() - began, 1),
        "hyperparameters": {"plain": plain.to_dict(), "aware": aware.to_dict()},
        "shown": {**shown, "denoising": paths},
        "cases": results,
        "real": world,
        "real_install": real.INSTALL,
    }
    folder = Path(out)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "demo.json", report)
    write_text(folder / "demo.html", _html(report))
    _print_demo(console, report, folder)
    return all(claim["holds"] for claim in claims.values())


def _edit_both(
    editor: Any, case: Case, plain: ROMEMDMHyperParams, aware: ROMEMDMHyperParams, console: Console
) -> dict[str, Any]:
    """The same edit with both schedules, each through EasyEdit's editor, which restores the weights after
    it.
    """
    row: dict[str, Any] = {
        "n_tokens": case.length,
        "prompt": case.fact.prompt(),
        "was": case.fact.object,
        "target": case.target,
    }
    for name, hparams in (("plain", plain), ("aware", aware)):
        editor.hparams = replace(hparams, model_name=editor.hparams.model_name)
        with _quietly(), console.status(f"{row['prompt']} … {case.target} ({name})"):
            metrics, _, _ = editor.edit(**call(case), keep_original_weight=True, verbose=False)
        post = metrics[0]["post"]
        row["before"] = metrics[0]["pre"]["multi_step"]["rewrite"]["text"]
        row[name] = {
            "rewrite": post["multi_step"]["rewrite"]["exact"],
            "paraphrase": post["multi_step"]["rephrase"]["exact"],
            "locality": float(np.mean(post["locality"]["neighborhood_acc"])),
            "text": post["multi_step"]["rewrite"]["text"],
            "seconds": round(metrics[0].get("time", 0.0), 2),
        }
    return row


def _watch(model: Adapter, case: Case, hparams: ROMEMDMHyperParams) -> dict[str, list]:
    """The denoising of the prompt before and after the denoising-aware edit, frame by frame."""
    prompt = case.fact.prompt()
    before = frames(model, prompt, case.target)
    with Session(model, hparams) as session:
        session.edit([case.request()])
        after = frames(model, prompt, case.target)
    return {"before": before, "after": after}


def _claims(results: list[dict], shown: dict, restored: bool, real: dict | None) -> dict[str, dict[str, Any]]:
    """What is claimed: whether it holds, and the figures."""
    single = [r["plain"]["rewrite"] for r in results if r["n_tokens"] == 1]
    n, aware = shown["n_tokens"], shown["aware"]
    claims = {
        "plain_single_token": (
            all(single),
            f"{sum(map(bool, single))} of {len(single)} targets of one token",
        ),
        "aware_multi_token": (aware["rewrite"], f"{aware['text']!r}: {n} tokens in {n} steps"),
        "paraphrase": (aware["paraphrase"], "the same fact, asked for in other words"),
        "locality": (
            aware["locality"] >= 0.75,
            f"{aware['locality']:.2f} of the neighbours' tokens stay (0.75)",
        ),
        "restored": (restored, "all weights, by SHA-256, after all edits"),
    }
    if real is not None:
        right = real["wrote"] == real["target"]
        claims["real_fact"] = (right, f"{real['model']} wrote {real['wrote']!r} after {real['prompt']!r}")
        claims["real_restored"] = (real["restored"], f"all weights of {real['model']}, by SHA-256")
    return {name: {"holds": bool(holds), "figures": figures} for name, (holds, figures) in claims.items()}


def _share(results: list[dict], length: int, name: str, key: str) -> tuple[float, int]:
    rows = [r for r in results if r["n_tokens"] == length]
    return sum(float(r[name][key]) for r in rows) / len(rows), len(rows)


def _table_rows(results: list[dict]) -> list[dict[str, Any]]:
    rows = []
    for length in sorted({r["n_tokens"] for r in results}):
        row: dict[str, Any] = {"n_tokens": length, "n": _share(results, length, "plain", "rewrite")[1]}
        for name in ("plain", "aware"):
            row[name] = {
                key: _share(results, length, name, key)[0] for key in ("rewrite", "paraphrase", "locality")
            }
        rows.append(row)
    return rows


def _print_demo(console: Console, report: dict, folder: Path) -> None:
    _print_shown(console, report["shown"])
    table = Table(
        title=f"{len(report['cases'])} edits drawn by seed {report['seed']}: share of exact answers"
    )
    measures = ("rewrite", "paraphr.", "locality")
    for column in (
        "target\ntokens",
        "\nedits",
        *(f"{name}\n{measure}" for name in ("plain", "aware") for measure in measures),
    ):
        table.add_column(column, justify="right")
    for row in _table_rows(report["cases"]):
        figures = [
            f"{row[name][key]:.2f}"
            for name in ("plain", "aware")
            for key in ("rewrite", "paraphrase", "locality")
        ]
        table.add_row(str(row["n_tokens"]), str(row["n"]), *figures)
    console.print(table)
    if report["real"] is not None:
        console.print(f"\n[bold]A fact about the real world[/bold], in {report['real']['model']}")
        _print_shown(console, report["real"])
        console.print("Other buildings (shown, not claimed)")
        for near in report["real"]["near"]:
            console.print(Text(f"  {near['prompt']} … {near['before']}  →  {near['after']}"))
    else:
        console.print(f"\nA fact about the real world, in {real.MODEL}: {real.INSTALL}, then the demo again")
    for name, claim in report["claims"].items():
        mark = "[green]✓" if claim["holds"] else "[red]✗"
        console.print(
            Text.from_markup(f"  {mark} {name.replace('_', ' ')}[/]  ") + Text(claim["figures"], "dim")
        )
    console.print(f"\n{folder / 'demo.html'} and {folder / 'demo.json'} written, {report['seconds']} s")


def _print_shown(console: Console, shown: dict) -> None:
    """An edit, and the denoising before and after it."""
    console.print(
        Text.assemble(
            "Edit  ",
            (shown["prompt"], "bold"),
            " … ",
            (shown["was"], "dim"),
            "  →  ",
            (shown["target"], "bold green"),
            "\n",
        )
    )
    for name, title in (
        ("before", "Denoising before the edit"),
        ("after", "Denoising after the edit (denoising-aware)"),
    ):
        console.print(f"[bold]{title}[/bold]")
        for step, frame in enumerate(shown["denoising"][name]):
            console.print(
                Text.assemble(f"  step {step}  {shown['prompt']} ", *[_styled(cell) for cell in frame])
            )
        console.print()


def _styled(cell: dict[str, Any]) -> tuple[str, str]:
    return (
        cell["text"] + " ",
        {"masked": "dim", "new": "bold black on green", "kept": "green"}[cell["state"]],
    )


def _html(report: dict) -> str:
    import jinja2

    template = (Path(__file__).parent / "demo.html").read_text(encoding="utf-8")
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(rows=_table_rows(report["cases"]), **report)
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """EasyEdit prints, logs and writes ./logs: keep it all out of the way, and the working directory as it
    was.
    """
    here = os.getcwd()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    yield
                finally:
                    os.chdir(here)
    finally:
        logging.disable(level)
