"""Temporal effects: what is restored at one denoising step, and what the model writes in the steps after it.

As TimeROME-DLM's temporal indirect effect (arXiv 2606.12841): the subject is corrupted from step t on, one
state is restored at step t alone, and denoising goes on. At every step the surest masked slot is written,
with the token that the run itself prefers, right or wrong (LLaDA's low-confidence order at temperature 0), in
a block-causal model the surest of the open block. The final log-probability of the right object y is

    sum over the slots i masked at t of log p(y_i | prompt, canvas of this run at the step at which it writes
    slot i).

With one slot left it is the log-probability that is read at step t.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.tracing.restoring import Answer, Runs


def final(runs: Runs, answer: Answer, samples: Int[Tensor, " rows"] | None) -> Float[Tensor, " rows"]:
    """The final log-probability (nats, float64) of the right object in each row.

    Args:
        answer: what the runs' state says at the slots that are masked, restored or not.
        samples: the corruption that each row goes on under; None goes on clean.

    Rows that write the same token under the same corruption go on alike, and are run once.
    """
    rows = torch.arange(len(answer.right))
    first = answer.sure.argmax(1)
    canvas = runs.canvas.repeat(len(rows), 1)
    written = runs.read[first]
    canvas[rows, written] = answer.token[rows, first]
    owner = torch.zeros_like(rows) if samples is None else samples
    alike = torch.cat([owner[:, None], written[:, None], canvas], 1)
    different, place = torch.unique(alike, dim=0, return_inverse=True)
    after = _go_on(
        runs, different[:, 2:].clone(), different[:, 1], None if samples is None else different[:, 0]
    )
    return answer.right[rows, first].double() + after[place]


def _go_on(
    runs: Runs,
    canvas: Int[Tensor, "rows slots"],
    written: Int[Tensor, " rows"],
    samples: Int[Tensor, " rows"] | None,
) -> Float[Tensor, " rows"]:
    """Denoise canvases of equally many hidden slots, one of which is `written` by now, to their end; returns
    what the right tokens got where they were due.

    As many slots are revealed in one row as in another, so that the same block is open in all.
    """
    total = torch.zeros(len(canvas), dtype=torch.float64)
    rows = torch.arange(len(canvas))
    masked = torch.zeros_like(canvas, dtype=torch.bool)
    masked[:, runs.hidden] = True
    masked[rows, written] = False
    shown = canvas.shape[1] - len(runs.hidden)
    for k in range(shown + 1, canvas.shape[1]):
        answer = runs.answer(canvas, samples)
        inside = torch.tensor(runs.slots.inside(k))
        slot = answer.sure.masked_fill(~(masked & inside), -1.0).argmax(1)
        total += answer.right[rows, slot].double()
        canvas[rows, slot] = answer.token[rows, slot]
        masked[rows, slot] = False
    return total
