"""Clean, corrupted and restored runs of one fact in one state of its answer (Meng et al., arXiv 2202.05262,
section 2.1).

The clean run reads the prompt as it is. The corrupted run cannot read the subject. A restored run is a
corrupted one in which, at chosen tokens, a layer's output (`hidden`), or the outputs of the MLPs or
attentions of a window of layers, are those of the clean run. What lies below the restored layers is that of
the corrupted run, so it is computed once, and a restored run starts where it is restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.denoising.states import Slots
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.hooks import changing_output, reading_output
from easyedit_mdm.tracing.corruption import Corruption
from easyedit_mdm.tracing.facts import Placed

KINDS = ("hidden", "mlp", "attention")


@dataclass(frozen=True)
class Answer:
    """What some runs say at the slots that are read, on the CPU.

    Attributes:
        right: log-probability (nats) of the right token of each slot.
        token: the token that would be written there.
        sure: its probability.
    """

    right: Float[Tensor, "rows slots"]
    token: Int[Tensor, "rows slots"]
    sure: Float[Tensor, "rows slots"]

    @property
    def joint(self) -> Float[Tensor, " rows"]:
        """Log-probability of all slots that are read, in float64: their sum."""
        return self.right.double().sum(1)


@dataclass
class Count:
    """Forward passes, and the rows that went through them."""

    passes: int = 0
    rows: int = 0


@contextmanager
def counting(adapter: Adapter) -> Iterator[Count]:
    """Count what enters the model's head inside the block; a pass that starts at a higher layer counts like a
    whole one.
    """
    count = Count()

    def add(out: Tensor) -> Tensor:
        """One pass."""
        count.passes += 1
        count.rows += len(out)
        return out

    with changing_output(adapter.module(adapter.spec.paths.head), add):
        yield count


class Runs:
    """All runs of one fact in one state.

    Args:
        revealed: which slots of the answer show their token (masked models); those of the open block that do
            not are read, all at once. An autoregressive model reads all slots, each after the right tokens
            before it.
        window: layers whose MLP or attention outputs are restored together.
        max_rows: rows of one forward pass; more are split, with the same result.

    Attributes:
        hidden: the slots that show no token; in a model without blocks they are those that are read.
        read: the slots that are read.
        slots: the answer's slots, by blocks.
        clean: the clean run's answer (one row).
        corrupted: the corrupted runs' (one row a sample).
    """

    def __init__(
        self,
        adapter: Adapter,
        placed: Placed,
        corruption: Corruption,
        revealed: Bool[Tensor, " slots"],
        window: int = 1,
        max_rows: int = 256,
    ):
        self.adapter, self.placed, self.corruption, self.window, self.max_rows = (
            adapter,
            placed,
            corruption,
            window,
            max_rows,
        )
        self.canvas = adapter.hidden.around(placed.answer, revealed) if adapter.denoises else placed.answer
        self.slots = Slots(adapter.attention.blocks(len(placed.ids), len(placed.answer)))
        self.hidden = (
            (~revealed).nonzero().flatten() if adapter.denoises else torch.arange(len(placed.answer))
        )
        inside = torch.tensor(self.slots.inside(int(revealed.sum())))
        self.read = (~revealed & inside).nonzero().flatten() if adapter.denoises else self.hidden
        self.clean = self._read_clean()
        self.corrupted = self._read_corrupted()

    @property
    def tokens(self) -> int:
        """Tokens that can be restored: all of the prompt, and the slots that anything is read after."""
        return self.placed.length if self.adapter.denoises else self.placed.length - 1

    def layers_of(self, kind: str, layer: int) -> range:
        """The layers that are restored together: for `hidden` the one, else the window about it, cut off at
        both ends (as ROME's).
        """
        if kind == "hidden":
            return range(layer, layer + 1)
        return range(
            max(0, layer - self.window // 2), min(self.adapter.layers, layer + (self.window + 1) // 2)
        )

    @torch.no_grad()
    def answer(self, canvas: Int[Tensor, "rows slots"], samples: Int[Tensor, " rows"] | None) -> Answer:
        """All slots of canvases of their own, after the corrupted prompts of some samples, or (None) after
        the clean one.
        """
        parts = []
        for start in range(0, len(canvas), self.max_rows):
            part = slice(start, start + self.max_rows)
            which = None if samples is None else samples[part]
            parts.append(self._run(which, torch.arange(canvas.shape[1]), canvas[part]))
        return _joined(parts)

    @torch.no_grad()
    def restored(
        self, kind: str, layer: int, where: Bool[Tensor, "rows length"], samples: Int[Tensor, " rows"]
    ) -> Answer:
        """Runs in which one kind of output is restored about a layer.

        Args:
            kind: one of `KINDS`.
            where: the tokens of each row at which it is restored; any number of them.
            samples: the corrupted run that each row starts from.
        """
        parts = []
        for start in range(0, len(where), self.max_rows):
            part = slice(start, start + self.max_rows)
            parts.append(self._restored(kind, self.layers_of(kind, layer), where[part], samples[part]))
        return _joined(parts)

    def _restored(self, kind: str, layers: range, where: Tensor, samples: Tensor) -> Answer:
        if kind == "hidden":
            mixed = self._mixed(
                self._corrupted_hidden[layers[0]][samples.to(self._corrupted_hidden[layers[0]].device)],
                kind,
                layers[0],
                where,
            )
            return self._run(samples, self.read, layer=layers[0] + 1, hidden=mixed)
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(
                    changing_output(
                        self._module(kind, layer), partial(self._mixed, kind=kind, layer=layer, where=where)
                    )
                )
            low = layers[0]
            hidden = (
                self._corrupted_hidden[low - 1][samples.to(self._corrupted_hidden[low - 1].device)]
                if low
                else None
            )
            return self._run(samples, self.read, layer=low, hidden=hidden)

    def _mixed(self, out: Tensor, kind: str, layer: int, where: Tensor) -> Tensor:
        """`out` with the clean run's values at `where`."""
        clean = self._clean_outputs[kind][layer].to(out.device, out.dtype)
        return torch.where(where.to(out.device)[..., None], clean, out)

    def _run(
        self,
        samples: Tensor | None,
        slots: Tensor,
        canvas: Tensor | None = None,
        layer: int = 0,
        hidden: Tensor | None = None,
    ) -> Answer:
        """Rows of one forward pass, read at `slots`; from the embedding, or from `layer` on given its
        input.
        """
        adapter = self.adapter
        rows = 1 if samples is None else len(samples)
        prompt = self.placed.ids[None] if samples is None else self.corruption.ids[samples]
        tail = self.canvas.expand(rows, -1) if canvas is None else canvas
        ids = torch.cat([prompt.expand(len(tail), -1), tail], 1).to(adapter.device)
        at = (len(self.placed.ids) + slots).expand(len(ids), -1).to(ids.device)
        with ExitStack() as stack:
            if samples is not None and hidden is None:
                stack.enter_context(self.corruption.at(adapter, samples))
            canvas = torch.full((len(ids),), len(self.placed.ids), device=ids.device)
            logits = adapter.token_logits(ids, None, at, layer=layer, hidden=hidden, canvas=canvas).float()
        return self._said(logits, slots)

    def _said(self, logits: Float[Tensor, "rows slots vocab"], slots: Int[Tensor, " slots"]) -> Answer:
        """Tokens that are never written (the mask, ids without a token) keep their share of the probability,
        as in decoding.
        """
        total = logits.logsumexp(-1)
        wanted = self.placed.answer[slots].to(logits.device).expand(len(logits), -1)
        right = logits.gather(-1, wanted[..., None])[..., 0] - total
        if self.adapter.masked:
            logits[..., self.adapter.ids.mask] = -torch.inf
        logits[..., self.adapter.vocabulary :] = -torch.inf
        best, token = logits.max(-1)
        return Answer(right.cpu(), token.cpu(), (best - total).exp().cpu())

    def _module(self, kind: str, layer: int) -> torch.nn.Module:
        paths = self.adapter.spec.paths
        return self.adapter.module(
            {"hidden": paths.block, "mlp": paths.mlp, "attention": paths.attention}[kind].format(layer)
        )

    @torch.no_grad()
    def _read_clean(self) -> Answer:
        with ExitStack() as stack:
            seen = {
                kind: [
                    stack.enter_context(reading_output(self._module(kind, i)))
                    for i in range(self.adapter.layers)
                ]
                for kind in KINDS
            }
            answer = self._run(None, self.read)
        self._clean_outputs = {
            kind: [outputs[0][0] for outputs in layers] for kind, layers in seen.items()
        }  # length x width
        return answer

    @torch.no_grad()
    def _read_corrupted(self) -> Answer:
        parts = []
        with ExitStack() as stack:
            seen = [
                stack.enter_context(reading_output(self._module("hidden", i)))
                for i in range(self.adapter.layers)
            ]
            for which in torch.arange(self.corruption.samples).split(self.max_rows):
                parts.append(self._run(which, self.read))
        self._corrupted_hidden = [torch.cat(outputs) for outputs in seen]  # samples x length x width
        return _joined(parts)


def _joined(parts: list[Answer]) -> Answer:
    return Answer(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("right", "token", "sure"))
    )
