"""The command line: one function a subcommand, no logic of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from easyedit_mdm.common.reproducible import same_bytes_on_any_number_of_threads
from easyedit_mdm.common.versions import advice, needed
from easyedit_mdm.errors import EasyEditMDMError
from easyedit_mdm.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; an error of this package becomes one message on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command is not _run:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    same_bytes_on_any_number_of_threads()
    try:
        return args.command(args, rest)
    except EasyEditMDMError as error:
        print(f"easyedit-mdm: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in needed():
            raise
        print(f"easyedit-mdm: {error}. {advice(package)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="easyedit-mdm", description="Edit facts in masked diffusion language models through EasyEdit."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    every = (
        _add_demo,
        _add_doctor,
        _add_run,
        _add_edit,
        _add_edits,
        _add_stats,
        _add_bench,
        _add_compare,
        _add_trace,
        _add_sweep,
        _add_twins,
        _add_adapt,
    )
    for add in every:
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo", help="edit a fact in a small masked model, watch it denoise, and take the edit back"
    )
    demo.add_argument("--out", default="demo", help="folder for demo.html and demo.json (default: demo)")
    demo.add_argument(
        "--easyedit-home", help="a clone of EasyEdit (default: EASYEDIT_HOME, or the installed one)"
    )
    demo.set_defaults(command=_demo)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what is here, what will not work and what to do (exit status 1 if no twin can be edited)",
    )
    doctor.add_argument(
        "--model",
        help="a twin, a folder or a hub id: what editing it takes, against the memory here; no weights are loaded",
    )
    doctor.add_argument(
        "--easyedit-home", help="a clone of EasyEdit (default: EASYEDIT_HOME, or the installed one)"
    )
    doctor.add_argument("--json", dest="file", help="write the report to this file")
    doctor.set_defaults(command=_doctor)


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run", help="run an EasyEdit script, untouched, with our methods", allow_abbrev=False,
        description="Everything after SCRIPT goes to the script; --alg ROME_MDM stands for its --editing_method.",
    )  # fmt: skip
    run.add_argument(
        "--easyedit-home",
        help="a clone of EasyEdit (default: the one the script is in, EASYEDIT_HOME, the installed one)",
    )
    run.add_argument(
        "--seed",
        type=int,
        default=42,
        help="state of the random generators at the script's first line (default: 42, as EasyEdit's import)",
    )
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    run.set_defaults(command=_run)

    hook = commands.add_parser(
        "hook",
        help="print the folder to put on PYTHONPATH so that plain `python SCRIPT --editing_method=ROME_MDM` works",
    )
    hook.set_defaults(command=_hook)


def _add_edit(commands: Any) -> None:
    edit = commands.add_parser(
        "edit", help="make an edit, show what the model says before and after it, and save it as a folder"
    )
    edit.add_argument(
        "--hparams",
        required=True,
        help="hyperparameter file, such as ROME_MDM/twin-llada; it names method and model",
    )
    edit.add_argument("--model", help="a twin, a folder or a hub id (default: the file's)")
    edit.add_argument("--prompt", help="the prompt, with its subject in it, or {} in its place")
    edit.add_argument("--subject", help="the subject")
    edit.add_argument("--target", help="what is to follow the prompt")
    edit.add_argument(
        "--data-file", help="instead of the three: a JSON list of objects with prompt, subject and target_new"
    )
    edit.add_argument("--save", required=True, metavar="DIR", help="folder for the edit; must not exist")
    edit.add_argument("--force", action="store_true", help="keep the edit whatever the collapse guard says")
    edit.add_argument(
        "--no-guard", action="store_true", help="do not look whether the edit damages the model"
    )
    edit.add_argument(
        "--guard-text",
        help="text whose perplexity the guard takes (default: that of the statistics, or plain sentences)",
    )
    edit.add_argument(
        "--device", help="cpu, cuda, cuda:1 (default: the file's, else CUDA where there is one)"
    )
    edit.add_argument(
        "--dtype", help="dtype to load the model in (default: the file's, else the checkpoint's)"
    )
    edit.set_defaults(command=_edit)


def _add_edits(commands: Any) -> None:
    def add(
        name: str, command: Any, text: str, model: str | None, several: bool = False
    ) -> argparse.ArgumentParser:
        """A subcommand that takes the folder of an edit."""
        parser = commands.add_parser(name, help=text)
        parser.add_argument(
            "edit",
            metavar="EDIT_DIR",
            nargs="+" if several else None,
            help="folder that easyedit-mdm edit --save wrote",
        )
        if model is not None:
            parser.add_argument("--model", required=name == "revert", help=model)
            parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
        parser.set_defaults(command=command)
        return parser

    base = "a twin, a folder or a hub id (default: the base model that the edit names)"
    apply = add(
        "apply",
        _apply,
        "write the base model with an edit in it as a new folder, from which it can be taken back",
        base,
    )
    apply.add_argument("--out", required=True, help="folder for the model; must not exist")
    revert = add(
        "revert",
        _revert,
        "write a model that apply wrote without an edit, bit for bit as it was",
        "folder that easyedit-mdm apply wrote",
    )
    revert.add_argument("--out", required=True, help="folder for the model; must not exist")
    diff = add(
        "diff",
        _diff,
        "which weights an edit changes, how much, and what the model says without and with it",
        base,
    )
    diff.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="show the effect on this prompt; may be given several times",
    )
    diff.add_argument("--prompts-file", help="a text file, a prompt a line")
    diff.add_argument("--json", dest="file", help="write the report to this file")
    compose = add(
        "compose",
        _compose,
        "several edits of one base model as one; says where they are at odds",
        None,
        several=True,
    )
    compose.add_argument("--out", required=True, help="folder for the edit; must not exist")
    compose.add_argument("--force", action="store_true", help="compose edits that contradict each other")
    verify = add(
        "verify",
        _verify,
        "whether an edit's files are whole and a model still holds it (exit status 1 if not)",
        "the model that should hold it",
    )
    verify.add_argument("--json", dest="file", help="write the report to this file")
    export = add(
        "export",
        _export,
        "an edit as a LoRA adapter for peft, or as a model folder in the hub's own format",
        base,
    )
    export.add_argument("--peft", metavar="DIR", help="folder for the LoRA adapter")
    export.add_argument("--merged", metavar="DIR", help="folder for the model")


def _add_stats(commands: Any) -> None:
    stats = commands.add_parser(
        "stats", help="collect the second moments that MEMIT_MDM, AlphaEdit_MDM and EMMET_MDM stand on"
    )
    stats.add_argument("--model", required=True, help="a twin, a folder or a hub id")
    stats.add_argument(
        "--dataset",
        required=True,
        help="a text file, JSON lines, datasets:NAME:CONFIG:SPLIT, or a shipped text (twins)",
    )
    stats.add_argument("--layers", required=True, help="layers, such as 4-7 or 4,5,6")
    stats.add_argument("--tokens", type=int, help="tokens to collect (default: 10 times the key's dimension)")
    stats.add_argument(
        "--mask-ratio",
        default="0",
        help="0 (plain text), uniform, or a number: mask that share of the text, take keys elsewhere",
    )
    stats.add_argument(
        "--settled",
        type=float,
        help="stop before that once even and odd batches differ by less than this, relatively (such as 0.05)",
    )
    stats.add_argument(
        "--out", help="folder to keep them in (default: the user's cache folder, where edits look)"
    )
    stats.add_argument("--json", dest="file", help="write the figures to this file")
    stats.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    stats.add_argument("--dtype", help="dtype to load the model in (default: the checkpoint's)")
    stats.set_defaults(command=_stats)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="edit and judge many cases, one line each; can be killed and resumed at any point"
    )
    bench.add_argument(
        "--alg", required=True, help="one of our methods, or EasyEdit's own (ROME, MEMIT, ...)"
    )
    bench.add_argument("--hparams", required=True, help="hyperparameter file, such as ROME_MDM/twin-llada")
    bench.add_argument(
        "--dataset", required=True, help="zsre, counterfact, knowedit, kamel, twins, requests, ..."
    )
    bench.add_argument("--data-dir", help="folder of the benchmark files")
    bench.add_argument("--data-file", help="a file outside the folder's usual names")
    bench.add_argument("--limit", type=int, help="cases, drawn by the seed (default: all)")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument(
        "--mode",
        default="each",
        help="each: one fact at a time (default); batch: several together; sequential: batch after batch in one model",
    )
    bench.add_argument("--batch-size", type=int, help="facts a batch (default: all for batch, 1 for sequential)")
    bench.add_argument("--out", required=True, help="run file (.jsonl)")
    bench.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    bench.add_argument("--label", help="what to call the run in reports")
    bench.add_argument("--held-out", help="a text whose perplexity is taken before and after each edit")
    bench.add_argument(
        "--light",
        action="store_true",
        help="leave out the ladder of honesty and fluency, which are most of the evaluation's time",
    )
    bench.add_argument(
        "--no-fluency",
        action="store_true",
        help="leave out fluency alone, which is most of the time on a small model",
    )
    bench.add_argument("--easyedit-home", help="a clone of EasyEdit, for its own methods")
    bench.add_argument(
        "--device", help="cpu, cuda, cuda:1 (default: the file's, else CUDA where there is one)"
    )
    bench.set_defaults(command=_bench)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="a report of several runs: tables, figures, a page for each case"
    )
    compare.add_argument("runs", nargs="+", help="run files of easyedit-mdm bench")
    compare.add_argument(
        "--out", required=True, help="folder for report.html, report.md, report.csv and report.json"
    )
    compare.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    compare.set_defaults(command=_compare)


def _add_trace(commands: Any) -> None:
    trace = commands.add_parser(
        "trace", help="causal tracing: which layers and tokens carry a fact that the model knows"
    )
    which = trace.add_mutually_exclusive_group()
    which.add_argument("--model", help="a twin, a folder or a hub id (default: twin-llada)")
    which.add_argument(
        "--compare", nargs="+", metavar="MODEL", help="several models, on the facts that all of them know"
    )
    trace.add_argument("--prompt", help="one fact: the prompt, with the subject (or {} for it) in it")
    trace.add_argument("--subject", help="the subject in --prompt")
    trace.add_argument("--target", help="the answer (default: what the model itself writes)")
    trace.add_argument(
        "--answer-tokens",
        type=int,
        default=1,
        help="tokens of the answer where --target is left out (default: 1)",
    )
    trace.add_argument(
        "--known",
        help="facts as in ROME's known_1000.json, requests with ground_truth, CounterFact (default: the twins' own)",
    )
    trace.add_argument("--limit", type=int, help="known facts to trace, drawn by the seed (default: all)")
    trace.add_argument(
        "--corrupt",
        default="noise",
        help="noise, replace (other subjects) or mask (masked models); default: noise",
    )
    trace.add_argument(
        "--noise",
        type=float,
        default=3.0,
        help="standard deviations of the noise, in those of the embeddings (default: 3)",
    )
    trace.add_argument(
        "--replace-with",
        nargs="+",
        metavar="SUBJECT",
        help="subjects for --corrupt replace (default: those of the other facts)",
    )
    trace.add_argument("--samples", type=int, default=10, help="corrupted runs a fact (default: 10)")
    trace.add_argument(
        "--window",
        type=int,
        help="MLPs or attentions restored together (default: 10 of 48 layers, as in ROME)",
    )
    trace.add_argument(
        "--revealed",
        type=int,
        nargs="+",
        metavar="K",
        help="masked models: trace with K slots revealed (default: 0 and half of them)",
    )
    trace.add_argument(
        "--reveal",
        default="path",
        help="which slots: those the model writes first (path, default) or random ones",
    )
    trace.add_argument("--max-rows", type=int, default=256, help="rows of one forward pass (default: 256)")
    trace.add_argument("--seed", type=int, default=0)
    trace.add_argument("--out", required=True, help="folder for trace.html, trace.json and the figures")
    trace.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    trace.add_argument("--dtype", help="dtype to load the models in (default: the checkpoint's)")
    trace.set_defaults(command=_trace)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep", help="where editing works: success, paraphrase and locality by layer, beside the trace"
    )
    sweep.add_argument("--alg", required=True, help="one of our methods")
    sweep.add_argument("--hparams", required=True, help="hyperparameter file, such as ROME_MDM/twin-llada")
    sweep.add_argument(
        "--dataset", default="twins_validation", help="as for bench (default: twins_validation)"
    )
    sweep.add_argument("--data-dir", help="folder of the benchmark files")
    sweep.add_argument("--data-file", help="a file outside the folder's usual names")
    sweep.add_argument("--limit", type=int, default=16, help="cases, drawn by the seed (default: 16)")
    sweep.add_argument("--layers", help="layers to try, such as 0-7 (default: all)")
    sweep.add_argument(
        "--windows",
        type=int,
        nargs="+",
        metavar="W",
        help="layers edited together (default: 1, for batched methods also 4)",
    )
    sweep.add_argument(
        "--trace",
        dest="trace_file",
        metavar="FILE",
        help="trace.json to put beside it (default: the cases' own facts are traced)",
    )
    sweep.add_argument(
        "--trace-limit", type=int, default=8, help="facts to trace where --trace is left out (default: 8)"
    )
    sweep.add_argument("--seed", type=int, default=0)
    sweep.add_argument(
        "--out",
        required=True,
        help="folder for sweep.html, sweep.json, figures and run files; what is there is not run again",
    )
    sweep.add_argument(
        "--device", help="cpu, cuda, cuda:1 (default: the file's, else CUDA where there is one)"
    )
    sweep.set_defaults(command=_sweep)


def _add_twins(commands: Any) -> None:
    twins = commands.add_parser(
        "twins", help="train the small models that ship with the package"
    ).add_subparsers(required=True, metavar="COMMAND")
    train = twins.add_parser("train", help="train one twin, or go on where a checkpoint stands")
    train.add_argument(
        "--name",
        required=True,
        help="twin-llada, twin-dream, twin-llama, twin-qwen, or one of their earlier stages",
    )
    train.add_argument(
        "--out", required=True, help="folder for checkpoint, log and the finished model (OUT/model)"
    )
    train.add_argument("--steps", type=int, help="optimiser steps (default: the recipe's)")
    train.add_argument(
        "--start-from",
        help="training folder of the stage before it (default: earlier stages are trained too, in OUT/stages)",
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--size",
        default="small",
        choices=("small", "medium"),
        help="medium: about 30 million parameters, for a GPU",
    )
    train.set_defaults(command=_twins_train)
    evaluate = twins.add_parser(
        "eval", help="how much the twins know and how far they can be edited, by tokens"
    )
    evaluate.add_argument("--limit", type=int, default=100, help="facts a length (default: 100)")
    evaluate.add_argument("--json", dest="file", help="write the figures to this file")
    evaluate.add_argument(
        "--model", action="append", dest="models", help="a twin or a folder (default: all twins)"
    )
    evaluate.set_defaults(command=_twins_eval)
    data = twins.add_parser("data", help="write the benchmark files of the twins' world (CounterFact, zsRE)")
    data.add_argument("--out", required=True, help="folder to write to")
    data.set_defaults(command=_twins_data)


def _add_adapt(commands: Any) -> None:
    adapt = commands.add_parser(
        "adapt",
        help="make a masked model out of an autoregressive one (LoRA); goes on where OUT holds a checkpoint",
    )
    adapt.add_argument("--model", help="the autoregressive model: a name (smollm2), a folder or a hub id")
    adapt.add_argument("--out", help="folder for adapter, checkpoint, curve and log")
    adapt.add_argument("--tokens", type=int, help="tokens of text to train on in all")
    adapt.add_argument("--minutes", type=float, help="instead: minutes to train in all")
    adapt.add_argument(
        "--attention",
        default="block",
        choices=("block", "full"),
        help="who sees whom in the end (default: block)",
    )
    adapt.add_argument(
        "--block-size", type=int, default=8, help="tokens that are written together (default: 8)"
    )
    adapt.add_argument("--lora-rank", type=int, default=32)
    adapt.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (default: 3e-4)")
    adapt.add_argument("--rows", type=int, default=1, help="rows of a step, 256 columns each (default: 1)")
    adapt.add_argument("--data-dir", help="folder of the benchmark files (default: EASYEDIT_MDM_DATA)")
    adapt.add_argument("--text", help="train on this text file instead, a paragraph a line")
    adapt.add_argument(
        "--samples", help="the model's own samples, or none (default: written to OUT/samples.jsonl first)"
    )
    adapt.add_argument(
        "--from",
        dest="start_from",
        metavar="ADAPTER",
        help="begin with this adapter; its optimiser starts anew",
    )
    adapt.add_argument(
        "--mask-token", help="the token that becomes the mask (default: an unused special token)"
    )
    adapt.add_argument("--merged", metavar="DIR", help="write the merged model to this folder, too")
    adapt.add_argument(
        "--gates",
        metavar="DIR",
        help="train nothing: measure the gates of this adapter, merged folder or model",
    )
    adapt.add_argument(
        "--limit", type=int, default=100, help="facts of each source for the gates (default: 100)"
    )
    adapt.add_argument("--json", dest="file", help="with --gates: write them to this file")
    adapt.add_argument("--seed", type=int, default=0)
    adapt.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    adapt.add_argument(
        "--save-seconds", type=float, default=300.0, help="seconds between checkpoints (default: 300)"
    )
    adapt.set_defaults(command=_adapt)


def _demo(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.demo import run_demo

    return 0 if run_demo(args.out, args.easyedit_home) else 1


def _doctor(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.doctor import doctor

    return 0 if doctor(args.model, args.easyedit_home, args.file) else 1


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.host.runner import run_script

    run_script(args.script, [*rest, *args.arguments], args.easyedit_home, args.seed)
    return 0


def _hook(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.host.hook import folder

    print(folder())
    return 0


def _edit(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.edits import GuardOptions, new_edit, requests_of

    guard = GuardOptions(not args.no_guard, args.force, args.guard_text)
    new_edit(
        args.hparams,
        requests_of(args.prompt, args.subject, args.target, args.data_file),
        args.save,
        args.model,
        guard,
        args.device,
        args.dtype,
    )
    return 0


def _apply(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.edits import apply_edit

    apply_edit(args.edit, args.out, args.model, args.device)
    return 0


def _revert(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.edits import revert_edit

    revert_edit(args.edit, args.model, args.out, args.device)
    return 0


def _diff(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.edits import diff_edit

    diff_edit(args.edit, args.prompt, args.prompts_file, args.model, args.device, args.file)
    return 0


def _compose(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.edits import compose_edits

    compose_edits(args.edit, args.out, args.force)
    return 0


def _verify(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.edits import verify_edit

    return 0 if verify_edit(args.edit, args.model, args.device, args.file)["holds"] else 1


def _export(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.edits import export_edit

    export_edit(args.edit, args.peft, args.merged, args.model, args.device)
    return 0


def _stats(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.statistics import collect_statistics, parse_layers, parse_ratio

    collect_statistics(
        args.model, args.dataset, parse_layers(args.layers), args.tokens, parse_ratio(args.mask_ratio), args.settled, args.out, args.file,
        device=args.device, dtype=args.dtype,
    )  # fmt: skip
    return 0


def _bench(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.host.methods import easyedits_method
    from easyedit_mdm.runs.run import BenchConfig, bench

    config = BenchConfig(
        args.alg,
        args.hparams,
        args.dataset,
        args.data_dir,
        args.data_file,
        args.limit,
        args.seed,
        args.label,
        args.held_out,
        args.light,
        args.device,
        not args.no_fluency,
        args.mode,
        args.batch_size,
    )
    bench(
        config,
        args.out,
        args.resume,
        others=lambda alg_name, file: easyedits_method(alg_name, file, args.easyedit_home),
    )
    return 0


def _compare(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.report.compare import compare

    compare(args.runs, args.out, args.seed)
    return 0


def _trace(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.tracing import TraceConfig
    from easyedit_mdm.tracing.job import TraceJob, trace

    revealed = None if args.revealed is None else tuple(args.revealed)
    config = TraceConfig(
        args.corrupt, args.noise, args.samples, args.window, revealed, args.reveal, args.max_rows, args.seed
    )
    models = args.compare or [args.model or "twin-llada"]
    job = TraceJob(
        models,
        args.prompt,
        args.subject,
        args.target,
        args.answer_tokens,
        args.known,
        args.limit,
        args.replace_with,
        args.device,
        args.dtype,
    )
    trace(job, args.out, config)
    return 0


def _sweep(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.statistics import parse_layers
    from easyedit_mdm.runs.run import BenchConfig
    from easyedit_mdm.runs.sweep import SweepJob, sweep

    config = BenchConfig(
        args.alg,
        args.hparams,
        args.dataset,
        args.data_dir,
        args.data_file,
        args.limit,
        args.seed,
        light=True,
        device=args.device,
    )
    layers = None if args.layers is None else parse_layers(args.layers)
    sweep(SweepJob(config, layers, args.windows, args.trace_file, args.trace_limit), args.out)
    return 0


def _twins_train(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.twins import train_twin

    train_twin(args.name, args.out, args.steps, args.start_from, args.seed, args.size)
    return 0


def _twins_eval(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.twins import evaluate_twins

    evaluate_twins(args.models, args.limit, args.file)
    return 0


def _twins_data(args: argparse.Namespace, rest: list[str]) -> int:
    from easyedit_mdm.cli.twins import write_data

    write_data(args.out)
    return 0


def _adapt(args: argparse.Namespace, rest: list[str]) -> int:
    from pathlib import Path

    from easyedit_mdm.errors import HyperParameterError
    from easyedit_mdm.training.adapting import Recipe
    from easyedit_mdm.training.commands import AdaptJob, adapt_model, gates

    if args.gates is not None:
        return 0 if gates(args.gates, args.model, args.data_dir, args.file, args.limit, args.device) else 1
    if args.model is None or args.out is None:
        raise HyperParameterError("adapt needs --model and --out (or --gates DIR)")
    recipe = Recipe(args.attention, args.block_size, args.lora_rank, args.lr, args.rows, seed=args.seed)
    adapt_model(
        AdaptJob(
            args.model, Path(args.out), recipe, args.tokens, args.minutes, args.data_dir, args.text, args.samples, args.start_from, args.mask_token,
            args.merged, device=args.device, save_seconds=args.save_seconds,
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
