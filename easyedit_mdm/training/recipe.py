"""How a model is adapted, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a model is adapted.

    Attributes:
        attention: `block`, or `full` (see `easyedit_mdm.training.blocks.opening`); `causal` is their control:
            the base stays autoregressive, and is trained on the next token of the same texts.
        block_size: tokens that are written together, B; those to begin with where attention becomes full.
        lr: highest rate; it rises over the first 3 % of the tokens and falls along a cosine.
        rows, length: rows of a step, and their columns (clean and noisy).
        kl_weight, taught: see `easyedit_mdm.training.objective.losses`.
        precision: of the products, `float32` or `bfloat16`; None: bfloat16 on a GPU, float32 elsewhere.
            Trained tensors and sums stay in float32.
    """

    attention: str = "block"
    block_size: int = 8
    lora_rank: int = 32
    lr: float = 3e-4
    rows: int = 1
    length: int = 256
    kl_weight: float = 2.0
    taught: float = 0.25
    seed: int = 0
    precision: str | None = None
