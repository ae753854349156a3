"""`easyedit-mdm doctor`: what is here, what will not work, and what to do about it. No weights are loaded,
nothing is fetched.

What it looks for may be missing, torch included, so whatever needs more than Python and rich is imported
where it is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from easyedit_mdm.common.findings import Finding
from easyedit_mdm.common.versions import needed, tested_range
from easyedit_mdm.errors import EasyEditMDMError
from easyedit_mdm.version import __version__

if TYPE_CHECKING:
    from easyedit_mdm.models.sizes import ModelSize

OPTIONAL = {
    "peft": "LORA_MDM, and loading what `export --peft` writes",
    "datasets": "second moments of `datasets:NAME:CONFIG:SPLIT`",
    "sentencepiece": "tokenizers that come as tokenizer.model alone",
}
_MODULES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
LAYERS = 4  # that the shipped MEMIT_MDM files edit
GIB = 2**30
_MARKS = {"ok": "[green]✓[/]", "limited": "[yellow]![/]", "fails": "[red]✗[/]"}


def doctor(model: str | None = None, easyedit_home: str | None = None, file: str | None = None) -> bool:
    """Look, tell, and write the same to `file` as JSON.

    Returns:
        whether the package can edit a twin; a missing EasyEdit or a model too large for this machine do not
        change that.

    Raises:
        FileError: if `file` cannot be written.
    """
    report = examine(model, easyedit_home)
    _print_findings(report, Console())
    if file is not None:
        _write(file, report)
    return report["can_edit_a_twin"]


def examine(model: str | None = None, easyedit_home: str | None = None) -> dict[str, Any]:
    """Everything that `doctor` tells, as plain data: versions, `findings`, `devices` (bytes), `model`,
    `can_edit_a_twin`.
    """
    findings = [_package(name) for name in needed()]
    whole = all(finding.state != "fails" for finding in findings)
    findings += [_optional(name, use) for name, use in OPTIONAL.items()]
    available: list[dict[str, Any]] = []
    measured: dict[str, Any] | None = None
    if whole:  # the rest cannot be looked at without the packages
        more, available, measured = _beyond_packages(model, easyedit_home)
        findings += more
    return {
        "easyedit_mdm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "can_edit_a_twin": all(finding.state != "fails" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "devices": available,
        "model": measured,
    }


def _beyond_packages(
    model: str | None, easyedit_home: str | None
) -> tuple[list[Finding], list[dict[str, Any]], dict[str, Any] | None]:
    """What needs the packages: findings, devices, and the model's measures."""
    from easyedit_mdm.host.doctor import easyedit
    from easyedit_mdm.twins import TWINS

    findings = [*(_twin(name) for name in TWINS), easyedit(easyedit_home), _cache()]
    available = devices()
    if model is None:
        return findings, available, None
    measured, finding = _model(model, available)
    return [*findings, finding], available, measured


# ---- what is looked at -------------------------------------------------------------------------------------


def _package(name: str) -> Finding:
    """Whether a package is installed, can be imported, and has a version that was tested."""
    tested = tested_range(name)
    wanted = f'pip install "{name}{tested}"'
    try:
        version = importlib.metadata.version(name)
        importlib.import_module(_MODULES.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", "fails", wanted)
    except Exception as error:  # a broken installation may raise anything
        state = f"installed, but importing it fails: {type(error).__name__}: {error}"
        return Finding(name, state, "fails", f"install it again: {wanted}")
    least = next((s.version for s in tested if s.operator == ">="), None)
    if least is not None and Version(version) < Version(least):
        return Finding(name, f"{version}, older than {least}", "fails", wanted)
    if not tested.contains(Version(version).public, prereleases=True):
        cure = f"this version is newer than what was tested; if something fails: {wanted}"
        return Finding(name, f"{version}, outside the tested range {tested}", "limited", cure)
    return Finding(name, version)


def _optional(name: str, needed_for: str) -> Finding:
    finding = _package(name)
    if finding.state != "fails":
        return finding
    return replace(finding, state="limited", cure=f"{needed_for} will not work: {finding.cure}")


def _twin(name: str) -> Finding:
    """Whether a twin's files are whole and the installed transformers can build it."""
    from easyedit_mdm.models.sizes import model_size
    from easyedit_mdm.twins import twin_folder

    try:
        size = model_size(twin_folder(name))
    except EasyEditMDMError as error:
        return Finding(name, str(error), "fails", "install the package again: the twins' files belong to it")
    return Finding(name, f"{size.parameters:,} parameters, {size.layers} layers")


def _cache() -> Finding:
    """Whether second moments can be kept: the nearest folder that exists must take files."""
    from easyedit_mdm.statistics.store import cache_folder

    folder = cache_folder()
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if nearest.is_dir() and _writable(nearest):
        return Finding("statistics' folder", str(folder))
    return Finding(
        "statistics' folder",
        f"{folder} cannot be written",
        "limited",
        "set EASYEDIT_MDM_CACHE, or stats_dir, to a folder of your own",
    )


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# ---- devices and the model ---------------------------------------------------------------------------------


def devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator, with total and free memory in bytes."""
    import torch

    available = [
        {"device": "cpu", "name": f"{platform.machine()}, {torch.get_num_threads()} threads", **_memory()}
    ]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        available.append(
            {"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i), "total": total, "free": free}
        )
    return available


def _memory() -> dict[str, int]:
    """Memory of the machine, or of the container where that is less."""
    import psutil  # accelerate's own requirement

    memory = psutil.virtual_memory()
    limits = [int(text) for text in (_read(Path("/sys/fs/cgroup/memory.max")),) if text.isdigit()]
    used = [int(text) for text in (_read(Path("/sys/fs/cgroup/memory.current")),) if text.isdigit()]
    if not limits or not used:
        return {"total": memory.total, "free": memory.available}
    return {"total": min(memory.total, *limits), "free": min(memory.available, max(0, limits[0] - used[0]))}


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _model(name: str, available: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, Finding]:
    """A model's measures, what editing it takes by dtype, and whether a device has that."""
    from easyedit_mdm.models.sizes import DTYPES, model_size
    from easyedit_mdm.twins import TWINS, twin_folder

    try:
        size = model_size(twin_folder(name) if name in TWINS else name)
    except EasyEditMDMError as error:
        return None, Finding(
            f"model {name}", str(error), "limited", "this model cannot be edited here as it is"
        )
    needs = {dtype: need(size, dtype) for dtype in DTYPES}
    fits = {
        dtype: [d["device"] for d in available if _fits(d, available[0], needs[dtype])] for dtype in DTYPES
    }
    measured = {"name": name, **asdict(size), "bytes": needs, "fits": fits}
    summary = f"{size.family}, {size.parameters:,} parameters in {size.dtype} ({size.source})"
    own = "float32" if name in TWINS else size.dtype if size.dtype in DTYPES else "float32"
    if fits[own]:
        return measured, Finding(f"model {name}", summary)
    return measured, Finding(f"model {name}", summary, "limited", _cure(own, needs, fits))


def need(size: ModelSize, dtype: str) -> dict[str, int]:
    """Bytes that editing takes in one dtype: weights and activations on the device, statistics of `LAYERS`
    layers on the CPU.
    """
    return {
        "weights": size.weights(dtype),
        "activations": size.activations(dtype),
        "statistics": size.statistics(LAYERS),
    }


def _fits(device: dict[str, Any], cpu: dict[str, Any], needed: dict[str, int]) -> bool:
    on_device = needed["weights"] + needed["activations"]
    if device is cpu:
        return on_device + needed["statistics"] <= cpu["free"]
    return on_device <= device["free"] and needed["statistics"] <= cpu["free"]


def _cure(own: str, needs: dict[str, dict[str, int]], fits: dict[str, list[str]]) -> str:
    smaller = next((dtype for dtype in needs if fits[dtype]), None)
    if smaller is not None:
        return f"no device here has room for it in {own}: load it with dtype {smaller}, on {fits[smaller][0]}"
    least = min(needs.values(), key=lambda n: n["weights"])
    return (
        "no device here has room for it: it takes about"
        f" {(least['weights'] + least['activations']) / GIB:.0f} GiB in half precision and"
        f" {least['statistics'] / GIB:.0f} GiB of main memory for statistics (ROME_MDM without them: none)."
        f" Lower max_rows (activations shrink with it; the weights alone are {least['weights'] / GIB:.0f}"
        " GiB), or spread it over several GPUs, in Python: load_model(..., device_map='auto')"
    )


def _write(file: str, report: dict[str, Any]) -> None:
    try:
        from easyedit_mdm.common.files import write_json
    except ImportError:  # it stands on torch, which is what is missing
        Path(file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    else:
        write_json(file, report)


# ---- telling -----------------------------------------------------------------------------------------------


def _print_findings(report: dict[str, Any], console: Console) -> None:
    console.print(
        f"easyedit_mdm {report['easyedit_mdm']}, Python {report['python']}, {report['platform']}",
        highlight=False,
    )
    for finding in report["findings"]:
        console.print(
            f"{_MARKS[finding['state']]} [bold]{escape(finding['subject'])}[/]: {escape(finding['found'])}",
            highlight=False,
        )
        if finding["cure"]:
            console.print(f"    → {escape(finding['cure'])}", highlight=False)
    if report["devices"]:
        console.print(_devices_table(report["devices"]))
    if report["model"] is not None:
        console.print(_model_table(report["model"]))
    bad = "[red]The package cannot edit a twin: mend what is marked ✗.[/]"
    console.print("[green]The package can edit a twin.[/]" if report["can_edit_a_twin"] else bad)


def _devices_table(available: list[dict[str, Any]]) -> Table:
    table = Table("device", "name", "memory", "free")
    for device in available:
        table.add_row(
            device["device"],
            escape(device["name"]),
            *(f"{device[key] / GIB:.1f} GiB" for key in ("total", "free")),
        )
    return table


def _model_table(model: dict[str, Any]) -> Table:
    table = Table(
        title=(
            f"{escape(model['name'])}: what editing takes, in GiB (activations are an estimate; statistics"
            f" are of {LAYERS} layers)"
        )
    )
    for column in ("dtype", "weights", "activations", "statistics", "fits"):
        table.add_column(column)
    for dtype, parts in model["bytes"].items():
        table.add_row(
            dtype,
            *(f"{size / GIB:.2f}" for size in parts.values()),
            ", ".join(model["fits"][dtype]) or "nowhere here",
        )
    return table
