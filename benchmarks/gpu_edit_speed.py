"""Edits a second on a GPU: a random model of LLaDA-8B's shape in bfloat16, 64 facts, targets of 1 to 3
tokens, 25 steps.

    python benchmarks/gpu_edit_speed.py --out benchmarks/gpu_edit_speed.json
    python benchmarks/gpu_edit_speed.py --layers 4 --width 256 --facts 4 --device cpu      (a try without a
    GPU)

The weights are random, so only the time means something. MEMIT_MDM at layers 4-7, second moments of 1,000
tokens of the shipped text with a ridge (made beforehand, not counted), the shipped tokenizer, one bare prefix
and five others, no early stop. `optimise`: the value optimisation; `all`: the whole edit.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from easyedit_mdm import load_model, make_edit, wrap_model
from easyedit_mdm.editing import METHODS, EditRequest
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.solve.batch import outputs
from easyedit_mdm.editing.solve.sites import statistics
from easyedit_mdm.editing.solve.value import optimise
from easyedit_mdm.twins.benchmark import cases
from easyedit_mdm.twins.world import World

PREFIXES = [
    "{}",
    "The river of the old city. {}",
    "Therefore it was made. {}",
    "Because he was known. {}",
    "I was born in a town. {}",
    "You are a painter. {}",
]


def model_of(args: argparse.Namespace):
    """A random bidirectional Llama on the device, never materialised on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_model("twin-llada").tokenizer
    config = LlamaConfig(
        vocab_size=126464, hidden_size=args.width, intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 128,
        num_key_value_heads=args.width // 128, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(args.device):
            native = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return wrap_model(
        native, tokenizer, family="llada", mask_id=tokenizer.mask_token_id, name="llada-8b-shape"
    )


def clock(device: str) -> float:
    """Seconds, all queued work done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure every schedule, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--schedules", nargs="+", default=["full_mask", "spread", "enumerate"])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = model_of(args)
    every = [c for c in cases(World.build(), "test") if c.length <= 3]
    requests = [EditRequest.of(every[i + i % 3].request()) for i in range(0, 3 * args.facts, 3)]
    edited = [layer for layer in (4, 5, 6, 7) if layer < args.layers] or [args.layers - 1]
    rows = []
    for schedule in args.schedules:
        hparams = METHODS["MEMIT_MDM"].hparams(
            alg_name="MEMIT_MDM", model_name="shape", layers=edited, state_schedule=schedule,
            context_templates=PREFIXES,
            early_stop_loss=0.0, v_num_grad_steps=25,
            mom2_dataset="twins", mom2_n_tokens=1000, mom2_eps=1e-2, max_rows=args.rows,
            facts_per_batch=args.facts,
        )  # fmt: skip
        sites = [model.site(layer) for layer in edited]
        for moments in statistics(model, sites, hparams):
            moments.solve(torch.zeros(len(moments.moment)), hparams.mom2_eps)  # the factor is kept
        facts = [tokenise(model, request, hparams) for request in requests]
        optimise(model, sites[-1], facts[:2], outputs(model, sites[-1], facts[:2], hparams), hparams)
        began = clock(args.device)
        optimise(model, sites[-1], facts, outputs(model, sites[-1], facts, hparams), hparams)
        middle = clock(args.device)
        make_edit(model, requests, hparams)
        end = clock(args.device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if args.device.startswith("cuda") else None
        rows.append(
            {
                "schedule": schedule,
                "facts": len(facts),
                "optimise_s_per_fact": (middle - began) / len(facts),
                "all_s_per_fact": (end - middle) / len(facts),
                "peak_gib": peak,
            }
        )
        Console().print(rows[-1])
    if args.out:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
        Path(args.out).write_text(
            json.dumps({"device": device, "layers": args.layers, "width": args.width, "rows": rows}, indent=1)
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
