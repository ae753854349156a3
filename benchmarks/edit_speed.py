"""How fast edits are made: seconds and forward FLOPs a fact, EasyEdit's own loops beside ours, in one run.

    EASYEDIT_HOME=... python benchmarks/edit_speed.py --part twins --facts 1 8 64 --out
    benchmarks/edit_speed-twins.json EASYEDIT_HOME=... python benchmarks/edit_speed.py --part wide --facts 1 4
    --out benchmarks/edit_speed-wide.json

`twins`: twin-llama (EasyEdit's ROME and MEMIT, ours) and twin-llada (ours with each schedule). `wide`: a
random Llama of 12 layers and width 768. The same test facts of the twins' world, targets of 1 to 4 tokens in
turn, the same context prefixes (bare and five), 25 steps, layer 4 (MEMIT: layers 2-4); `--early-stop` ends a
fact at a loss of 0.05, as EasyEdit always does, otherwise ours never stops early. Statistics are made
beforehand. FLOPs are those of the forward passes of all linear maps (2 x inputs x outputs a token), counted
by hooks; attention's own products are not counted. Seconds are those of the CPU (with one thread, what a
quiet machine's clock says). `success` is the share of facts whose target the edited model writes, token by
token; judging is not timed. Timings of one run can be compared with each other only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from easyedit_mdm import load_model, make_edit, register, score_prompts, wrap_model
from easyedit_mdm.editing import METHODS
from easyedit_mdm.host.finding import find_easyedit
from easyedit_mdm.host.importing import host_module
from easyedit_mdm.host.on_cpu import CudaMeansCpu
from easyedit_mdm.twins.benchmark import cases
from easyedit_mdm.twins.world import World

PREFIXES = [
    f"{word}. {{}}"
    for word in (
        "The river of the old city",
        "Therefore it was made",
        "Because he was known",
        "I was born in a town",
        "You are a painter",
    )
]
WEIGHT = 100  # lambda: what the twins' own files have
VALUE = dict(
    fact_token="subject_last",
    v_num_grad_steps=25,
    v_lr=0.5,
    v_weight_decay=1e-3,
    clamp_norm_factor=4.0,
    kl_factor=0.0625,
)


def requests_of(n: int) -> list[dict]:
    """Test facts with targets of 1, 2, 3, 4, 1, ... tokens."""
    every = cases(World.build(), "test")
    by_fact = [every[i : i + 8] for i in range(0, len(every), 8)]
    return [{**by_fact[i][i % 4].request(), "case_id": i} for i in range(n)]


@contextlib.contextmanager
def counting(model: torch.nn.Module) -> Iterator[list[float]]:
    """Forward FLOPs of all linear maps inside the block."""
    total = [0.0]

    def count(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
        total[0] += 2.0 * out.numel() * module.in_features

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def wide_model(masked: bool = False):
    """A random Llama, 12 layers, width 768, LLaMA's vocabulary of 32,000 (of which the twins' tokenizer uses
    the first); `masked`: as a LLaDA.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    twin = load_model("twin-llada" if masked else "twin-llama")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.default_generator.manual_seed(0)
    more = {"family": "llada", "mask_id": twin.ids.mask} if masked else {}
    return wrap_model(LlamaForCausalLM(config).eval(), twin.tokenizer, name="wide", **more)


def hparams_of(method: str, layers: list[int], schedule: str, early_stop: bool, dataset: str):
    """Ours."""
    batch = (
        {}
        if method == "ROME_MDM"
        else {
            "mom2_update_weight": WEIGHT,
            "mom2_dataset": dataset,
            "key_average": "easyedit",
            "max_rows": 512,
        }
    )
    return METHODS[method].hparams(
        alg_name=method, model_name="benchmark", layers=layers, **VALUE, state_schedule=schedule,
        early_stop_loss=0.05 if early_stop else 0.0,
        kl_position="subject_last", context_templates=["{}", *PREFIXES], **batch,
    )  # fmt: skip


Run = Callable[[list[dict], Callable[[list[dict]], None]], None]


def ours(adapter, method: str, layers: list[int], schedule: str, early_stop: bool, dataset: str) -> Run:
    """All facts in one edit (MEMIT_MDM), or one after another (ROME_MDM); `judge` is called with each group
    while its edit is in the weights.
    """
    hparams = hparams_of(method, layers, schedule, early_stop, dataset)

    def run(requests: list[dict], judge: Callable[[list[dict]], None]) -> None:
        for group in [requests] if METHODS[method].batchable else [[r] for r in requests]:
            edit = make_edit(adapter, group, hparams)
            edit.apply(adapter)
            judge(group)
            edit.revert(adapter)

    return run


def theirs(adapter, method: str, layers: list[int], dataset: str, steps: int | None = None) -> Run:
    """EasyEdit's own function, as its editor calls it, the weights put back after each call.

    Args:
        steps: v_num_grad_steps, where it is not the one above.
    """
    device = adapter.device
    module = host_module(f"models.{method.lower()}.{method.lower()}_main")
    module.CONTEXT_TEMPLATES_CACHE = ["{}", *PREFIXES] if method == "ROME" else [["{}"], list(PREFIXES)]
    cls = getattr(host_module("models"), f"{method}HyperParams")
    values = dict(
        alg_name=method, model_name="llama", layers=layers, layer_selection="all", **VALUE,
        v_loss_layer=adapter.layers - 1,
        mom2_adjustment=method == "MEMIT", mom2_update_weight=WEIGHT, context_template_length_params=[[5, 5]],
        rewrite_module_tmp="model.layers.{}.mlp.down_proj",
        layer_module_tmp="model.layers.{}", mlp_module_tmp="model.layers.{}.mlp",
        attn_module_tmp="model.layers.{}.self_attn",
        ln_f_module="model.norm",
        lm_head_module="lm_head", mom2_dataset=dataset, mom2_n_samples=None, mom2_dtype="float32",
        device=(device.index or 0) if device.type == "cuda" else "cpu", stats_dir=None,
    )  # fmt: skip
    values["v_num_grad_steps"] = steps or values["v_num_grad_steps"]
    hparams = cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})
    apply = host_module("util.alg_dict").ALG_DICT[method]
    adapter.tokenizer.padding_side = "right"
    here = (
        CudaMeansCpu if device.type == "cpu" and find_easyedit().form == "wheel" else contextlib.nullcontext
    )

    def run(requests: list[dict], judge: Callable[[list[dict]], None]) -> None:
        with contextlib.redirect_stdout(io.StringIO()), here():
            for group in [requests] if method == "MEMIT" else [[r] for r in requests]:
                _, originals = apply(
                    adapter.native,
                    adapter.tokenizer,
                    group,
                    hparams,
                    copy=False,
                    return_orig_weights=True,
                    keep_original_weight=True,
                )
                judge(group)
                with torch.no_grad():
                    for name, value in originals.items():
                        dict(adapter.native.named_parameters())[name].copy_(value)

    return run


def measure(name: str, adapter, run: Run, n: int) -> dict:
    """Seconds, FLOPs and success a fact."""
    requests, judging, written = requests_of(n), [0.0, 0.0], []
    run(requests[:1], lambda group: None)
    with counting(adapter) as flops:

        def judge(group: list[dict]) -> None:
            """Whether the targets are written; what it costs is taken off."""
            began, before = time.process_time(), flops[0]
            written.extend(
                bool(s["exact"])
                for s in score_prompts(
                    adapter, [r["prompt"] for r in group], [r["target_new"] for r in group]
                )
            )
            judging[0] += time.process_time() - began
            judging[1] += flops[0] - before

        began = time.process_time()
        run(requests, judge)
        seconds = time.process_time() - began - judging[0]
    gflops = (flops[0] - judging[1]) / n / 1e9
    return {
        "what": name,
        "facts": n,
        "seconds_per_fact": seconds / n,
        "forward_gflops_per_fact": gflops,
        "success": sum(written) / n,
    }


def jobs(part: str, early_stop: bool, dataset: str) -> list[tuple[str, object, Callable]]:
    """(name, model, function) of everything that is measured."""
    causal = load_model("twin-llama") if part == "twins" else wide_model()
    layer, layers = [4], [2, 3, 4]
    found = [
        ("EasyEdit ROME", causal, theirs(causal, "ROME", layer, dataset)),
        ("EasyEdit MEMIT", causal, theirs(causal, "MEMIT", layers, dataset)),
        (
            "ROME_MDM, autoregressive",
            causal,
            ours(causal, "ROME_MDM", layer, "full_mask", early_stop, dataset),
        ),
        (
            "MEMIT_MDM, autoregressive",
            causal,
            ours(causal, "MEMIT_MDM", layers, "full_mask", early_stop, dataset),
        ),
    ]
    if part == "twins":
        masked = load_model("twin-llada")
        for schedule in ("full_mask", "cycle", "spread", "enumerate"):
            found.append(
                (
                    f"MEMIT_MDM, masked, {schedule}",
                    masked,
                    ours(masked, "MEMIT_MDM", layers, schedule, early_stop, dataset),
                )
            )
    return found


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("twins", "wide"), default="twins")
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--early-stop", action="store_true")
    parser.add_argument("--dataset", default="twins")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    register()
    rows = []
    table = Table(title=f"{args.part}, {args.threads} threads")
    for column in (
        "what",
        "facts",
        "s / fact",
        "forward GFLOP / fact",
        "x EasyEdit ROME (time)",
        "(FLOPs)",
        "success",
    ):
        table.add_column(column, justify="left" if column == "what" else "right")
    todo = jobs(args.part, args.early_stop, args.dataset)
    for n in args.facts:
        base = None
        for name, adapter, run in todo:
            row = measure(name, adapter, run, n)
            base = base or row
            row |= {
                f"{key}_ratio": base[key] / row[key]
                for key in ("seconds_per_fact", "forward_gflops_per_fact")
            }
            rows.append(row)
            cells = [f"{row['seconds_per_fact']:.3f}", f"{row['forward_gflops_per_fact']:.2f}"]
            cells += [f"{row[f'{key}_ratio']:.1f}" for key in ("seconds_per_fact", "forward_gflops_per_fact")]
            table.add_row(name, str(n), *cells, f"{row['success']:.2f}")
            Console().print(f"{name}, {n} facts: {row['seconds_per_fact']:.3f} s a fact")
    Console(width=130).print(table)
    if args.out:
        settings = {**VALUE, "mom2_update_weight": WEIGHT}
        report = {
            "part": args.part,
            "threads": args.threads,
            "early_stop": args.early_stop,
            "settings": settings,
            "rows": rows,
        }
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
