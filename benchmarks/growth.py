"""How time and memory of an edit grow with facts, layers, width, target length and states.

    python benchmarks/growth.py --out benchmarks/growth.json      # minutes, one thread
    python benchmarks/growth.py --draw                            # docs/growth.svg

Random masked models of LLaDA's kind; one thing is varied at a time, the others stay as `BASE` says. MEMIT_MDM
with a fixed number of steps and no second moments of its own (those of an identity). Seconds are CPU seconds
of one thread, the smaller of two runs; memory is what the resident size rises by at most (Linux). The
exponent is the slope of a line through the logarithms of the larger half of the points: what small edits cost
besides is then least. The formula counts the products above the edit: rows x tokens x layers x width^2, where
rows are facts x states, and tokens grow with the target.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from many_facts import facts

from easyedit_mdm import load_model, wrap_model
from easyedit_mdm.common.files import write_json
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.solve import sites
from easyedit_mdm.models import Adapter
from easyedit_mdm.statistics import SecondMoments, key_width

ROOT = Path(__file__).resolve().parent.parent
BASE = {"facts": 8, "layers above": 4, "width": 256, "target length": 2, "states": 2}
POINTS = {
    "facts": (8, 16, 32, 64, 128),
    "layers above": (2, 4, 8, 16),
    "width": (128, 256, 512, 768),
    "target length": (2, 4, 8, 16),
    "states": (2, 4, 8, 16),
}
LONGER = {"states": {"target length": 8}}  # two tokens have three states
FORMULA = {"facts": "1", "layers above": "1", "width": "2", "target length": "below 1", "states": "at most 1"}
STEPS = 5


def model(width: int, above: int) -> Adapter:
    """A random model whose layer 0 is edited."""
    from transformers import LlamaConfig, LlamaForCausalLM

    twin = load_model("twin-llada")
    config = LlamaConfig(
        vocab_size=len(twin.tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=above + 1, num_attention_heads=width // 64, num_key_value_heads=width // 64,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.default_generator.manual_seed(0)
    native = LlamaForCausalLM(config).eval()
    return wrap_model(native, twin.tokenizer, name="random", family="llada", mask_id=twin.ids.mask)


def requests(number: int, length: int, adapter: Adapter) -> list[EditRequest]:
    """Facts whose target has so many tokens."""
    words = [w for w in facts(60)[0].prompt.split() + "the of in was is a to and".split()]
    single = [w for w in words if len(adapter.tokenizer(" " + w, add_special_tokens=False)["input_ids"]) == 1]
    target = " ".join(single[i % len(single)] for i in range(length))
    return [replace(fact, target_new=target) for fact in facts(number)]


def settings(states: int) -> Any:
    """MEMIT_MDM at layer 0, `states` states a step."""
    return METHODS["MEMIT_MDM"].hparams(
        alg_name="MEMIT_MDM", model_name="random", layers=[0], v_num_grad_steps=STEPS, v_lr=0.1,
        kl_factor=0.0, mom2_update_weight=1, mom2_dataset="given", context_templates=["{}"],
        early_stop_loss=0.0, state_schedule="stratified", max_states=states, max_rows=4096,
        facts_per_batch=4096,
    )  # fmt: skip


def measured(point: dict[str, int]) -> dict[str, Any]:
    """Seconds and memory of one edit."""
    adapter = model(point["width"], point["layers above"])
    asked = requests(point["facts"], point["target length"], adapter)
    hparams, edit = settings(point["states"]), METHODS["MEMIT_MDM"].edit
    seconds, rise = math.inf, 0.0
    for _ in range(2):
        before = settled_memory()
        began = time.process_time()
        edit(adapter, asked, hparams)
        seconds = min(seconds, time.process_time() - began)
        rise = max(rise, status("VmHWM") - before)
    return {**point, "seconds": round(seconds, 3), "memory_mb": round(rise, 1)}


def settled_memory() -> float:
    """The resident size, MB, once what is free has been given back, and the peak was forgotten."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> float:
    """A size out of /proc/self/status, MB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def exponent(rows: list[dict[str, Any]], varied: str, what: str) -> float:
    """Slope of the logarithms over the larger half of the points."""
    kept = sorted(rows, key=lambda row: row[varied])[len(rows) // 2 - 1 :]
    xs = [math.log(row[varied]) for row in kept]
    ys = [math.log(max(row[what], 1e-9)) for row in kept]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """What docs/speed.md shows."""
    names = ("varied", "from", "to", "seconds", "exponent", "memory, MB", "exponent", "formula (time)")
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " --- |" * (len(names) - 1)]
    for varied, rows in found.items():
        first, last = rows[0], rows[-1]
        cells = (
            varied, first[varied], last[varied], f"{first['seconds']:.2f} to {last['seconds']:.2f}",
            f"{exponent(rows, varied, 'seconds'):.2f}",
            f"{first['memory_mb']:.0f} to {last['memory_mb']:.0f}",
            f"{exponent(rows, varied, 'memory_mb'):.2f}", FORMULA[varied],
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, list[dict[str, Any]]]) -> None:
    """docs/growth.svg: a line for each thing that is varied."""
    from easyedit_mdm.report.figures import DASHES, MARKERS, matplotlib_parts

    matplotlib, figure_class = matplotlib_parts()
    figure = figure_class(figsize=(8, 3.2), layout="constrained")
    for axes, what, label in zip(
        figure.subplots(1, 2), ("seconds", "memory_mb"), ("CPU seconds of an edit", "rise of memory, MB")
    ):
        for (varied, rows), marker, dash in zip(found.items(), MARKERS, DASHES):
            ratio = [row[varied] / rows[0][varied] for row in rows]
            ys = [row[what] for row in rows]
            axes.plot(ratio, ys, linestyle=dash, marker=marker, markersize=4, label=varied)
        axes.set(xscale="log", yscale="log", xlabel="times the smallest", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "growth"}):
        figure.savefig(ROOT / "docs" / "growth.svg", facecolor="white", metadata={"Date": None})


def main() -> None:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "growth.json")
    parser.add_argument("--draw", action="store_true", help="make the picture from --out")
    asked = parser.parse_args()
    if not asked.draw:
        torch.set_num_threads(1)
        sites.moments_for = lambda adapter, where, *_, **__: [  # type: ignore[assignment]
            SecondMoments(torch.eye(key_width(adapter, site), dtype=torch.float64), 1) for site in where
        ]
        measured(BASE)  # imports and caches
        found = {
            varied: [measured({**BASE, **LONGER.get(varied, {}), varied: value}) for value in values]
            for varied, values in POINTS.items()
        }
        write_json(asked.out, found, indent=1)
    found = json.loads(asked.out.read_text(encoding="utf-8"))
    if asked.draw:
        draw(found)
    print(table(found))


if __name__ == "__main__":
    main()
