"""Loading checkpoints in the hub's own format into transformers' own classes, without remote code.

The weights are read from safetensors shards one tensor at a time, renamed by the family's rules, checked
against what the native class expects, and put where they belong; so the same code runs on transformers 4.46
to 5.x, where the hub's modelling files do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from easyedit_mdm.common.files import opened_tensors, read_json
from easyedit_mdm.errors import CheckpointError, EasyEditMDMError, ModelError
from easyedit_mdm.models.adapter import Adapter, special_ids
from easyedit_mdm.models.families import FAMILIES
from easyedit_mdm.models.mixture import put_in
from easyedit_mdm.models.native import build, tokenizer_classes, turn
from easyedit_mdm.models.recognise import detect
from easyedit_mdm.models.spec import FamilySpec, Made

_MOST = {
    "n_positions": 1 << 14,
    "num_attention_heads": 1 << 12,
    "n_head": 1 << 12,
}  # the largest that are believed; GPT-2 squares its positions
_SIZES = ("num_", "n_", "vocab", "hidden_s", "inter", "max_", "head")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def load_adapter(
    name_or_folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    family: str | None = None,
    mask_id: int | None = None,
    block: int | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
    name: str | None = None,
) -> Adapter:
    """Load a model natively.

    Args:
        name_or_folder: a folder with `config.json` and safetensors, or a hub id.
        device: where to put it; the CPU by default. Not together with `device_map`.
        dtype: torch dtype or its name; as stored (`torch_dtype` in the config) by default.
        device_map: `auto`, `balanced`, ... or a mapping, for several devices through accelerate. What it puts
            on the `disk` is read from the checkpoint whenever it is needed; an edit there is kept in memory.
        max_memory: memory a device, for `device_map`, as in accelerate.
        family: name of the family, where the folder does not tell.
        mask_id: the mask token's id, overriding config and tokenizer.
        block: tokens of a block, where the model is block-causal and its config does not say so (dLLM's
            `bd3lm` releases), or other than it says.
        revision: revision of a hub id.
        tokenizer: a tokenizer to use instead of the folder's.
        name: what to call the model in records; `name_or_folder` by default.

    Raises:
        CheckpointError: with what is missing, misshapen or unknown.
    """
    folder = find_folder(name_or_folder, revision)
    config = read_config(folder)
    files = weight_files(folder)
    spec = FAMILIES[family] if family else detect(config, files)
    attention, shift = spec.attention_of(config, block), spec.shift_of(config)
    model = _empty_model(spec, config, len(files))
    target = _dtype(dtype, config)
    places = _places(model, spec, device, device_map, max_memory, target)
    left = _fill(model, spec, config, files, target, places)
    if device_map is not None:
        from accelerate import dispatch_model

        try:
            model = dispatch_model(model, device_map=places, offload_index=left or None)
        except ValueError as error:  # older versions want something in memory
            raise ModelError(
                f"accelerate does not take this device_map ({error}): leave part of the model in memory, or"
                " install a newer accelerate"
            ) from error
    model.eval()
    tok = tokenizer if tokenizer is not None else load_tokenizer(folder, spec)
    settings = {**(config.get("text_config") or {}), **config}
    ids = special_ids(spec, settings, tok, model.get_input_embeddings().weight.shape[0], mask_id)
    adapter = Adapter(model, spec, ids, tok, str(name or name_or_folder), attention, shift)
    adapter.source = folder
    return adapter


def find_folder(name_or_folder: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or a snapshot of a hub id (downloaded if need be).

    Raises:
        CheckpointError: if it is neither.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if folder.is_absolute() or name.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"{name!r} is neither a folder, nor one of the package's twins, nor a hub id of the form"
            " owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        raise CheckpointError(
            f"{name!r} is not a folder here and could not be fetched from the hub ({type(error).__name__}:"
            f" {error}). Download it elsewhere and pass its folder."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        CheckpointError: if it is missing or not JSON.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json: is it a model in the hub's format?")
    return read_json(path, CheckpointError, "a model's configuration")


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, by the checkpoint's own key names.

    Raises:
        CheckpointError: if there are no safetensors, or the index names a file that is absent or broken.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = read_json(index, CheckpointError, "the index of a model's shards").get("weight_map")
        if not isinstance(table, dict) or not all(_is_shard(name) for name in table.values()):
            raise CheckpointError(
                f"{index}: weight_map should give, for each key, the name of a .safetensors file in this"
                " folder; get it again"
            )
        absent = sorted({shard for shard in table.values() if not (folder / shard).exists()})
        if absent:
            raise CheckpointError(f"{index} names shards that are not there: {', '.join(absent)}")
        return {key: folder / shard for key, shard in table.items()}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with opened_tensors(path, CheckpointError, "a readable safetensors file") as tensors:
            files.update(dict.fromkeys(tensors.keys(), path))
    if not files:
        raise CheckpointError(
            f"{folder} has no model*.safetensors (pickled .bin weights are not read: convert them first)"
        )
    return files


def _is_shard(name: Any) -> bool:
    """Whether this is the plain name of a file: nothing outside the folder is ever read."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and Path(name).name == name
        and name.isprintable()
    )


def _dtype(dtype: str | torch.dtype | None, config: Mapping[str, Any]) -> torch.dtype:
    dtype = dtype or config.get("torch_dtype") or config.get("dtype") or torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    named = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise CheckpointError(
            f"dtype {dtype!r} is not a floating-point torch dtype such as 'bfloat16' or 'float32'"
        )
    return named


def _empty_model(spec: FamilySpec, config: Mapping[str, Any], tensors: int | None = None) -> Any:
    """The native model with parameters on the meta device and real buffers (rotary frequencies are not in the
    files).
    """
    from accelerate import init_empty_weights

    _check_claims(spec, config, tensors)
    try:
        with init_empty_weights(include_buffers=False):
            model = build(spec.native, spec.native_config(config), spec.since, spec.ending)
            if spec.experts is not None:
                put_in(model, spec.paths.mlp, model.config.hidden_size, spec.experts(config))
        if spec.frequencies is not None:
            turn(model.get_submodule(spec.paths.backbone), spec.frequencies(config))
        return model
    except EasyEditMDMError:
        raise
    except KeyError as error:
        raise CheckpointError(f"config.json of a {spec.name} model lacks {error}") from error
    except Exception as error:  # whatever a wrong value leads to inside transformers
        raise CheckpointError(
            f"config.json does not describe a {spec.name} model ({type(error).__name__}: {error})"
        ) from error


def _check_claims(spec: FamilySpec, config: Mapping[str, Any], tensors: int | None) -> None:
    """Sizes that no file of so many tensors can have are refused before anything is built for them.

    Raises:
        CheckpointError: naming the entry.
    """
    try:
        claims = spec.native_config(config)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"config.json of a {spec.name} model lacks or misstates {error}") from error
    parts = [claims, *(value for value in claims.values() if isinstance(value, Mapping))]
    for name, value in [item for part in parts for item in part.items()]:
        most = _MOST.get(name, 10**7)
        if tensors is not None and name in ("num_hidden_layers", "n_layer"):
            most = tensors
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name.startswith(_SIZES):
            if not 0 < value <= most:
                raise CheckpointError(
                    f"config.json says {name}={value!r}, which must be above 0 and at most {most} for these"
                    " weights: get it again"
                )


def _device(wanted: str | torch.device) -> torch.device:
    """A device that is here.

    Raises:
        ModelError: for one that does not exist.
    """
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ModelError(
            f"device {str(wanted)!r} is none that torch knows: give cpu, cuda or cuda:1"
        ) from error
    found = torch.cuda.device_count() if device.type == "cuda" else None
    if found is not None and (device.index or 0) >= found:
        raise ModelError(
            f"device {str(wanted)!r} is not here: torch finds {found} GPUs. Give another --device"
        )
    return device


def _places(model, spec: FamilySpec, device, device_map, max_memory, dtype) -> dict[str, Any]:
    if device_map is None:
        return {"": _device(device or "cpu")}
    if device is not None:
        raise CheckpointError("give either device or device_map, not both")
    if not isinstance(device_map, str):
        return dict(device_map)
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    kept = [
        type(model.get_submodule(spec.paths.block.format(0))).__name__
    ]  # accelerate never cuts a block in two
    if device_map != "sequential":
        max_memory = get_balanced_memory(
            model,
            max_memory=max_memory,
            no_split_module_classes=kept,
            dtype=dtype,
            low_zero=device_map == "balanced_low_0",
        )
    return infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=kept, dtype=dtype)


def _fill(
    model: Any,
    spec: FamilySpec,
    config: Mapping[str, Any],
    files: Mapping[str, Path],
    dtype: torch.dtype,
    places: Mapping[str, Any],
) -> dict[str, dict[str, str]]:
    """Put the weights where they belong. What stays on the disk is returned, as accelerate asks for it."""
    from accelerate.utils import set_module_tensor_to_device

    expected = {name: tuple(p.shape) for name, p in kept(spec, model)}
    tied, made = tied_names(spec, model), _made(spec, config, expected)
    unused = "|".join((r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", *spec.unused))
    consumed = {key for key, _ in made.values()}
    table = {spec.native_name(key): key for key in files if key not in consumed}
    table = {name: key for name, key in table.items() if not re.search(unused, name)}
    table |= {name: key for name, (key, _) in made.items() if key in files}
    missing = sorted(set(expected) - set(table) - tied)
    unexpected = sorted(set(table) - set(expected) - tied)
    if missing or unexpected:
        raise CheckpointError(_mismatch(spec, missing, unexpected, table))
    where = {name: (table[name], files[table[name]]) for name in expected if name in table}
    left = {
        name: where.pop(name)
        for name, _ in model.named_parameters()
        if name in where and _place_of(name, places) == "disk"
    }
    _check_left(left, expected, made)
    for name, tensor in _tensors(where):
        if name in made:
            tensor = made[name][1](tensor)
        _check_shape(table[name], tuple(tensor.shape), name, expected[name])
        set_module_tensor_to_device(model, name, _memory_of(name, places), value=tensor, dtype=dtype)
    model.tie_weights()
    for path, module in model.named_modules():  # buffers that are computed, not stored
        for key, buffer in module.named_buffers(recurse=False):
            if buffer is not None:
                module._buffers[key] = buffer.to(_memory_of(f"{path}.{key}", places))
    kind = str(dtype).removeprefix("torch.")
    return {
        other: {"safetensors_file": str(left[name][1]), "weight_name": left[name][0], "dtype": kind}
        for name, other in _all_names(model)
        if name in left
    }


def _all_names(model: Any) -> Iterator[tuple[str, str]]:
    """(first name, name) of every parameter: tied ones have several."""
    first = {id(value): name for name, value in model.named_parameters()}
    for name, value in model.named_parameters(remove_duplicate=False):
        yield first[id(value)], name


def _check_shape(key: str, shape: tuple[int, ...], name: str, wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise CheckpointError(
            f"{key!r} has shape {shape}, but config.json makes {name!r} {wanted}: config and weights do not"
            " belong together"
        )


def _check_left(
    left: Mapping[str, tuple[str, Path]], expected: Mapping[str, tuple[int, ...]], made: Iterable[str]
) -> None:
    """What stays on the disk is read as it is, whenever it is needed.

    Raises:
        CheckpointError: for a tensor of another shape, or one that is made of the checkpoint's.
    """
    changed = sorted(set(left) & set(made))
    if changed:
        raise CheckpointError(
            f"device_map puts {len(changed)} parameters on the disk that are not in the checkpoint as the"
            f" model has them, such as {changed[0]}: they have to be in memory (max_memory)"
        )
    for name, (key, path) in left.items():
        with opened_tensors(path, CheckpointError, "a readable safetensors file") as tensors:
            _check_shape(key, tuple(tensors.get_slice(key).get_shape()), name, expected[name])


def kept(spec: FamilySpec, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds: the parameters, and of some families buffers."""
    yield from model.named_parameters()
    if spec.stored:
        for path, module in model.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                if key not in module._non_persistent_buffers_set:
                    yield f"{path}.{key}", buffer


def _made(spec: FamilySpec, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Made]:
    """The native parameters that are made of tensors with other shapes or orders."""
    tensors = {name: spec.made_of(config, name) for name in names}
    return {name: made for name, made in tensors.items() if made is not None}


def tied_names(spec: FamilySpec, model: Any) -> set[str]:
    """The parameters that are others', and that a checkpoint may leave out."""
    if not model.config.tie_word_embeddings:
        return set()
    names = dict(model.named_parameters(remove_duplicate=False))
    return {name for name in names if any(re.fullmatch(tied, name) for tied in spec.tied)}


def _tensors(table: Mapping[str, tuple[str, Path]]) -> Iterator[tuple[str, torch.Tensor]]:
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, (key, path) in table.items():
        by_file.setdefault(path, []).append((name, key))
    for path, wanted in by_file.items():
        with opened_tensors(path, CheckpointError, "a readable safetensors file") as tensors:
            stored = tensors.keys()
            absent = [key for _, key in wanted if key not in stored]
            if absent:
                raise CheckpointError(
                    f"{path} has no {absent[0]!r}, which the index says it has: get it again"
                )
        for name, key in wanted:
            with opened_tensors(path, CheckpointError, "a readable safetensors file") as tensors:
                value = tensors.get_tensor(key)
            yield name, value


def _place_of(name: str, places: Mapping[str, Any]) -> Any:
    best = max((p for p in places if p == "" or name == p or name.startswith(p + ".")), key=len, default=None)
    return torch.device("cpu") if best is None else places[best]


def _memory_of(name: str, places: Mapping[str, Any]) -> Any:
    """The same for what is never left on the disk."""
    place = _place_of(name, places)
    return "cpu" if place == "disk" else place


def _mismatch(spec: FamilySpec, missing: list[str], unexpected: list[str], table: Mapping[str, str]) -> str:
    parts = [f"the checkpoint does not fit a {spec.name} model"]
    if missing:
        parts.append(f"{len(missing)} parameters are missing, such as {', '.join(missing[:3])}")
    if unexpected:
        parts.append(
            f"{len(unexpected)} tensors have no place, such as {', '.join(table[n] for n in unexpected[:3])}"
        )
    return "; ".join(parts) + ". Is a shard absent, or is it another variant of the family?"


def load_tokenizer(folder: Path, spec: FamilySpec) -> Any:
    """The folder's tokenizer through transformers' own classes, or None if the folder has none.

    Raises:
        CheckpointError: if there are tokenizer files that no native class can read.
    """
    if not any((folder / f).exists() for f in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        return None
    if (folder / "tokenizer.json").exists():
        classes = tokenizer_classes([_named_class(folder), spec.tokenizer])
    else:
        classes = tokenizer_classes([spec.tokenizer])[:1]
    problems = []
    for cls in classes:
        try:
            tokenizer = cls.from_pretrained(str(folder))
        except Exception as error:  # the next class may read it; all reasons are told if none does
            problems.append(f"{cls.__name__}: {error}")
            continue
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        return tokenizer
    raise CheckpointError(f"no native tokenizer class reads {folder}: " + " | ".join(problems))


def _named_class(folder: Path) -> str | None:
    """The tokenizer class that `tokenizer_config.json` names, unless it comes with remote code."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    config = read_json(path, CheckpointError, "a tokenizer's configuration")
    name = config.get("tokenizer_class")
    return name if isinstance(name, str) and "auto_map" not in config else None
