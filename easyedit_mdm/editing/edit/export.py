"""Edits in forms that others load: a LoRA adapter for `peft`, and a model folder in the hub's own format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_mdm.common.files import new_folder, opened_tensors, read_json, write_json, write_tensors
from easyedit_mdm.common.weights import Weights
from easyedit_mdm.editing.edit.change import Change, LowRank
from easyedit_mdm.editing.edit.opening import (
    Way,
    ways_to_open,
    write_adapter_readme,
    write_readme,
)
from easyedit_mdm.editing.edit.stack import PlainEdit, carried
from easyedit_mdm.errors import CheckpointError, EditError, MissingPackageError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.loading import weight_files

# other forms of the weights, which would go on holding the unedited ones, and what may run code when it is
# read
APPLIED = "applied.json"
_LEFT_OUT = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".safetensors",
)


def check_in_weights(edits: Sequence[PlainEdit], what: str) -> None:
    """A form that holds weights can hold no attachment.

    Raises:
        EditError: naming the edit's method.
    """
    for edit in edits:
        if edit.attached:
            raise EditError(
                f"an edit by {edit.card.get('method')} is not in the weights ({edit.attached[0].KIND}), so"
                f" {what} cannot hold it: save the edit itself (edit.save, --save), and apply it to the model"
                " where it is loaded"
            )


def to_peft(edit: PlainEdit, folder: str | Path) -> Path:
    """Write a LoRA adapter whose product is the edit: `adapter_config.json`, `adapter_model.safetensors`, and
    a README.md that says how to open it.

    `PeftModel.from_pretrained(native, folder)` loads it, where `native` is the transformers model of the
    base: for a masked model `adapter.native`, whose modules the adapter shares, so that its logits change
    with them. Every rank has its own alpha, so the scaling is 1; an exact change is written with the factors
    of its singular value decomposition.

    Raises:
        EditError: if the edit changes something that is not the weight of a linear map, or a weight that
            several modules share.
        MissingPackageError: without `peft`.
        FileError: if the folder exists and is not empty, or cannot be written.
    """
    check_in_weights([edit], "a LoRA adapter")
    try:
        from peft import LoraConfig
    except ImportError:
        raise MissingPackageError(
            "writing a LoRA adapter needs peft: pip install 'easyedit-mdm[peft]'"
        ) from None
    if edit.card.get("base", {}).get("paradigm") == "noised":
        raise EditError(
            "the edited weight is shared by two modules (an encoder's and a decoder's), and LoRA would change"
            " one of them: use export --merged"
        )
    factors = {_module(change): _factors(change) for change in edit.changes}
    ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most, lora_alpha=most, rank_pattern=others, alpha_pattern=dict(others),
        target_modules=sorted(factors), lora_dropout=0.0, bias="none",
        fan_in_fan_out=any(change.transposed for change in edit.changes), inference_mode=True,
        init_lora_weights=True,
        base_model_name_or_path=edit.card.get("base", {}).get("name"),
        task_type="CAUSAL_LM" if edit.card.get("base", {}).get("paradigm") == "causal" else None,
    )  # fmt: skip
    tensors = {}
    for name, (left, right) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = right
        tensors[f"base_model.model.{name}.lora_B.weight"] = left
    folder = Path(folder)
    with new_folder(folder) as part:
        write_tensors(part / "adapter_model.safetensors", tensors, {"format": "pt"})
        config.save_pretrained(str(part))
        write_adapter_readme(part, edit)
    return folder


def _module(change: Change) -> str:
    if not change.name.endswith(".weight"):
        raise EditError(
            f"{change.name} is not the weight of a linear map, and LoRA changes nothing else: use export"
            " --merged"
        )
    return change.name.removesuffix(".weight")


def _factors(change: Change) -> tuple[Tensor, Tensor]:
    """(outputs x rank, rank x inputs), in float32, each with its share of the norm."""
    if isinstance(change, LowRank):
        left, right = change.left.detach().double().cpu(), change.right.detach().double().cpu()
    else:
        matrix = change.delta.detach().double().cpu()
        left, values, right = torch.linalg.svd(matrix.T if change.transposed else matrix, full_matrices=False)
        kept = max(1, int((values > values.max() * 1e-9).sum()))
        left, right = left[:, :kept] * values[:kept], right[:kept]
    scale = (right.norm() / left.norm().clamp(min=1e-30)).sqrt().clamp(min=1e-15, max=1e15)
    return (left * scale).float(), (right / scale).float()


def write_model(
    adapter: Adapter, base: str | Path, folder: str | Path, more: Callable[[Path], None] | None = None
) -> Path:
    """Write a model as it is now as a folder in the hub's own format, laid out like the folder that it came
    from.

    Key names and shards are those of `base`, weights are in the dtype that the model is in, which
    `config.json` then names; tokenizer and other small files are copied. Weights in other formats (.bin,
    .gguf, ...) are left out: they would be the unedited ones.

    Args:
        more: writes what else is to be in the folder, called with it before it gets its name.

    Raises:
        CheckpointError: if `base` is not the folder of this model.
        EditError: if the model carries an edit that is not in its weights.
        FileError: if the folder exists and is not empty, or cannot be written.
    """
    check_in_weights(carried(adapter), "a model folder")
    base, folder = Path(base), Path(folder)
    shards: dict[Path, list[str]] = {}
    for key, file in weight_files(base).items():
        shards.setdefault(file, []).append(key)
    weights = Weights(adapter.native, every=True)
    with new_folder(folder) as part:
        total = sum(
            _write_shard(adapter, weights, file, keys, part / file.name) for file, keys in shards.items()
        )
        _copy_small(base, part)
        config = read_json(base / "config.json", CheckpointError, "a model's configuration")
        write_json(part / "config.json", {**config, **_dtype_fields(config, adapter)}, indent=2)
        index = base / "model.safetensors.index.json"
        if index.exists():
            table = read_json(index, CheckpointError, "the index of a model's shards")
            write_json(
                part / index.name,
                {**table, "metadata": {**(table.get("metadata") or {}), "total_size": total}},
                indent=2,
            )
        if more is not None:
            more(part)
    return folder


def write_merged(adapter: Adapter, base: str | Path, folder: str | Path) -> list[Way]:
    """`write_model`, with a README.md that says what was edited and how to open the folder. A README.md of
    the base is kept as README-base.md.

    Returns:
        the ways to open it.

    Raises:
        CheckpointError, FileError: see `write_model`.
    """
    ways: list[Way] = []

    def readme(part: Path) -> None:
        """Written before the folder gets its name, so that there is none without it."""
        config = read_json(part / "config.json", CheckpointError, "a model's configuration")
        ways.extend(ways_to_open(adapter, config, part))
        write_readme(part, carried(adapter), ways, adapter.name)

    write_model(adapter, base, folder, readme)
    return ways


def _write_shard(
    adapter: Adapter, weights: Mapping[str, Tensor], file: Path, keys: list[str], out: Path
) -> int:
    """One file of weights under the checkpoint's own names; what is no parameter is copied. Returns the bytes
    of its tensors.
    """
    tensors = {}
    with opened_tensors(file, CheckpointError, "a shard of a model") as stored:
        metadata = stored.metadata()
        for key in keys:
            value, name = stored.get_tensor(key), adapter.spec.native_name(key)
            if name in weights and tuple(weights[name].shape) != tuple(value.shape):
                shapes = f"{tuple(value.shape)}, the model's {name!r} {tuple(weights[name].shape)}"
                raise CheckpointError(f"{file}: {key!r} has shape {shapes}: another model's folder")
            tensors[key] = weights[name].detach() if name in weights else value
    write_tensors(out, {key: value.clone() for key, value in tensors.items()}, metadata or {"format": "pt"})
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _dtype_fields(config: Mapping[str, Any], adapter: Adapter) -> dict[str, str]:
    name = str(adapter.dtype).removeprefix("torch.")
    return {field: name for field in ("torch_dtype", "dtype") if field in config} or {"torch_dtype": name}


def _copy_small(base: Path, folder: Path) -> None:
    for file in sorted(base.iterdir()):
        if (
            file.is_file()
            and not file.name.startswith(".")
            and file.suffix not in _LEFT_OUT
            and file.name != APPLIED
            and ".bin." not in file.name
        ):
            shutil.copyfile(file, folder / file.name)
