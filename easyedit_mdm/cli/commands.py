"""One function a subcommand, with no logic: arguments are checked, then what does the work is imported and
called.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Exit, Option, Typer
from typer.core import TyperCommand

from easyedit_mdm.cli import arguments as args
from easyedit_mdm.errors import DataError, EditError, HyperParameterError
from easyedit_mdm.version import __version__

NOT_WRITTEN = 3  # exit status of `edit` where a fact was not written
_SETTINGS = {"help_option_names": ["-h", "--help"]}
app = Typer(add_completion=False, rich_markup_mode=None, context_settings=_SETTINGS)
twins = Typer(rich_markup_mode=None, help="Train the small models that ship with the package.")

# ---- arguments that several commands take ------------------------------------------------------------------
Edit = Annotated[str, Argument(metavar="EDIT_DIR", help="folder that easyedit-mdm edit --save wrote")]
NewFolder = Annotated[str, Option(help="folder to write; must not exist")]
Base = Annotated[str | None, Option(help="a twin, a folder or a hub id (default: the edit's base)")]
Model = Annotated[str, Option(help="a twin, a folder or a hub id")]
Hparams = Annotated[str, Option(help="hyperparameter file, such as ROME_MDM/twin-llada")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1 (default: the file's, else CUDA)")]
Dtype = Annotated[str | None, Option(help="dtype to load the model in (default: the file's or checkpoint's)")]
Json = Annotated[str | None, Option("--json", help="write the report to this file")]
Home = Annotated[
    str | None, Option(help="a clone of EasyEdit (default: EASYEDIT_HOME, or the installed one)")
]
DataDir = Annotated[str | None, Option(help="folder of the benchmark files")]
DataFile = Annotated[str | None, Option(help="a file outside the folder's usual names")]
Seed = Annotated[int, Option(help="of every random draw")]
Dataset = Annotated[str, Option(help="zsre, counterfact, knowedit, kamel, twins, requests, ...")]


class _Spreading(TyperCommand):
    """A command whose list options take several values in a row: `--compare A B`."""

    def parse_args(self, ctx: Any, args_: list[str]) -> list[str]:
        """As typer's."""
        several = [
            name for option in self.params if getattr(option, "multiple", False) for name in option.opts
        ]
        return super().parse_args(ctx, args.repeated(args_, several))


def _version(asked: bool) -> bool:
    if asked:
        print(__version__)
        raise Exit
    return asked


@app.callback()
def _main(version: Annotated[bool, Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Edit facts in masked diffusion language models through EasyEdit."""


@app.command()
def demo(
    out: Annotated[str, Option(help="folder for demo.html and demo.json")] = "demo",
    easyedit_home: Home = None,
) -> int:
    """Edit a fact in a small model, watch it denoise, undo it."""
    from easyedit_mdm.demo import run_demo

    return 0 if run_demo(out, easyedit_home) else 1


@app.command()
def doctor(
    model: Annotated[str | None, Option(help="what editing this model takes; no weights are loaded")] = None,
    easyedit_home: Home = None,
    file: Json = None,
) -> int:
    """What is here, what will not work and what to do.

    Exit status 1 if no twin can be edited.
    """
    from easyedit_mdm.cli.doctor import doctor

    return 0 if doctor(model, easyedit_home, file) else 1


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, Argument(metavar="SCRIPT")],
    arguments: Annotated[list[str] | None, Argument(metavar="...", show_default=False)] = None,
    easyedit_home: Annotated[
        str | None,
        Option(help="a clone of EasyEdit (default: the script's, EASYEDIT_HOME, the installed one)"),
    ] = None,
    seed: Annotated[int, Option(help="of the random generators at the script's first line")] = 42,
) -> None:
    """Run an EasyEdit script, untouched, with our methods.

    Everything after SCRIPT goes to the script; --alg ROME_MDM stands for its --editing_method.
    """
    args.there(DataError, "a script of EasyEdit", script)
    from easyedit_mdm.host.runner import run_script

    run_script(script, arguments or [], easyedit_home, seed)


@app.command()
def hook() -> None:
    """Print a folder for PYTHONPATH.

    With it `python SCRIPT --editing_method=ROME_MDM` works.
    """
    from easyedit_mdm.host.hook import folder

    print(folder())


@app.command()
def edit(
    hparams: Hparams,
    save: Annotated[str, Option(metavar="DIR", help="folder for the edit; must not exist")],
    model: Annotated[str | None, Option(help="a twin, a folder or a hub id (default: the file's)")] = None,
    prompt: Annotated[
        str | None, Option(help="the prompt, with its subject in it, or {} in its place")
    ] = None,
    subject: Annotated[str | None, Option(help="the subject")] = None,
    target: Annotated[str | None, Option(help="what is to follow the prompt")] = None,
    data_file: Annotated[
        str | None, Option(help="instead of the three: a JSON list of prompt, subject and target_new")
    ] = None,
    force: Annotated[bool, Option("--force", help="keep the edit whatever the collapse guard says")] = False,
    no_guard: Annotated[bool, Option("--no-guard", help="do not look for damage to the model")] = False,
    guard_text: Annotated[str | None, Option(help="text whose perplexity the guard takes")] = None,
    keep_failed: Annotated[
        bool, Option("--keep-failed", help="save it even if the model does not write all facts")
    ] = False,
    values: Annotated[
        str | None,
        Option(metavar="DIR", help="for thousands of facts: keep their values there, and go on there"),
    ] = None,
    chunk: Annotated[int | None, Option(help="with --values: facts a chunk (default: 256)")] = None,
    values_only: Annotated[
        bool, Option("--values-only", help="with --values: no edit, beside the process that makes it")
    ] = False,
    check: Annotated[
        int | None, Option(metavar="N", help="look at the first N facts' answers (default: at all)")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> int:
    """Make an edit, show what it does, and save it as a folder.

    Exit status 3, and nothing saved, if a fact was not written.
    """
    if values is None and (values_only or chunk is not None):
        raise HyperParameterError("--values-only and --chunk want --values DIR, where values are kept")
    for option, number in (("--chunk", chunk), ("--check", check)):
        if number is not None and number < 1:
            raise HyperParameterError(f"{option} {number} must be at least 1")
    args.free(save)
    requests = args.requests_of(prompt, subject, target, data_file)
    args.named_hparams(hparams)
    from easyedit_mdm.cli.edits import CHUNK, Chunked, GuardOptions, new_edit

    guard = GuardOptions(not no_guard, force, guard_text)
    chunked = None if values is None else Chunked(values, chunk or CHUNK, values_only)
    saved = new_edit(
        hparams, requests, save, model, guard, device, dtype, keep_failed, chunked=chunked, check=check
    )
    return 0 if saved else NOT_WRITTEN


@app.command()
def apply(edit: Edit, out: NewFolder, model: Base = None, device: Device = None) -> None:
    """Write the base model with an edit in it as a new folder.

    From that folder it can be taken back, bit for bit.
    """
    args.free(out)
    args.there(EditError, "a folder that easyedit-mdm edit wrote", edit)
    from easyedit_mdm.cli.edits import apply_edit

    apply_edit(edit, out, model, device)


@app.command()
def revert(
    edit: Edit,
    model: Annotated[str, Option(help="folder that easyedit-mdm apply wrote")],
    out: NewFolder,
    device: Device = None,
) -> None:
    """Write a model that apply wrote, without an edit.

    It is bit for bit as it was.
    """
    args.free(out)
    args.there(EditError, "a folder that easyedit-mdm wrote", edit, model)
    from easyedit_mdm.cli.edits import revert_edit

    revert_edit(edit, model, out, device)


@app.command()
def diff(
    edit: Edit,
    model: Base = None,
    prompt: Annotated[
        list[str] | None, Option(help="show the effect on it; may be given several times")
    ] = None,
    prompts_file: Annotated[str | None, Option(help="a text file, a prompt a line")] = None,
    file: Json = None,
    device: Device = None,
) -> None:
    """Which weights an edit changes, and what the model then says."""
    args.there(EditError, "a folder that easyedit-mdm edit wrote", edit)
    args.there(DataError, "a UTF-8 text file with a prompt a line", prompts_file)
    from easyedit_mdm.cli.edits import diff_edit

    diff_edit(edit, prompt or [], prompts_file, model, device, file)


@app.command()
def compose(
    edits: Annotated[list[str], Argument(metavar="EDIT_DIR...", help="folders that easyedit-mdm edit wrote")],
    out: NewFolder,
    force: Annotated[bool, Option("--force", help="compose edits that contradict each other")] = False,
) -> None:
    """Several edits of one base model as one.

    Says where they are at odds.
    """
    args.free(out)
    args.there(EditError, "folders that easyedit-mdm edit wrote", *edits)
    from easyedit_mdm.cli.edits import compose_edits

    compose_edits(edits, out, force)


@app.command()
def verify(
    edit: Edit,
    model: Annotated[
        str | None, Option(help="the model that should hold it (default: base and edit)")
    ] = None,
    file: Json = None,
    device: Device = None,
) -> int:
    """Whether an edit is whole and a model still holds it.

    Exit status 1 if not.
    """
    args.there(EditError, "a folder that easyedit-mdm edit wrote", edit)
    from easyedit_mdm.cli.edits import verify_edit

    return 0 if verify_edit(edit, model, device, file)["holds"] else 1


@app.command()
def export(
    edit: Edit,
    model: Base = None,
    peft: Annotated[str | None, Option(metavar="DIR", help="folder for the LoRA adapter")] = None,
    merged: Annotated[str | None, Option(metavar="DIR", help="folder for the model")] = None,
    device: Device = None,
) -> None:
    """An edit as a LoRA adapter, or as a model folder."""
    args.free(peft, merged)
    args.there(EditError, "a folder that easyedit-mdm edit wrote", edit)
    from easyedit_mdm.cli.edits import export_edit

    export_edit(edit, peft, merged, model, device)


@app.command("app")
def app_(
    port: Annotated[int | None, Option(help="port (default: 7860, or the next free one)")] = None,
    open_browser: Annotated[bool, Option("--open", help="open it in the browser")] = False,
) -> None:
    """A page in the browser: edit facts and watch a model write. For this machine alone.

    Needs the extra app.
    """
    args.extra("gradio")
    from easyedit_mdm.cli.app import serve

    serve(port, open_browser)


@app.command()
def damage(
    model: Annotated[str, Argument(metavar="MODEL", help="a twin, a folder or a hub id")],
    edits: Annotated[str, Option(metavar="DIR", help="folder of an edit, or of several")],
    tasks: Annotated[str, Option(help="tasks of lm-evaluation-harness, with commas between them")],
    include_path: Annotated[str | None, Option(help="folder of task files of your own")] = None,
    limit: Annotated[int | None, Option(help="documents of each task, the first ones (default: all)")] = None,
    out: Annotated[str | None, Option(help="folder for damage.md and damage.json; must not exist")] = None,
    samples: Annotated[int, Option(help="of a likelihood that is estimated, a multiple of 8")] = 128,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """What edits do to a model's other abilities.

    Tasks of lm-evaluation-harness before and after. Needs the extra lm-eval.
    """
    args.free(out)
    args.there(EditError, "a folder that easyedit-mdm edit wrote", edits)
    args.extra("lm_eval")
    from easyedit_mdm.cli.damage import print_damage

    print_damage(model, edits, tasks, include_path, limit, out, samples=samples, seed=seed, device=device)


@app.command(
    "lm-eval",
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
def lm_eval(
    arguments: Annotated[list[str] | None, Argument(metavar="...", show_default=False)] = None,
) -> None:
    """lm-evaluation-harness, with --model easyedit_mdm.

    Its own command line: lm-eval run --model easyedit_mdm --model_args pretrained=twin-llada,edits=DIR ...
    What it takes itself: lm-eval run --help. Needs the extra lm-eval.
    """
    args.extra("lm_eval")
    from easyedit_mdm.harness.run import run_harness

    run_harness(arguments or [])


@app.command()
def stats(
    model: Model,
    dataset: Annotated[str, Option(help="a text file, JSON lines, datasets:NAME:CONFIG:SPLIT, or twins")],
    layers: Annotated[str, Option(help="layers, such as 4-7 or 4,5,6")],
    tokens: Annotated[
        int | None, Option(help="tokens to collect (default: 10 times the key's dimension)")
    ] = None,
    mask_ratio: Annotated[
        str, Option(help="0 (plain text), uniform, or a number: mask that share, take keys elsewhere")
    ] = "0",
    settled: Annotated[
        float | None, Option(help="stop once even and odd batches differ by less than this, such as 0.05")
    ] = None,
    out: Annotated[str | None, Option(help="folder to keep them in (default: the user's cache)")] = None,
    file: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Collect the second moments that the methods need."""
    wanted, ratio = args.parse_layers(layers), args.parse_ratio(mask_ratio)
    from easyedit_mdm.cli.statistics import collect_statistics

    collect_statistics(model, dataset, wanted, tokens, ratio, settled, out, file, device=device, dtype=dtype)


@app.command()
def bench(
    alg: Annotated[str, Option(help="one of our methods, or EasyEdit's own (ROME, MEMIT, ...)")],
    hparams: Hparams,
    dataset: Dataset,
    out: Annotated[str, Option(help="run file (.jsonl)")],
    data_dir: DataDir = None,
    data_file: DataFile = None,
    limit: Annotated[int | None, Option(help="cases, drawn by the seed (default: all)")] = None,
    seed: Seed = 0,
    mode: Annotated[
        Literal["each", "batch", "sequential"],
        Option(help="one fact at a time; several together; batch after batch in one model"),
    ] = "each",
    batch_size: Annotated[
        int | None, Option(help="facts a batch (default: all for batch, 1 for sequential)")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="go on with a run that was cut off")] = False,
    label: Annotated[str | None, Option(help="what to call the run in reports")] = None,
    held_out: Annotated[str | None, Option(help="a text whose perplexity is taken before and after")] = None,
    light: Annotated[bool, Option("--light", help="leave out the ladder of honesty and fluency")] = False,
    no_fluency: Annotated[bool, Option("--no-fluency", help="leave out fluency alone")] = False,
    allow_skipped: Annotated[
        bool, Option("--allow-skipped", help="exit with 0 although records of the data set could not be used")
    ] = False,
    easyedit_home: Home = None,
    device: Device = None,
) -> None:
    """Edit and judge many cases, one line each.

    Can be killed and resumed at any point. Ends with the figures, and with exit status 1 if records were
    skipped.
    """
    args.named_hparams(hparams)
    from easyedit_mdm.host.methods import easyedits_method
    from easyedit_mdm.runs.run import BenchConfig, bench

    config = BenchConfig(
        alg, hparams, dataset, data_dir, data_file, limit, seed, label, held_out, light, device,
        not no_fluency,
        mode, batch_size,
    )  # fmt: skip
    bench(config, out, resume, others=lambda name, path: easyedits_method(name, path, easyedit_home))
    from easyedit_mdm.evaluation.records import read_run
    from easyedit_mdm.report.closing import summary_lines

    print(*summary_lines(out), sep="\n")
    skipped = read_run(out).header["dataset"]["skipped"]
    for record in skipped:
        print(f"record {record['record']} was skipped: {record['reason']}", file=sys.stderr)
    if skipped and not allow_skipped:
        raise Exit(1)


@app.command()
def compare(
    runs: Annotated[list[str], Argument(metavar="RUN...", help="run files of easyedit-mdm bench")],
    out: Annotated[str, Option(help="folder for report.html, report.md, report.csv and report.json")],
    seed: Annotated[int, Option(help="of the bootstrap")] = 0,
    against: Annotated[
        str | None, Option(metavar="RUN", help="hold every run against this one (default: every two runs)")
    ] = None,
) -> None:
    """A report of runs: tables, figures, a page for each case."""
    args.there(DataError, "run files of easyedit-mdm bench", *runs)
    from easyedit_mdm.report.compare import compare

    compare(runs, out, seed, against=against)


@app.command(cls=_Spreading)
def trace(
    out: Annotated[str, Option(help="folder for trace.html, trace.json and the figures")],
    model: Annotated[str | None, Option(help="a twin, a folder or a hub id (default: twin-llada)")] = None,
    compare: Annotated[
        list[str] | None,
        Option(metavar="MODEL...", help="several models, on the facts that all of them know"),
    ] = None,
    prompt: Annotated[str | None, Option(help="one fact: the prompt, with the subject, or {} for it")] = None,
    subject: Annotated[str | None, Option(help="the subject in --prompt")] = None,
    target: Annotated[str | None, Option(help="the answer (default: what the model itself writes)")] = None,
    answer_tokens: Annotated[int, Option(help="tokens of the answer where --target is left out")] = 1,
    known: Annotated[
        str | None, Option(help="facts: known_1000.json, requests, CounterFact (default: the twins' own)")
    ] = None,
    limit: Annotated[
        int | None, Option(help="known facts to trace, drawn by the seed (default: all)")
    ] = None,
    corrupt: Annotated[
        Literal["noise", "replace", "mask"], Option(help="noise, other subjects, or masks (masked models)")
    ] = "noise",
    noise: Annotated[float, Option(help="standard deviations of the noise, in the embeddings' own")] = 3.0,
    replace_with: Annotated[
        list[str] | None, Option(metavar="SUBJECT...", help="for --corrupt replace (default: other facts')")
    ] = None,
    samples: Annotated[int, Option(help="corrupted runs a fact")] = 10,
    window: Annotated[
        int | None, Option(help="MLPs or attentions restored together (default: 10 of 48 layers)")
    ] = None,
    revealed: Annotated[
        list[int] | None, Option(metavar="K...", help="masked models: slots revealed (default: 0 and half)")
    ] = None,
    reveal: Annotated[
        Literal["path", "random"], Option(help="which slots: those the model writes first, or random ones")
    ] = "path",
    max_rows: Annotated[int, Option(help="rows of one forward pass")] = 256,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Causal tracing: which layers and tokens carry a fact."""
    if compare and model:
        raise HyperParameterError("--model and --compare were given: give one of them")
    if prompt is None:
        args.there(DataError, "a JSON file of facts", known)
    from easyedit_mdm.tracing import TraceConfig
    from easyedit_mdm.tracing.job import TraceJob, trace

    slots = None if revealed is None else tuple(revealed)
    config = TraceConfig(corrupt, noise, samples, window, slots, reveal, max_rows, seed)
    facts = (prompt, subject, target, answer_tokens, known, limit, replace_with)
    trace(TraceJob(compare or [model or "twin-llada"], *facts, device, dtype), out, config)


@app.command(cls=_Spreading)
def sweep(
    alg: Annotated[str, Option(help="one of our methods")],
    hparams: Hparams,
    out: Annotated[str, Option(help="folder for sweep.html, figures and run files; what is there is kept")],
    dataset: Dataset = "twins_validation",
    data_dir: DataDir = None,
    data_file: DataFile = None,
    limit: Annotated[int, Option(help="cases, drawn by the seed")] = 16,
    layers: Annotated[str | None, Option(help="layers to try, such as 0-7 (default: all)")] = None,
    windows: Annotated[
        list[int] | None, Option(metavar="W...", help="layers edited together (default: 1; batched: also 4)")
    ] = None,
    trace: Annotated[
        str | None, Option(metavar="FILE", help="trace.json to put beside it (default: facts are traced)")
    ] = None,
    trace_limit: Annotated[int, Option(help="facts to trace where --trace is left out")] = 8,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Where editing works, by layer, beside the trace."""
    args.named_hparams(hparams)
    wanted = None if layers is None else args.parse_layers(layers)
    from easyedit_mdm.runs.run import BenchConfig
    from easyedit_mdm.runs.sweep import SweepJob, sweep

    config = BenchConfig(alg, hparams, dataset, data_dir, data_file, limit, seed, light=True, device=device)
    sweep(SweepJob(config, wanted, windows, trace, trace_limit), out)


@app.command()
def leaderboard(
    out: Annotated[str, Option(help="folder for leaderboard.html and the runs; what is there is kept")],
    suite: Annotated[str, Option(help="quick, small, smollm2, full, or a YAML file")] = "small",
    data_dir: DataDir = None,
    device: Device = None,
    so_far: Annotated[bool, Option("--so-far", help="run nothing; write what is finished")] = False,
) -> None:
    """Every method on a suite of models, in one table.

    Each is searched equally. Several processes with the same --out share the work.
    """
    from easyedit_mdm.runs.leaderboard import leaderboard as run

    print(run(suite, out, data_dir, device, so_far))


app.add_typer(twins, name="twins")


@twins.command("train")
def twins_train(
    name: Annotated[str, Option(help="a twin, or one of its earlier stages")],
    out: Annotated[str, Option(help="folder for checkpoint, log and the finished model (OUT/model)")],
    steps: Annotated[int | None, Option(help="optimiser steps (default: the recipe's)")] = None,
    start_from: Annotated[
        str | None,
        Option(help="training folder of the stage before it (default: trained too, in OUT/stages)"),
    ] = None,
    seed: Seed = 0,
    size: Annotated[
        Literal["small", "medium"], Option(help="medium: about 30 million parameters, for a GPU")
    ] = "small",
) -> None:
    """Train one twin, or go on where a checkpoint stands."""
    from easyedit_mdm.cli.twins import train_twin

    train_twin(name, out, steps, start_from, seed, size)


@twins.command("eval")
def twins_eval(
    limit: Annotated[int, Option(help="facts a length")] = 100,
    file: Json = None,
    models: Annotated[list[str] | None, Option("--model", help="a twin or a folder (default: all)")] = None,
) -> None:
    """How much the twins know and how far they can be edited, by tokens."""
    from easyedit_mdm.cli.twins import evaluate_twins

    evaluate_twins(models, limit, file)


@twins.command("data")
def twins_data(out: Annotated[str, Option(help="folder to write to")]) -> None:
    """Write the benchmark files of the twins' world (CounterFact, zsRE)."""
    from easyedit_mdm.cli.twins import write_data

    write_data(out)


@app.command()
def adapt(
    model: Annotated[
        str | None, Option(help="the autoregressive model: smollm2, a folder or a hub id")
    ] = None,
    out: Annotated[str | None, Option(help="folder for adapter, checkpoint, curve and log")] = None,
    tokens: Annotated[int | None, Option(help="tokens of text to train on in all")] = None,
    minutes: Annotated[float | None, Option(help="instead: minutes to train in all")] = None,
    attention: Annotated[
        Literal["block", "full", "causal"],
        Option(help="who sees whom in the end; causal: no masks, the control on the same text"),
    ] = "block",
    block_size: Annotated[int, Option(help="tokens that are written together")] = 8,
    lora_rank: Annotated[int, Option(help="of the adapter")] = 32,
    lr: Annotated[float, Option(help="highest learning rate")] = 3e-4,
    rows: Annotated[int, Option(help="rows of a step, 256 columns each")] = 1,
    precision: Annotated[
        Literal["float32", "bfloat16"] | None, Option(help="of products (default: bfloat16 on a GPU)")
    ] = None,
    data_dir: Annotated[str | None, Option(help="benchmark files (default: EASYEDIT_MDM_DATA)")] = None,
    text: Annotated[str | None, Option(help="train on this text file instead, a paragraph a line")] = None,
    samples: Annotated[
        str | None, Option(help="the model's own samples, or none (default: written to OUT/samples.jsonl)")
    ] = None,
    start_from: Annotated[
        str | None, Option("--from", metavar="ADAPTER", help="begin with it; the optimiser starts anew")
    ] = None,
    mask_token: Annotated[
        str | None, Option(help="the token that becomes the mask (default: an unused special token)")
    ] = None,
    merged: Annotated[str | None, Option(metavar="DIR", help="write the merged model to it, too")] = None,
    gates: Annotated[
        str | None, Option(metavar="DIR", help="train nothing: measure the gates of this adapter or model")
    ] = None,
    limit: Annotated[int, Option(help="facts of each source for the gates")] = 100,
    file: Annotated[str | None, Option("--json", help="with --gates: write them to this file")] = None,
    seed: Seed = 0,
    device: Device = None,
    save_seconds: Annotated[float, Option(help="seconds between checkpoints")] = 300.0,
    measure_seconds: Annotated[
        float | None, Option(help="seconds between points of the curve (default: 900; 60 on a GPU)")
    ] = None,
    workers: Annotated[
        int | None, Option(help="processes that draw the rows ahead (default: 0; 4 on a GPU)")
    ] = None,
) -> int:
    """Make a masked model out of an autoregressive one (LoRA).

    Goes on where OUT holds a checkpoint.
    """
    if gates is not None:
        return _gates(gates, model, data_dir, file, limit, device)
    if model is None or out is None:
        raise HyperParameterError("adapt needs --model and --out (or --gates DIR)")
    from easyedit_mdm.training.commands import AdaptJob, adapt_model
    from easyedit_mdm.training.recipe import Recipe

    recipe = Recipe(attention, block_size, lora_rank, lr, rows, seed=seed, precision=precision)
    sources = (data_dir, text, samples, start_from, mask_token, merged)
    adapt_model(
        AdaptJob(
            model, Path(out), recipe, tokens, minutes, *sources, device=device,
            save_seconds=save_seconds, limit=limit, measure_seconds=measure_seconds, workers=workers,
        )
    )  # fmt: skip
    return 0


def _gates(*arguments: Any) -> int:
    from easyedit_mdm.training.commands import gates

    return 0 if gates(*arguments) else 1
