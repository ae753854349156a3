"""What the kit measures. Each part takes a `Run`, and notes rows of plain data as soon as it has them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import resource
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from shapes import SHAPES, Shape, model_of, requests_of, size_of
from torch.utils.flop_counter import FlopCounterMode

from easyedit_mdm import load_hparams, make_edit, make_edits, wrap_model
from easyedit_mdm.editing import METHODS, EditRequest, ROMEMDMHyperParams
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.sizes import ModelSize
from easyedit_mdm.statistics import CollectConfig, collect, moments_for, text_source
from easyedit_mdm.statistics import store as statistics_store
from easyedit_mdm.statistics.texts import SHIPPED

PREFIXES = [
    "{}", "The river of the old city. {}", "Therefore it was made. {}", "Because he was known. {}",
    "I was born in a town. {}", "You are a painter. {}",
]  # fmt: skip
EPS = 1e-2  # ridge of the second moments: far fewer tokens than dimensions are read
STATISTICS = 1_000_000  # tokens that the time is told for
ROW_SHARE = 60 / 540  # of the whole time that one row of many facts may take
PROBED = 3  # optimiser steps of the edit that says how long many facts take
PROFILED = 3  # optimiser steps of the edit that is profiled
TRACE_BYTES = 2_000_000  # of a trace that is kept
Method, States = str, str


@dataclass
class Run:
    """One run of the kit.

    Attributes:
        note: takes a row, of a part's name and figures; writes the report.
        leave_out: takes what was left out, and why.
        ends: when the part in hand has to be done, on `time.perf_counter`'s clock.
        device, minutes, facts, steps: as asked for on the command line.
        folder: for the temporary files.
        tokens: of the statistics that were collected, by shape; MEMIT_MDM uses those.
    """

    note: Callable[..., None]
    leave_out: Callable[[str, str], None]
    device: str
    minutes: float
    facts: list[int]
    steps: int
    out: Path
    folder: Path
    ends: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds of the part in hand."""
        return self.ends - time.perf_counter()

    def clock(self) -> float:
        """Seconds, all queued work done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class Loaded:
    """A random model, and what `doctor` says of its shape."""

    shape: Shape
    adapter: Adapter
    size: ModelSize


def loaded(run: Run, name: str) -> Loaded:
    """Make the model of a shape, which is noted with the time it took."""
    began, shape = run.clock(), SHAPES[name]
    with peak(run) as memory:
        adapter = model_of(shape, run.device)
        size = size_of(shape, run.folder)
        seconds = run.clock() - began
    run.note(
        "models", shape=name, parameters=size.parameters, layers=size.layers, hidden=size.hidden,
        inner=size.inner, vocabulary=size.vocabulary, dtype=str(adapter.dtype).removeprefix("torch."),
        seconds=seconds, peak_bytes=memory["peak"], doctor_weights_bytes=size.weights("bfloat16"),
    )  # fmt: skip
    return Loaded(shape, adapter, size)


def free() -> None:
    """Give back what a model that is gone has held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def peak(run: Run) -> Iterator[dict[str, int]]:
    """The largest memory in the block: of the device, or, on a CPU, of the whole process since it began."""
    found = {"peak": 0}
    if run.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    yield found
    if run.device.startswith("cuda"):
        found["peak"] = torch.cuda.max_memory_allocated()
    else:
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- edits -------------------------------------------------------------------------------------------------
def hparams_of(run: Run, shape: Shape, method: Method, plain: bool, **more: Any) -> ROMEMDMHyperParams:
    """The shape's own file, with the kit's prefixes, steps and statistics, and a rate and a clamp with which
    a random model learns. Fixed steps unless `early_stop_loss` is given.
    """
    file = load_hparams(f"{method}/{shape.file}")
    values: dict[str, Any] = {
        "layers": shape.layers(method) or file.layers, "context_templates": PREFIXES, "early_stop_loss": 0.0,
        "v_num_grad_steps": run.steps, "v_lr": 0.5, "clamp_norm_factor": 4.0,
        "mom2_dataset": str(text_of(run)), "mom2_eps": EPS,
        "mom2_n_tokens": run.tokens.get(shape.name), "stats_dir": str(run.folder),
    }  # fmt: skip
    if plain or shape.causal:
        values["state_schedule"] = "full_mask"
    return dataclasses.replace(file, **{**values, **more})


def edited(adapter: Adapter, requests: list[dict], hparams: ROMEMDMHyperParams) -> list[Edit]:
    """One edit of all requests, or, where the method writes one at a time, an edit each."""
    if METHODS[hparams.alg_name].batchable:
        return [make_edit(adapter, requests, hparams)]
    return make_edits(adapter, requests, hparams)


def rows_of(adapter: Adapter, requests: list[dict], hparams: ROMEMDMHyperParams) -> dict[str, int]:
    """The largest pass of an edit: rows, their length and their slots."""
    facts = [tokenise(adapter, EditRequest.of(r), hparams) for r in requests]
    together = min(len(facts), hparams.facts_per_batch)
    states = 1 if hparams.state_schedule == "full_mask" else hparams.max_states
    rows = min(hparams.max_rows, together * (states * len(PREFIXES) + 1))
    length = max(len(p.ids) + len(f.target) for f in facts for p in f.contexts)
    return {"rows": rows, "length": length, "slots": max(len(f.target) for f in facts)}


def edit_row(
    run: Run, model: Loaded, method: Method, plain: bool, facts: int, asked: int, early: float = 0.0
) -> dict[str, Any]:
    """Edit some facts and note what it took. `early`: the loss at which a fact is done; 0: all steps."""
    hparams = hparams_of(run, model.shape, method, plain, early_stop_loss=early)
    requests = requests_of(facts)
    with peak(run) as memory:
        began = run.clock()
        edits = edited(model.adapter, requests, hparams)
        seconds = run.clock() - began
    told = [fact for edit in edits for fact in edit.card["facts"]]
    shape = rows_of(model.adapter, requests, hparams)
    row = dict(
        shape=model.shape.name, method=method, states=hparams.state_schedule, plain=plain,
        stop="early" if early else "fixed", early_stop_loss=early, facts=facts, asked=asked, seconds=seconds,
        seconds_per_fact=seconds / facts, steps=sum(f["steps"] for f in told) / len(told),
        layer_passes=sum(f["layer_passes"] for f in told) / len(told), peak_bytes=memory["peak"],
        doctor_bytes=model.size.weights("bfloat16") + model.size.activations("bfloat16"),
        predicted_bytes=model.size.weights("bfloat16") + model.size.activations("bfloat16", **shape), **shape,
    )  # fmt: skip
    run.note("edits", **row)
    return row | {"losses": [f["losses"] for f in told]}


def half_way(row: dict[str, Any]) -> float:
    """The loss that half of a run's facts were below half way: an early stop there takes half of the steps.

    A random model does not learn a fact to the loss at which real edits stop, so the files' own value would
    stop nothing. One that learns nothing stops at once.
    """
    least = sorted(min(losses[: len(losses) // 2 + 1]) for losses in row["losses"])
    return least[len(least) // 2] + 1e-6


def edits(run: Run, model: Loaded) -> None:
    """Seconds a fact: few facts first, then many; at each number every arm with fixed steps, then with an
    early stop.
    """
    methods = ["ROME_MDM", "MEMIT_MDM"] if model.shape.name in run.tokens else ["ROME_MDM"]
    if methods == ["ROME_MDM"] and not model.shape.causal:
        run.leave_out(f"{model.shape.name}, MEMIT_MDM", "it needs the statistics, which were left out")
    arms = [(m, plain) for m in methods for plain in ((True,) if model.shape.causal else (True, False))]
    last: dict[tuple[Method, bool], dict[str, Any]] = {}
    for arm in arms:  # whatever is set up at the first call is no part of the time
        edited(model.adapter, requests_of(1), hparams_of(run, model.shape, *arm, v_num_grad_steps=2))
    for asked in run.facts:
        done = []
        for arm in arms:
            facts = _that_fit(run, model, arm, asked, last.get(arm))
            if facts:
                last[arm] = edit_row(run, model, *arm, facts, asked)
                done.append(arm)
        for arm in done:
            if run.left > last[arm]["seconds"]:
                edit_row(run, model, *arm, last[arm]["facts"], asked, early=half_way(last[arm]))
            else:
                name = f"{model.shape.name}, {arm[0]}, {last[arm]['states']}, {asked} facts, early stop"
                run.leave_out(name, f"{run.left:.0f} s were left, {last[arm]['seconds']:.0f} s are needed")


def _that_fit(
    run: Run, model: Loaded, arm: tuple[Method, bool], asked: int, before: dict[str, Any] | None
) -> int:
    """How many of some facts can be edited in the time left, by what fewer took; 0: none.

    On a GPU sixteen facts take little longer than one, so a few steps with as many facts as run together say
    what a fact takes among many.
    """
    if before is None:
        return asked
    most = min(run.left, run.minutes * 60 * ROW_SHARE)
    each = before["seconds_per_fact"]
    if each * asked <= most:
        return asked
    hparams = hparams_of(run, model.shape, *arm, v_num_grad_steps=PROBED)
    together = min(asked, hparams.facts_per_batch)
    if together > before["facts"] and before["seconds"] * PROBED / run.steps * together < 2 * most:
        began = run.clock()
        edited(model.adapter, requests_of(together), hparams)
        each = min(each, (run.clock() - began) / together * run.steps / PROBED)
        most = min(run.left, run.minutes * 60 * ROW_SHARE)
        if each * asked <= most:
            return asked
    facts = int(most / each) // 16 * 16
    name = f"{model.shape.name}, {arm[0]}, {before['states']}, {asked} facts"
    if facts > before["facts"]:
        run.leave_out(name, f"{facts} facts instead: {each:.2f} s a fact, and {most:.0f} s for a row")
        return facts
    run.leave_out(name, f"{each:.2f} s a fact, and {most:.0f} s for a row")
    return 0


# ---- EasyEdit's ROME ---------------------------------------------------------------------------------------
def easyedit(run: Run, model: Loaded) -> None:
    """EasyEdit's own ROME on the autoregressive shape, one fact after another, as it edits.

    It always ends at a loss of 0.05, which a random model does not reach. Of a model in half precision it
    makes v in float32 and then fails at the product with u, so that v is cast here.
    """
    import edit_speed

    from easyedit_mdm import register
    from easyedit_mdm.errors import EasyEditMDMError
    from easyedit_mdm.host.importing import host_module

    try:
        register()
    except EasyEditMDMError as error:
        run.leave_out("EasyEdit's ROME", str(error))
        return
    layers = model.shape.layers("ROME_MDM") or load_hparams(f"ROME_MDM/{model.shape.file}").layers
    theirs = edit_speed.theirs(model.adapter, "ROME", layers, "twins", steps=run.steps)
    module, dtype = host_module("models.rome.rome_main"), model.adapter.dtype
    make_v = module.compute_v

    def edit(requests: list[dict]) -> None:
        """One after another, each put back."""
        with mock.patch.object(module, "compute_v", lambda *a, **k: make_v(*a, **k).to(dtype)):
            theirs(requests, lambda group: None)

    edit(requests_of(1))
    last = None
    for asked in run.facts[:2]:
        facts = asked
        if last is not None:
            facts = min(asked, int(min(run.left, run.minutes * 60 * ROW_SHARE) / last))
        if facts < asked:
            run.leave_out(f"EasyEdit's ROME, {asked} facts", f"{facts} facts instead: {last:.1f} s a fact")
        if facts < 1 or (last is not None and facts == 1):
            continue
        with peak(run) as memory:
            began = run.clock()
            edit(requests_of(facts))
            seconds = run.clock() - began
        last = seconds / facts
        run.note(
            "edits", shape=model.shape.name, method="EasyEdit ROME", states="left_to_right", plain=True,
            stop="its own", facts=facts, asked=asked, seconds=seconds, seconds_per_fact=last,
            peak_bytes=memory["peak"], doctor_bytes=None, predicted_bytes=None,
        )  # fmt: skip


# ---- statistics, decoding ----------------------------------------------------------------------------------
def text_of(run: Run) -> Path:
    """The shipped text again and again: it is read for its tokens' number alone."""
    file = run.folder / "text.txt"
    if not file.exists():
        text = (SHIPPED / "twins.txt").read_text(encoding="utf-8")
        file.write_text(text * 40, encoding="utf-8")
    return file


@contextlib.contextmanager
def only_in_memory() -> Iterator[None]:
    """Statistics are collected without the hash of the model and the files, 16 GB and more, that a real run
    keeps them by: the weights are random.
    """
    with (
        mock.patch.object(statistics_store, "model_fingerprint", return_value="random"),
        mock.patch.object(statistics_store, "write"),
    ):
        yield


def statistics(run: Run, model: Loaded) -> None:
    """Second moments of the layers that MEMIT_MDM's file names: tokens a second, and the factors."""
    name, adapter = model.shape.name, model.adapter
    hparams = hparams_of(run, model.shape, "MEMIT_MDM", True)
    sites = [adapter.site(layer) for layer in hparams.layers]

    source, few = text_source(text_of(run)), 2048
    many = few * (2 if model.shape.small else 64 if run.left > 30 else 16)

    def took(work: Callable[[], Any]) -> float:
        """Seconds."""
        began = run.clock()
        work()
        return run.clock() - began

    took(lambda: collect(adapter, sites, source, CollectConfig(few)))
    first = took(lambda: collect(adapter, sites, source, CollectConfig(few)))
    with peak(run) as memory, only_in_memory():
        seconds = took(lambda: moments_for(adapter, sites, text_of(run), many, run.folder))
        moments = moments_for(adapter, sites, text_of(run), many, run.folder)  # kept since
    run.tokens[name] = many
    factors = took(lambda: [some.solve(torch.zeros(len(some.moment)), EPS) for some in moments])
    each = max(seconds - first, 1e-9) / (many - few)  # what does not grow with the tokens is told apart
    run.note(
        "statistics", shape=name, layers=hparams.layers, width=len(moments[0].moment), tokens=many,
        seconds=seconds, tokens_per_second=1 / each, fixed_seconds=max(first - each * few, 0.0),
        seconds_per_million=max(first - each * few, 0.0) + each * STATISTICS, factor_seconds=factors,
        peak_bytes=memory["peak"], sums_bytes=2 * 8 * len(sites) * len(moments[0].moment) ** 2,
    )  # fmt: skip


def decoding(run: Run, model: Loaded) -> None:
    """Tokens a second of the sampler: one prompt, and 16 at once, a token a step."""
    new = 8 if model.shape.small else 64
    for prompts in (1, 16):
        texts = [r["prompt"] for r in requests_of(prompts)]
        rows = [model.adapter.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        length = max(len(row) for row in rows)
        pad = model.adapter.ids.pad
        ids = torch.tensor([[pad] * (length - len(r)) + r for r in rows], device=model.adapter.device)
        mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows], device=ids.device)
        model.adapter.generate(ids, mask, max_new_tokens=new, steps=1)
        with peak(run) as memory:
            began = run.clock()
            model.adapter.generate(ids, mask, max_new_tokens=new, steps=new)
            seconds = run.clock() - began
        run.note(
            "decoding", shape=model.shape.name, prompts=prompts, new_tokens=new, steps=new, seconds=seconds,
            tokens_per_second=prompts * new / seconds, peak_bytes=memory["peak"],
        )  # fmt: skip


# ---- error and profile -------------------------------------------------------------------------------------
def error(run: Run, model: Loaded) -> None:
    """How far the update of a bf16 model lies from that of the same weights in float32."""
    hparams = hparams_of(run, model.shape, "ROME_MDM", True)
    with peak(run) as memory:
        (half,) = edited(model.adapter, requests_of(1), hparams)
        native = copy.deepcopy(model.adapter.native).float()
        spec, mask = model.adapter.spec.name, model.adapter.ids.mask
        whole = wrap_model(native, model.adapter.tokenizer, family=spec, mask_id=mask)
        (full,) = edited(whole, requests_of(1), hparams)
    near, exact = (edit.changes[0].dense().float().cpu() for edit in (half, full))
    weight = dict(model.adapter.native.named_parameters())[half.changes[0].name]
    before = weight.detach().clone()
    half.apply(model.adapter)
    written = (weight.detach() - before).float().cpu()
    half.revert(model.adapter)
    run.note(
        "error", shape=model.shape.name, method="ROME_MDM", steps=run.steps, peak_bytes=memory["peak"],
        update=float((near - exact).norm() / exact.norm()),
        cosine=float((near * exact).sum() / near.norm() / exact.norm()),
        norm_ratio=float(near.norm() / exact.norm()),
        written=float((written - near).norm() / near.norm()),
        reverted=bool(torch.equal(weight.detach(), before)),
    )  # fmt: skip


def profile(run: Run, model: Loaded) -> None:
    """Where the time of one edit goes: operations by their own time, and the share of the measured matrix
    speed.
    """
    hparams = hparams_of(run, model.shape, "ROME_MDM", True, v_num_grad_steps=PROFILED)
    requests = requests_of(16 if 16 in run.facts else 1)
    edited(model.adapter, requests, hparams)
    began = run.clock()
    edited(model.adapter, requests, hparams)
    seconds = run.clock() - began
    with FlopCounterMode(display=False) as counter:
        edited(model.adapter, requests, hparams)
    flops = counter.get_total_flops()
    speed = matrix_speed(run, model, **rows_of(model.adapter, requests, hparams))
    cuda = run.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with torch.profiler.profile(activities=activities) as found:
        edited(model.adapter, requests, hparams)
        run.clock()
    trace = run.out / "trace.json"
    found.export_chrome_trace(str(trace))
    kept = trace.stat().st_size <= TRACE_BYTES
    if not kept:
        trace.unlink()
    averages = found.key_averages()
    kernels = [e for e in averages if e.device_type != torch.autograd.DeviceType.CPU]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6 if cuda else None
    run.note(
        "profile", shape=model.shape.name, method="ROME_MDM", states="full_mask", facts=len(requests),
        steps=PROFILED, seconds=seconds, flops=flops, flops_per_second=flops / seconds, matrix_speed=speed,
        share_of_matrix_speed=flops / seconds / speed, device_busy_seconds=busy, trace_kept=kept,
        operations=_top(averages, cuda),
    )  # fmt: skip


def _top(averages: Any, cuda: bool, most: int = 15) -> list[dict[str, Any]]:
    """The operations with the most time of their own."""

    def own(event: Any) -> float:
        return event.self_device_time_total if cuda else event.self_cpu_time_total

    # kernels stand beside the operations that started them, whose own time they are
    operations = [e for e in averages if e.device_type == torch.autograd.DeviceType.CPU]
    total = sum(own(e) for e in operations) or 1.0
    first = sorted(operations, key=own, reverse=True)[:most]
    return [
        {"name": e.key[:60], "calls": e.count, "milliseconds": own(e) / 1e3, "share": own(e) / total}
        for e in first
    ]


def matrix_speed(run: Run, model: Loaded, rows: int, length: int, slots: int) -> float:
    """FLOP a second of the up-projection's product at the size of an edit's pass."""
    hidden, inner = model.size.hidden, model.size.inner
    made = {"device": model.adapter.device, "dtype": model.adapter.dtype}
    x, weight = torch.randn(rows * length, hidden, **made), torch.randn(inner, hidden, **made)
    seconds = []
    for _ in range(8):
        began = run.clock()
        torch.mm(x, weight.T)
        seconds.append(run.clock() - began)
    return 2.0 * rows * length * hidden * inner / sorted(seconds)[len(seconds) // 2]


PARTS: dict[str, Callable[[Run, Loaded], None]] = types.MappingProxyType(  # type: ignore[assignment]
    {
        "statistics": statistics, "edits": edits, "decoding": decoding, "profile": profile, "error": error,
        "easyedit": easyedit,
    }
)  # fmt: skip
