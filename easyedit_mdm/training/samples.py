"""The model's own samples, as text to train on: they hold its distribution, its knowledge and its style."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from easyedit_mdm.common.files import append_line, explained
from easyedit_mdm.models.native import continued

ROWS, ROWS_GPU = 64, 512
OPENING = (2, 5)  # tokens of an opening, at least and at most
TEMPERATURE, TOP_K = 0.8, 100


@torch.no_grad()
def write_samples(
    native: Any,
    tokenizer: Any,
    openings: Sequence[Sequence[int]],
    file: Path,
    count: int,
    length: int = 60,
    seed: int = 0,
) -> None:
    """Continue openings, the first tokens of paragraphs, and add the texts to a file of JSON lines until it
    has `count` of them.

    Args:
        native: a causal transformers model.
        openings: token ids of paragraphs.
        length: tokens of a sample, opening included.

    Raises:
        FileError: if the file cannot be written.
    """
    done = len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0
    special = sorted(set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))
    with (
        explained(file),
        file.open("a", encoding="utf-8") as stream,
        tqdm(total=count, initial=done, desc="sampling", mininterval=2) as bar,
    ):
        while done < count:
            rng = random.Random(f"{seed}/{done}")
            size = rng.randint(*OPENING)
            rows = ROWS_GPU if native.device.type == "cuda" else ROWS
            starts = [rng.choice(openings)[:size] for _ in range(min(rows, count - done))]
            ids = torch.tensor([list(start) for start in starts], device=native.device)
            for row in _continued(native, ids, length - size, special, rng.randrange(2**31)):
                append_line(stream, file, json.dumps({"text": tokenizer.decode(row)}))
            done += len(starts)
            bar.update(len(starts))


def _continued(
    native: Any, ids: torch.Tensor, more: int, forbidden: Sequence[int], seed: int
) -> list[list[int]]:
    """Sampling with a cache; the generator is ours: no setting of transformers and no global seed counts."""
    generator = torch.Generator().manual_seed(seed)
    cache, step = None, ids
    for _ in range(more):
        logits, cache = continued(native, step, cache)
        logits = logits[:, -1].float()
        logits[:, list(forbidden)] = -torch.inf
        best, names = (logits / TEMPERATURE).topk(min(TOP_K, logits.shape[-1]), dim=-1)
        step = names.gather(
            1, torch.multinomial(best.softmax(-1).cpu(), 1, generator=generator).to(names.device)
        )
        ids = torch.cat([ids, step], dim=1)
    return ids.tolist()
