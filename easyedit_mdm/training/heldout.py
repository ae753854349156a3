"""The curve: loss on held-out text by mask ratio, and how far the first slot is from the teacher."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from easyedit_mdm.training.blocks import Block, Noised, Rows, rows_of
from easyedit_mdm.training.corpus import Corpus, Piece
from easyedit_mdm.training.objective import Student, clean_part

RATIOS = (0.1, 0.3, 0.5, 0.8)


class HeldOut:
    """Fixed texts with fixed masks: each text is cut into blocks from a random start, and every block masked
    at every ratio.

    Args:
        count: texts of each kind (plain text, facts).
        full: everything before and in the block sees everything, instead of a causal context.
        causal: nothing is masked; the next token's loss alone is measured.
    """

    def __init__(
        self,
        corpus: Corpus,
        size: int,
        mask_id: int,
        count: int = 8,
        seed: int = 1,
        full: bool = False,
        causal: bool = False,
    ):
        rng = random.Random(seed)
        plain = Corpus({}, corpus.text, corpus.samples, corpus.tokenizer)
        facts = Corpus(corpus.facts, [], [], corpus.tokenizer)
        pieces = [plain.draw(rng) for _ in range(count)] if corpus.text else []
        pieces += [facts.draw(rng) for _ in range(count)] if any(corpus.facts.values()) else []
        self.rows = [_blocks_at_all_ratios(piece, size, rng, full) for piece in pieces]
        if causal:
            self.rows = [(Noised(text.ids, []), ()) for text, _ in self.rows]
        self.mask_id, self.causal = mask_id, causal

    @torch.no_grad()
    def measure(self, student: Student) -> dict[str, Any]:
        """Mean loss (nats) of masked slots after a block's first, by ratio.

        `next_token` and `teacher`: the loss of model and teacher over the clean tokens.
        """
        sums = {ratio: [0.0, 0] for ratio in RATIOS}
        first = torch.zeros(3, dtype=torch.float64)  # model's loss, teacher's loss, tokens
        for text, ratios in self.rows:
            rows = rows_of([[text]], self.mask_id).to(student.mask_row.device)
            states = student.hidden(rows)[0]
            scored = (rows.targets[0] >= 0).nonzero().flatten()
            log_probs = student.log_probabilities(states[scored - 1]).gather(
                -1, rows.targets[0][scored][:, None]
            )[:, 0]
            for loss, block in zip((-log_probs).tolist(), rows.blocks[0][scored].tolist()):
                entry = sums[ratios[block - 1]]
                entry[0], entry[1] = entry[0] + loss, entry[1] + 1
            first += _next_token(student, rows, states)
        losses = {f"{ratio:.0%}": total / max(1, n) for ratio, (total, n) in sums.items() if not self.causal}
        return {
            "loss": losses,
            "next_token": float(first[0] / first[2]),
            "teacher": float(first[1] / first[2]),
        }


def _next_token(student: Student, rows: Rows, states: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token losses of model and teacher over the clean columns, and their number."""
    clean = clean_part(rows)
    ids = clean.ids[0]
    at = ((rows.texts[0] > 0) & (rows.blocks[0] == 0)).nonzero().flatten()
    taught = student.hidden(clean, teacher=True)[0]
    teacher = student.log_probabilities(taught[:-1], teacher=True).gather(-1, ids[1:, None])
    own = student.log_probabilities(states[at][:-1]).gather(-1, ids[1:, None])
    return torch.tensor([-float(own.sum()), -float(teacher.sum()), len(ids) - 1], dtype=torch.float64)


def _blocks_at_all_ratios(
    piece: Piece, size: int, rng: random.Random, full: bool
) -> tuple[Noised, Sequence[float]]:
    """The text with its blocks at every ratio, and each block's ratio."""
    size = min(size, len(piece.ids) - 1)
    blocks, ratios = [], []
    for start in range(rng.randint(1, min(size, len(piece.ids) - size)), len(piece.ids) - size + 1, size):
        for ratio in RATIOS:
            masked = [slot > 0 and rng.random() < ratio for slot in range(size)]
            masked[0] = rng.random() < ratio
            if not any(masked[1:]):
                masked[rng.randrange(1, size)] = True
            shown = (False,) * start if full else ()  # one block, all of which sees itself
            blocks.append(Block(0 if full else start, (*shown, *masked)))
            ratios.append(ratio)
    return Noised(piece.ids, blocks), ratios
