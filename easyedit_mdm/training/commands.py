"""What `easyedit-mdm adapt` does."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from easyedit_mdm.api import load_model, model_folder
from easyedit_mdm.common.files import read_json, write_json
from easyedit_mdm.errors import CheckpointError, DataError, HyperParameterError
from easyedit_mdm.models import Adapter
from easyedit_mdm.training.adapting import Run, train
from easyedit_mdm.training.corpus import Corpus, corpus_of, samples_of, text_of
from easyedit_mdm.training.gates import NEEDED, measure_gates
from easyedit_mdm.training.heldout import HeldOut
from easyedit_mdm.training.loop import CHECKPOINT
from easyedit_mdm.training.lora import CONFIG, adapter_digest, load_lora, mask_token_of, student_of
from easyedit_mdm.training.merging import write_merged
from easyedit_mdm.training.recipe import Recipe
from easyedit_mdm.training.samples import write_samples

SAMPLE_TOKENS = 60
MOST_SAMPLES, MOST_SAMPLES_GPU = 2000, 10_000


@dataclass(frozen=True)
class AdaptJob:
    """One call of `easyedit-mdm adapt`.

    Attributes:
        model: the autoregressive model: a name, a folder or a hub id.
        out: folder of the run; what is in it goes on.
        data_dir: folder of the benchmark files; `EASYEDIT_MDM_DATA` by default.
        text: instead, a text file, a paragraph a line.
        samples: the model's own samples (JSON lines); by default they are written to OUT/samples.jsonl first.
            0 tokens of them: `none`.
        start_from: an adapter to begin with; its optimiser state is not known, so the optimiser starts anew.
        mask_token: the token that becomes the mask; see `easyedit_mdm.training.lora.mask_token_of`.
        merged: folder for the merged model.
        gates: whether to measure the gates at the end, where it is not `text` that was trained on.
        save_seconds: time between checkpoints.
        measure_seconds: time between points of the curve; a minute on a GPU, a quarter of an hour elsewhere.
        workers: processes that draw the rows; four on a GPU, none elsewhere.
        limit: facts of each source for the gates.
    """

    model: str
    out: Path
    recipe: Recipe = Recipe()
    tokens: int | None = None
    minutes: float | None = None
    data_dir: str | None = None
    text: str | None = None
    samples: str | None = None
    start_from: str | None = None
    mask_token: str | None = None
    merged: str | None = None
    gates: bool = True
    save_seconds: float = 300.0
    limit: int = 100
    device: str | None = None
    measure_seconds: float | None = None
    workers: int | None = None


def adapt_model(job: AdaptJob) -> dict[str, Any]:
    """Train, write the adapter, merge it if asked to, and measure the gates where there are data for them.

    Returns:
        the final state of the training.

    Raises:
        HyperParameterError: without tokens or minutes, or with both.
        DataError: without text to train on.
        ModelError, CheckpointError, FileError: see the parts.
    """
    console = Console()
    _check(job)
    base = load_model(job.model, dtype="float32", device=_device(job.device))
    if base.denoises:
        raise CheckpointError(
            f"{job.model} is a masked model already: adapt starts from an autoregressive one "
            "(--from takes an adapter)"
        )
    mask_id = mask_token_of(base.tokenizer, job.mask_token)
    corpus, rest = _corpora(job, base)
    # the base must write its samples before LoRA layers are put into it
    student, tensors = student_of(base.native, mask_id, job.recipe.lora_rank, job.recipe.seed)
    if job.start_from is not None and not (job.out / CHECKPOINT).exists():
        load_lora(Path(job.start_from), student, tensors)
        console.print(f"goes on from the adapter in {job.start_from}; the optimiser starts anew")
    gpu = base.device.type == "cuda"
    student.inside = gpu
    attention = job.recipe.attention
    held_out = HeldOut(
        rest, job.recipe.block_size, mask_id, full=attention == "full", causal=attention == "causal"
    )
    card = card_of(job, base, mask_id)
    measure = job.measure_seconds or (60.0 if gpu else 900.0)
    workers = job.workers if job.workers is not None else min(4, os.cpu_count() or 1) if gpu else 0
    state = train(
        student,
        tensors,
        corpus,
        held_out,
        job.recipe,
        Run(job.out, job.tokens, job.minutes, job.save_seconds, measure, workers=workers),
        card,
    )
    console.print(f"adapter: {job.out / 'adapter'}, curve: {job.out / 'curve.jsonl'}")
    del base, student, tensors
    if job.merged is not None:
        merge(job.model, job.out / "adapter", job.merged)
    if job.gates and job.text is None:
        gates(job.out / "adapter", job.model, job.data_dir, job.out / "gates.json", job.limit, job.device)
    return state


def card_of(job: AdaptJob, base: Adapter, mask_id: int) -> dict[str, Any]:
    """What the adapter's configuration says about the model that it makes."""
    block = job.recipe.attention == "block"
    return {
        "name": job.out.name,
        "base": job.model,
        "attention": job.recipe.attention,
        "block_size": job.recipe.block_size if block else None,
        "edges": "canvas",
        "context": "causal" if block else "blocks",
        "logit_shift": True,
        "mask_token_id": mask_id,
        "mask_token": base.tokenizer.convert_ids_to_tokens(mask_id),
    }


def merge(model: str, adapter: str | Path, out: str | Path) -> Path:
    """Write base and adapter as one model folder; see `easyedit_mdm.training.merging.write_merged`."""
    return write_merged(model_folder(model), adapter, out)


def gates(
    model: str | Path,
    base: str | None = None,
    data_dir: str | None = None,
    file: str | Path | None = None,
    limit: int = 100,
    device: str | None = None,
) -> bool:
    """Measure the gates of an adapted model, print them, and write them to a file.

    Args:
        model: an adapter's folder, a merged folder, or a name such as `smollm2-block`.
        base: the model that it was made of; an adapter names it itself.

    Returns:
        whether all gates are passed.

    Raises:
        DataError: without the benchmark files.
        CheckpointError: if the base is not known.
    """
    root = data_dir or os.environ.get("EASYEDIT_MDM_DATA")
    if not root:
        raise DataError(
            "the gates ask facts of the benchmark files: give --data-dir, or set EASYEDIT_MDM_DATA"
        )
    folder = Path(model)
    if (folder / CONFIG).exists():
        base = base or read_json(folder / CONFIG, CheckpointError, "a LoRA adapter's configuration").get(
            "base_model_name_or_path"
        )
        merged = folder.with_name(f"merged-{adapter_digest(folder)}")
        if not merged.exists():
            merge(str(base), folder, merged)
        model = merged
    if base is None:
        raise CheckpointError(
            f"{model} does not say what it was made of: give --model, the autoregressive model"
        )
    where = _device(device)
    report = measure_gates(
        load_model(model, device=where, dtype="float32"),
        load_model(base, device=where, dtype="float32"),
        root,
        limit,
    )
    if file is not None:
        write_json(file, report)
    _print_gates(report)
    return all(report[name]["passed"] for name in NEEDED if name in report)


def _print_gates(report: dict[str, Any]) -> None:
    console, table = Console(), Table(title="gates")
    for column in ("gate", "value", "needed", "of", ""):
        table.add_column(column, justify="left" if column in ("gate", "") else "right")
    for name in (name for name in NEEDED if name in report):
        gate = report[name]
        sign = "at most" if name == "first_slot" else "at least"
        table.add_row(
            name,
            f"{gate['value']:.3f}",
            f"{sign} {gate['needed']:.2f}",
            str(gate["n"]),
            "passed" if gate["passed"] else "not passed",
        )
    console.print(table)
    for sample in report["samples"]:
        console.print(f"[bold]{sample['prompt']}[/]{sample['text']}", highlight=False)


def _check(job: AdaptJob) -> None:
    if (job.tokens is None) == (job.minutes is None):
        raise HyperParameterError(
            f"adapt needs --tokens or --minutes, and not both (got {job.tokens!r} and {job.minutes!r})"
        )
    for name, value in (
        ("tokens", job.tokens),
        ("minutes", job.minutes),
        ("lora-rank", job.recipe.lora_rank),
    ):
        if value is not None and value <= 0:
            raise HyperParameterError(f"--{name} {value!r} must be above 0")
    if job.recipe.block_size < 2:
        raise HyperParameterError(
            f"--block-size {job.recipe.block_size!r}: a block of one token is autoregressive; give 2 or more"
        )


def _corpora(job: AdaptJob, base: Adapter) -> tuple[Corpus, Corpus]:
    """What is trained on, and the held-out texts of the curve."""
    tokenizer, root = base.tokenizer, job.data_dir or os.environ.get("EASYEDIT_MDM_DATA")
    if job.text is not None:
        text, last = text_of(job.text, tokenizer)
        corpus, rest = Corpus({}, text, [], tokenizer), Corpus({}, last, [], tokenizer)
    elif root:
        corpus, rest = corpus_of(root, tokenizer)
    else:
        raise DataError("adapt needs text: give --data-dir or --text, or set EASYEDIT_MDM_DATA")
    if job.samples == "none":
        return corpus, rest
    file = Path(job.samples) if job.samples else job.out / "samples.jsonl"
    if job.samples is None:
        job.out.mkdir(parents=True, exist_ok=True)
        gpu = base.device.type == "cuda"
        most = MOST_SAMPLES_GPU if gpu else MOST_SAMPLES
        by_tokens = max(16, (job.tokens or 0) // 4 // SAMPLE_TOKENS)
        count = min(most, by_tokens) if job.tokens else most if gpu else most // 4
        write_samples(base.native, tokenizer, corpus.text, file, count, SAMPLE_TOKENS, job.recipe.seed)
    return replace(corpus, samples=samples_of(file, tokenizer)), rest


def _device(wanted: str | None) -> str:
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")
