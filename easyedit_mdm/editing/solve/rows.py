"""From facts to the rows of one forward pass: contexts x states, padded, with what is read where and how it
weighs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.denoising import States
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.request import Prompt
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.geometry import right_padded, similar

_OPEN = 5_000  # the first draw of noise of a step's rows with an open canvas


@dataclass
class Rows:
    """Rows of one forward pass. Slots beyond a row's target weigh nothing.

    Attributes:
        ids, mask: the padded rows.
        canvas: where the target's slots begin, for each row.
        fact_at: the column where delta is added, for each row.
        at: positions that are read.
        tokens: the right token at each of them.
        weights: weight of each in its fact's loss; the weights of a fact sum to 1.
        fact: which fact a row belongs to.
        anchor: whether the row is its fact's KL anchor (read at its first slot).
        turn, period: a row counts at step t only if t mod period is turn; turn is -1 for rows that always
            count.
        reach: how much of delta arrives at each position, where it is optimised through the weights (with a
            last dimension, of every fact's delta, where the facts share one update); otherwise it is put in
            at `fact_at`.
    """

    ids: Int[Tensor, "rows length"]
    mask: Int[Tensor, "rows length"]
    canvas: Int[Tensor, " rows"]
    fact_at: Int[Tensor, " rows"]
    at: Int[Tensor, "rows slots"]
    tokens: Int[Tensor, "rows slots"]
    weights: Float[Tensor, "rows slots"]
    fact: Int[Tensor, " rows"]
    anchor: Bool[Tensor, " rows"]
    turn: Int[Tensor, " rows"]
    period: Int[Tensor, " rows"]
    reach: Float[Tensor, "rows length *facts"] | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def take(self, index: Int[Tensor, " some"] | Bool[Tensor, " rows"]) -> Rows:
        """Some of the rows."""
        return replace(
            self, **{name: value[index] for name, value in vars(self).items() if value is not None}
        )

    def cut(self, length: int, slots: int) -> Rows:
        """The first `length` columns, the rest being padding, and the first `slots` slots, the rest weighing
        nothing.
        """
        read = {name: getattr(self, name)[:, :slots] for name in ("at", "tokens", "weights")}
        reach = None if self.reach is None else self.reach[:, :length]
        return replace(self, ids=self.ids[:, :length], mask=self.mask[:, :length], reach=reach, **read)

    def aligned(self, pad: int) -> Rows:
        """Shifted so that `fact_at` is the same column in every row, with padding on the left; columns of
        mere padding are cut off.
        """
        assert self.reach is None, (
            "rows are shifted where what stands before the subject is kept, which the weights would change"
        )
        shift = self.fact_at.max() - self.fact_at
        length = int((self.mask.sum(1) + shift).max())
        source = torch.arange(length, device=shift.device) - shift[:, None]
        inside = (source >= 0) & (source < self.ids.shape[1])
        source = source.clamp(0, self.ids.shape[1] - 1)
        mask = self.mask.gather(1, source) * inside
        ids = torch.where(mask.bool(), self.ids.gather(1, source), pad)
        canvas, fact_at, at = self.canvas + shift, self.fact_at + shift, self.at + shift[:, None]
        return replace(self, ids=ids, mask=mask, canvas=canvas, fact_at=fact_at, at=at)

    def chunks(self, most: int, by_rest: bool = False) -> Iterator[tuple[Int[Tensor, " some"], int, int]]:
        """Rows of similar length, up to `most` at a time, as (numbers of the rows, columns they need, slots
        they need): little of a pass is padding.

        `by_rest`: what counts is the length from `fact_at` on.
        """
        whole, numbers = (
            self.mask.sum(1),
            torch.arange(1, self.weights.shape[1] + 1, device=self.weights.device),
        )
        read = ((self.weights != 0) * numbers).amax(1).clamp(min=1)  # an anchor's one slot weighs nothing
        # one transfer a step
        columns, rest, slots = torch.stack([whole, whole - self.fact_at, read]).tolist()
        for some in similar(rest if by_rest else columns, most, whole.device):
            yield (
                torch.tensor(some, device=whole.device),
                max(columns[i] for i in some),
                max(slots[i] for i in some),
            )

    def counting(self, step: int) -> Bool[Tensor, " rows"]:
        """Which rows count at a step."""
        return (self.turn < 0) | (step % self.period == self.turn)


class _Columns:
    """Rows while they are collected: a list for each field of `Rows`. Every row gets as many slots."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.values: dict[str, list] = {
            name: [] for name in Rows.__dataclass_fields__ if name not in ("mask", "reach")
        }

    def add(
        self,
        fact: int,
        prompt: Prompt,
        tail: Tensor,
        read: list[int],
        right: Tensor,
        weight: Tensor,
        anchor: bool = False,
        turn: int = -1,
        period: int = 1,
    ) -> None:
        """One row; slots it does not have are read at its first and weigh nothing."""
        fill = self.slots - len(read)
        right, weight = (torch.nn.functional.pad(values, (0, fill)) for values in (right, weight))
        at = read + [read[0]] * fill
        ids = torch.cat([prompt.ids, tail])
        row = (ids, len(prompt.ids), prompt.fact_at, at, right, weight, fact, anchor, turn, period)
        for name, value in zip(self.values, row):
            self.values[name].append(value)

    def rows(self, adapter: Adapter) -> Rows:
        """All of them, as tensors."""
        ids, mask = right_padded(self.values.pop("ids"), adapter.ids.pad, adapter.device)
        tensors = {
            name: (torch.stack(v) if isinstance(v[0], Tensor) else torch.tensor(v)).to(adapter.device)
            for name, v in self.values.items()
        }
        return Rows(ids=ids, mask=mask, **tensors)


def build_rows(
    adapter: Adapter,
    facts: dict[int, Fact],
    states: dict[int, list[tuple[tuple[int, ...], States]]],
    kl_position: str | None,
    dealt: bool = False,
    draw: int = 0,
) -> Rows:
    """Rows for some facts (by number), each in its states: contexts x states, and one anchor row a fact where
    `kl_position` says where it is read.

    In a causal model a row ends with the last token that a prediction is read from.

    Args:
        states: of each fact, beside the numbers of the contexts that they stand after; each context comes
            once, with an open canvas once for each canvas.
        dealt: state s stands in context c only at the steps t with (c + t) mod states = s, and weighs what
            the states of a step weigh together.
        draw: number of the first draw of noise; each row of a fact has one of its own.
    """
    read = [_read(group) for i in facts for _, group in states[i]]
    columns = _Columns(max(read, default=1))
    for i, fact in facts.items():
        for contexts, group in states[i]:
            _add_states(columns, adapter, i, fact, contexts, group, dealt, draw)
        if kl_position is not None:
            filler = torch.zeros(1, dtype=torch.long)
            stop = len(fact.anchor.ids) if kl_position == "slot" else fact.anchor.fact_at + 1
            anchor = replace(fact.anchor, ids=fact.anchor.ids[:stop])
            tail = adapter.behind(filler, torch.zeros(1, dtype=torch.bool), draw)
            columns.add(i, anchor, tail, [stop], filler, torch.zeros(1), anchor=True)
    return columns.rows(adapter)


def _add_states(
    columns: _Columns,
    adapter: Adapter,
    number: int,
    fact: Fact,
    contexts: tuple[int, ...],
    group: States,
    dealt: bool,
    draw: int,
) -> None:
    """A fact's rows: each of a group's states after each of some contexts; the rest is as in `build_rows`."""
    period, read = len(group.weights), _read(group)
    right = fact.target if group.tokens is None else group.tokens
    if group.tokens is not None:  # noise of its own
        draw += _OPEN
    for s, (revealed, scored, weight) in enumerate(zip(group.revealed, group.scored, group.weights)):
        shown = right if group.shown is None else group.shown[s]
        tails = [adapter.behind(shown, revealed, draw + s * len(fact.contexts) + c) for c in contexts]
        heavy = round(float(group.weights.sum()), 3) if dealt else weight  # 1, or with an open canvas 1/2
        share = scored[:read].float() * (heavy / scored.sum() / len(fact.contexts))
        for c, tail in zip(contexts, tails):
            prompt, turn = fact.contexts[c], (s - c) % period if dealt else -1
            at = list(range(len(prompt.ids), len(prompt.ids) + read))
            columns.add(number, prompt, tail, at, right[:read], share, turn=turn, period=period)


def _read(states: States) -> int:
    """How many slots are read: those up to the last that is scored in any state."""
    return int(states.scored.any(0).nonzero().max()) + 1
