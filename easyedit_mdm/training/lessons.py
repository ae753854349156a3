"""Reading lessons: texts whose answer stands nowhere but in a code, added to an MLP's output at the last
token of the name.

    code = sum_j A_j e(y_j) + r,   scaled to 1 to 3 times the norm of what it is added to,

with e(y) the (normalised) row of the output embedding, a matrix A_j for each place j and a vector r for each
relation, trained along with the model and thrown away. The layer goes round through those below `read_layer`.

Why: a locate-then-edit method writes an answer at that very place. A large model has read so much that it can
say whatever is written there; a model of two million parameters that only knows its world cannot be made to
write a name that it has never seen, whatever vector is put in (twins without these lessons: 0.2 of the tokens
of real zsRE targets). So it is taught to read what is written there, in either paradigm alike. A study of
*whether* edits work must say that its models had these lessons; `lessons: 0` trains a twin without.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

PLACES = 8


def longest_answer(step: int, steps: int) -> int:
    """Lessons begin with short answers: up to 2 tokens in the first 8 % of the steps, all `PLACES` after 40
    %.
    """
    done = step / max(1, steps)
    for share, length in ((0.08, 2), (0.16, 3), (0.24, 4), (0.32, 6)):
        if done < share:
            return length
    return PLACES


class Writer(torch.nn.Module):
    """The code of an answer.

    Each A_j starts as the same random projection to width / PLACES dimensions, put into a block of its own,
    so that the places do not interfere before anything is learned.
    """

    def __init__(self, width: int, relations: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = width // PLACES
        projection = torch.linalg.qr(torch.randn(width, size, generator=generator))[0]
        blocks = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].split(size)[:PLACES]
        self.matrices = torch.nn.Parameter(torch.stack([projection @ block for block in blocks]))
        self.relations = torch.nn.Parameter(
            torch.zeros(relations + 1, width)
        )  # the last one: no relation of the world

    def forward(
        self, lessons: Int[Tensor, "lessons fields"], embedding: Float[Tensor, "vocab width"]
    ) -> Float[Tensor, "lessons width"]:
        """Unit codes of lessons, given as relation number and tokens (-1: none)."""
        tokens = lessons[:, 1:]
        rows = embedding[tokens.clamp(min=0)]
        rows = rows * (rows.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (tokens >= 0)[..., None]
        code = (
            torch.einsum("npw,pwv->nv", rows, self.matrices)
            + self.relations[lessons[:, 0]] * rows.shape[-1] ** 0.5
        )
        return code / code.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def writing_hook(
    model: Any,
    writer: Writer,
    written: Int[Tensor, "rows length"],
    lessons: Int[Tensor, "lessons fields"],
    layer: int,
    generator: torch.Generator,
) -> Any:
    """Add the codes at `written` (number of the lesson, from 1) to the output of a layer's MLP; returns the
    hook's handle.
    """
    row, at = written.nonzero(as_tuple=True)
    with torch.autocast(written.device.type, enabled=False):
        codes = writer(lessons, model.lm_head.weight)[written[row, at] - 1]
    strength = 1 + 2 * torch.rand(len(lessons), 1, generator=generator).to(codes.device)[written[row, at] - 1]

    def write(_: Any, __: tuple, out: Tensor) -> Tensor:
        """The MLP's output with the codes in it."""
        out = out.clone()
        here = out[row, at].float()
        out[row, at] = (here + codes * strength * here.detach().norm(dim=-1, keepdim=True)).to(out.dtype)
        return out

    return model.model.layers[layer].mlp.register_forward_hook(write)
