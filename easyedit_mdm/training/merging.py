"""A base model and an adapter as one ordinary model folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from easyedit_mdm.common.files import (
    new_folder,
    opened_tensors,
    read_json,
    write_json,
    write_tensors,
    write_text,
)
from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.models.loading import read_config, weight_files
from easyedit_mdm.training.lora import MASK_ROW, PREFIX, read_adapter

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
EMBEDDING = "model.embed_tokens.weight"


def write_merged(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write the base with an adapter's change in its weights: a folder that `load_model` opens, in the base's
    own key names.

    `W + (alpha / rank) B A`, computed in float32 and kept in the base's dtype; the mask token's row of the
    embedding. An autoregressive control has no mask: its configuration is the base's.

    Args:
        base: folder of the base model.
        adapter: folder that `easyedit-mdm adapt` wrote.
        out: folder for the model; must not exist.

    Raises:
        CheckpointError: if the two do not belong together, or files are missing or broken.
        FileError: if the folder exists and is not empty, or cannot be written.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    tensors, settings = read_adapter(adapter)
    changes = _changes(tensors, settings)
    files = weight_files(base)
    missing = sorted(set(changes) - set(files))
    if missing:
        raise CheckpointError(
            f"the adapter in {adapter} changes {missing[0]!r}, which {base} does not have: "
            "is it another model's?"
        )
    card = settings["masked_diffusion"]
    masked = card.get("attention") != "causal"
    config = masked_config(read_config(base), settings) if masked else dict(read_config(base))
    if not masked:
        del changes[EMBEDDING]
    with new_folder(out) as part:
        for shard in sorted(set(files.values())):
            keys = [key for key, file in files.items() if file == shard]
            _write_shard(shard, keys, changes, card["mask_token_id"], part / shard.name)
        for name in (*TOKENIZER_FILES, "model.safetensors.index.json"):
            if (base / name).exists():
                shutil.copyfile(base / name, part / name)
        write_json(part / "config.json", config, indent=2)
        if masked:
            _name_mask(part / "tokenizer_config.json", card)
        write_text(part / "README.md", readme(card, read_config(base)["architectures"][0]))
    return out


def masked_config(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The base's `config.json` with what makes the model a masked one.

    Raises:
        CheckpointError: if the base is not autoregressive, or the adapter does not say what it makes of it.
    """
    card = settings.get("masked_diffusion")
    architecture = (base.get("architectures") or ["?"])[0]
    if not isinstance(card, dict) or "mask_token_id" not in card:
        raise CheckpointError(
            "the adapter does not say what it makes of its base: easyedit-mdm adapt did not write it"
        )
    if not str(architecture).endswith("ForCausalLM"):
        raise CheckpointError(
            f"the base's architecture is {architecture!r}: only an autoregressive model (...ForCausalLM) "
            "can be adapted"
        )
    section = {key: card[key] for key in ("attention", "block_size", "edges", "context", "logit_shift")}
    return {
        **base,
        "architectures": [architecture.replace("ForCausalLM", "ForMaskedDiffusion")],
        "mask_token_id": card["mask_token_id"],
        "masked_diffusion": section,
    }


def _changes(tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is added to each weight; for the embedding, what the mask's row becomes."""
    scale = settings["lora_alpha"] / settings["r"]
    changes: dict[str, Tensor] = {}
    for name, right in tensors.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            left = tensors.get(f"{stem}.lora_B.weight")
            if left is None:
                raise CheckpointError(f"the adapter has {name!r} and no lora_B beside it: get it again")
            changes[f"{stem.removeprefix(PREFIX)}.weight"] = scale * left.float() @ right.float()
    if MASK_ROW not in tensors:
        raise CheckpointError("the adapter has no row for the mask token: get it again")
    changes[EMBEDDING] = tensors[MASK_ROW].float()
    return changes


def _write_shard(
    shard: Path, keys: list[str], changes: Mapping[str, Tensor], mask_id: int, out: Path
) -> None:
    with opened_tensors(shard, CheckpointError, "a shard of a model") as stored:
        ready = {key: stored.get_tensor(key) for key in keys}
        metadata = stored.metadata()
    for key in ready.keys() & changes.keys():
        value, change = ready[key], changes[key]
        row = key == EMBEDDING  # of which only the mask's row changes
        if value.shape[1:] != change.shape[1:] or not (row or len(value) == len(change)):
            raise CheckpointError(
                f"{key!r} has shape {tuple(value.shape)}, the adapter's change {tuple(change.shape)}: "
                "another model's adapter"
            )
        if row:
            value = value.clone()
            value[mask_id] = change[0].to(value.dtype)
        else:
            value = (value.float() + change).to(value.dtype)
        ready[key] = value
    write_tensors(out, ready, metadata or {"format": "pt"})


def _name_mask(file: Path, card: Mapping[str, Any]) -> None:
    """Say in `tokenizer_config.json` which token is the mask, for samplers that ask the tokenizer."""
    if file.exists() and card.get("mask_token"):
        write_json(
            file,
            {
                **read_json(file, CheckpointError, "a tokenizer's configuration"),
                "mask_token": card["mask_token"],
            },
            indent=2,
        )


README = """# {title}

{base}, adapted to masked denoising by `easyedit-mdm adapt` (LoRA, merged). {attention} The logits are
shifted: the token at position j is predicted at position j - 1, as in Dream. The mask is token
    {mask_token_id} (`{mask_token}`).

| | |
| --- | --- |
| trained on | {tokens} tokens of text, {slots} masked slots, {steps} steps |
| licence | that of the base model |

Open it here:

```python
from easyedit_mdm import load_model

model = load_model("THIS_FOLDER")
ids = model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
print(model.tokenizer.decode(model.generate(ids, max_new_tokens=8{block_length})[0]))
```

In dLLM (https://github.com/ZHZisZZ/dllm): the weights are those of `{native}`, with its key names; load them
into that class, give it the attention mask that is described above, and pass `right_shift_logits=True` to the
sampler, which moves the logits one place to the right. Transformers' own `generate` does not write with it:
it would read the model as an autoregressive one.
"""
CONTROL = """# {title}

{base}, fine-tuned on the next token by `easyedit-mdm adapt --attention causal` (LoRA, merged): the control of
the masked models that are trained on the same text. It is an autoregressive model like its base, and opens
like it.

| | |
| --- | --- |
| trained on | {tokens} tokens of text, {steps} steps |
| licence | that of the base model |
"""
_ATTENTION = {
    "block": "The context is causal; the block of {block_size} tokens that is being written sees the "
    "context and itself both ways. "
    "The canvas's first column begins a block, and a block that is done becomes context.",
    "full": "Every token sees every other.",
}


def readme(card: Mapping[str, Any], native: str) -> str:
    """The README of a merged folder: what it is, and how to open it."""
    state = card.get("training") or {}
    if card["attention"] == "causal":
        return CONTROL.format(
            title=card.get("name") or "An autoregressive model",
            base=card.get("base") or "An autoregressive model",
            tokens=state.get("tokens", "?"),
            steps=state.get("step", "?"),
        )
    attention = _ATTENTION[card["attention"]].format(block_size=card["block_size"])
    block_length = f", block_length={card['block_size']}" if card["attention"] == "block" else ""
    return README.format(
        title=card.get("name") or "A masked diffusion model",
        base=card.get("base") or "An autoregressive model",
        attention=attention,
        mask_token_id=card["mask_token_id"],
        mask_token=card.get("mask_token"),
        tokens=state.get("tokens", "?"),
        slots=state.get("slots", "?"),
        steps=state.get("step", "?"),
        block_length=block_length,
        native=native,
    )
