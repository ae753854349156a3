"""LoRA layers in a model, its mask token, and the adapter's files in peft's format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_mdm.common.files import read_json, read_tensors, write_json, write_tensors
from easyedit_mdm.errors import CheckpointError, MissingPackageError, ModelError
from easyedit_mdm.training.objective import Student

PREFIX = "base_model.model."
MASK_ROW = (
    PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta"
)  # the row itself, in spite of its name
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CARD = "masked_diffusion.json"  # not in adapter_config.json: peft warns of keys that it does not know


def mask_token_of(tokenizer: Any, wanted: str | None = None) -> int:
    """The id of the token that becomes the mask: `wanted`, the tokenizer's own mask token, or an unused
    special token.

    Unused: among the added special tokens, the last that is not beginning, end, padding or unknown, and not
        in the chat template.

    Raises:
        ModelError: if there is none, or `wanted` is not in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary:
            raise ModelError(f"{wanted!r} is not a token of the vocabulary: give another --mask-token")
        return int(vocabulary[wanted])
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    chat = json.dumps(getattr(tokenizer, "chat_template", None) or "")
    free = [
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and i not in named and token.content not in chat
    ]
    if not free:
        raise ModelError(
            "the tokenizer has no unused special token that could become the mask: name one with --mask-token"
        )
    return int(max(free))


def student_of(native: Any, mask_id: int, rank: int, seed: int = 0) -> tuple[Student, dict[str, Tensor]]:
    """A transformers model with LoRA on all its linear maps, its own weights frozen.

    Returns:
        the student, and its trained tensors by name: LoRA's, and `mask_row`.

    Raises:
        MissingPackageError: without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackageError(
            "adapt trains LoRA layers with peft, which is not installed: pip install peft"
        ) from error
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        model = get_peft_model(native, config)
    row = torch.nn.Parameter(native.get_input_embeddings().weight.detach().float().mean(0))
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Student(model, row, mask_id, model.disable_adapter), {**tensors, "mask_row": row}


def write_adapter(out: Path, student: Student, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write an adapter that peft reads: LoRA's matrices and the mask token's row, in bfloat16.

    Args:
        card: what the adapter makes of its base, for `masked_diffusion.json`; its `base` names the base
            model.

    Raises:
        FileError: if it cannot be written.
    """
    config = student.model.peft_config["default"]
    out.mkdir(parents=True, exist_ok=True)
    ready = {name.replace(".default.", "."): value for name, value in tensors.items() if name != "mask_row"}
    ready[MASK_ROW] = student.mask_row[None]
    write_tensors(
        out / WEIGHTS,
        {name: value.detach().to(torch.bfloat16) for name, value in ready.items()},
        {"format": "pt"},
    )
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": card.get("base"),
        "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "target_modules": sorted(config.target_modules),
        "trainable_token_indices": {"embed_tokens": [student.mask_id]},
    }  # fmt: skip
    write_json(out / CONFIG, settings, indent=2)
    write_json(out / CARD, card, indent=2)


def load_lora(folder: Path, student: Student, tensors: dict[str, Tensor]) -> None:
    """Put an adapter's matrices and mask row into a student.

    Raises:
        CheckpointError: if it belongs to another model or rank.
    """
    stored, _ = read_adapter(folder)
    row = stored.pop(MASK_ROW)
    names = {name.replace(".default.", "."): name for name in tensors if name != "mask_row"}
    if set(stored) != set(names) or any(
        stored[short].shape != tensors[name].shape for short, name in names.items()
    ):
        raise CheckpointError(
            f"the adapter in {folder} belongs to another model or rank: look at its {CONFIG}"
        )
    with torch.no_grad():
        for short, name in names.items():
            tensors[name].copy_(stored[short])
        student.mask_row.copy_(row[0])


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors, by the names that peft writes, and its configuration, with the card as
    `masked_diffusion`.

    Raises:
        CheckpointError: if files are missing or broken.
    """
    tensors, _ = read_tensors(folder / WEIGHTS, CheckpointError, "a LoRA adapter")
    settings = read_json(folder / CONFIG, CheckpointError, "a LoRA adapter's configuration")
    card = read_json(folder / CARD, CheckpointError, "what easyedit-mdm adapt says about its adapter")
    return tensors, {**settings, "masked_diffusion": card}


def adapter_digest(folder: Path) -> str:
    """Twelve digits that tell adapters apart."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:12]
