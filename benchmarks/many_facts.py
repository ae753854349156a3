"""Thousands of facts in one edit: seconds and peak memory against their number; runs that are killed.

    python benchmarks/many_facts.py --facts 250 1000 4000 --out benchmarks/many_facts.json
    python benchmarks/many_facts.py --facts 10000 --kills 2 --out benchmarks/many_facts.json
    python benchmarks/many_facts.py --facts 1000 --processes 1 2 --out benchmarks/many_facts.json
    python benchmarks/many_facts.py --table

A random masked model of LLaDA's kind: width 768, inner width 3,072, 4 layers, 32,000 tokens. MEMIT_MDM at
layer 2, targets of one to three tokens, two steps a fact: what is measured is what many facts cost, not what
they are worth. Each row is a process of its own (several with `--processes`), with one thread each; memory is
the largest resident size of the first one. Second moments are made beforehand. With `--kills` the process is
killed (SIGKILL) so many times, each time after a further share of the chunks, and started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm import load_model, wrap_model
from easyedit_mdm.common.files import read_json, write_json
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.errors import DataError
from easyedit_mdm.models import Adapter
from easyedit_mdm.statistics import moments_for
from easyedit_mdm.twins.text import word_maker

LAYER, STEPS, CHUNK, TOKENS = 2, 2, 256, 30_720
HERE = Path(__file__).parent


def model() -> Adapter:
    """The random model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    twin = load_model("twin-llada")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=4,
        num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    torch.default_generator.manual_seed(0)
    native = LlamaForCausalLM(config).eval()
    return wrap_model(native, twin.tokenizer, name="wide", family="llada", mask_id=twin.ids.mask)


def facts(number: int) -> list[EditRequest]:
    """So many facts about subjects that do not exist."""
    word = word_maker(random.Random(0))
    targets = [" ".join(word() for _ in range(1 + i % 2)) for i in range(200)]
    names = [f"{word()} {word()}" for _ in range(number)]
    return [
        EditRequest.of({"prompt": f"{name} was born in", "subject": name, "target_new": targets[i % 200]})
        for i, name in enumerate(names)
    ]


def settings() -> Any:
    """MEMIT_MDM, two steps."""
    return METHODS["MEMIT_MDM"].hparams(
        alg_name="MEMIT_MDM", model_name="wide", layers=[LAYER], v_num_grad_steps=STEPS, v_lr=0.1,
        v_weight_decay=1e-3, clamp_norm_factor=4.0, kl_factor=0.0625, mom2_update_weight=100,
        mom2_dataset="twins", mom2_n_tokens=TOKENS, context_templates=["{}"], state_schedule="spread",
        max_states=2,
    )  # fmt: skip


def work(number: int, folder: Path, values_only: bool) -> None:
    """What a process does; the first one's figures go to `folder`/figures.json."""
    torch.set_num_threads(1)
    adapter, hparams, method = model(), settings(), METHODS["MEMIT_MDM"]
    site = adapter.site(LAYER)
    moments_for(adapter, [site], "twins", TOKENS)
    requests, began, cpu = facts(number), time.monotonic(), time.process_time()
    before = peak()
    method.make_values(adapter, requests, hparams, folder / "values", CHUNK)
    if values_only:
        return
    made, cpu_made = time.monotonic(), time.process_time()
    (change,) = method.edit_in_chunks(adapter, requests, hparams, folder / "values", CHUNK).changes
    write_json(
        folder / "figures.json",
        {
            "facts": number,
            "values_s": round(made - began, 1),
            "values_cpu_s": round(cpu_made - cpu, 1),
            "edit_cpu_s": round(time.process_time() - cpu_made, 1),
            "peak_mb": round(peak()),
            "peak_before_mb": round(before),
            "sha256": hashlib.sha256(change.dense().numpy().tobytes()).hexdigest(),
            "norm": float(change.dense().norm()),
        },
    )


def peak() -> float:
    """Largest resident size so far, MB (Linux; `getrusage` would count what the parent had)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def start(number: int, folder: Path, values_only: bool = False) -> subprocess.Popen:
    """A process that does the work."""
    command = [sys.executable, __file__, "--work", str(folder), "--facts", str(number)]
    more = ["--values-only"] if values_only else []
    return subprocess.Popen([*command, *more], env={**os.environ, "OMP_NUM_THREADS": "1"})


def measured(number: int, kills: int, processes: int) -> dict[str, Any]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as made:
        folder, chunks = Path(made), -(-number // CHUNK)
        began = time.monotonic()
        for kill in range(kills):
            wanted = chunks * (kill + 1) // (kills + 1)
            child = start(number, folder)
            while child.poll() is None and len(list((folder / "values").glob("chunk-*"))) < wanted:
                time.sleep(0.05)
            if child.poll() is not None:
                raise DataError(f"the process ended (status {child.returncode}) before it could be killed")
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        others = [start(number, folder, True) for _ in range(processes - 1)]
        first = start(number, folder)
        if any(child.wait() for child in [first, *others]):
            raise DataError(f"a process failed: {[child.returncode for child in [first, *others]]}")
        figures = read_json(folder / "figures.json", DataError, "figures")
        kept = sum(path.stat().st_size for path in (folder / "values").iterdir()) / 2**20
    return {
        **figures, "kills": kills, "processes": processes, "values_mb": round(kept, 1),
        "whole_s": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, smallest first."""
    names = (
        "facts",
        "processes",
        "kills",
        "values, s",
        "values, CPU s",
        "keys and solve, CPU s",
        "peak, MB",
        "on disk, MB",
    )
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " --- |" * (len(names) - 1)]
    for row in sorted(rows, key=lambda r: (r["facts"], r["kills"], r["processes"])):
        times = ["-", "-"] if row["kills"] else [row["values_s"], row["values_cpu_s"]]
        cells = [
            f"{row['facts']:,}", row["processes"], row["kills"], *times, row["edit_cpu_s"], row["peak_mb"],
            row["values_mb"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=int, nargs="+", default=[250, 1000])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=HERE / "many_facts.json")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--values-only", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work is not None:
        return work(asked.facts[0], asked.work, asked.values_only)
    rows = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else []
    if not asked.table:
        for number in asked.facts:
            for processes in asked.processes:
                rows.append(measured(number, asked.kills, processes))
                write_json(asked.out, rows, indent=1)
    print(table(rows))


if __name__ == "__main__":
    main()
