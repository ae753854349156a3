"""Rows for block-causal training: the clean text and noisy blocks of it, in one pass.

A row holds *columns*. Clean columns are a text as the model reads a prompt: each sees those before it. A
noisy block stands for tokens `start .. start + n - 1` of its text, some of them masked: its columns see the
clean tokens before `start`, and each other. So the context is computed causally, as in generation, and one
clean copy serves any number of blocks, at any start. Several texts share a row; none sees another, and
positions start at 0 in each.

On the way to full attention (`opening`) blocks grow, and then the context opens: a noisy copy of the whole
text takes the place of the blocks. Its columns have ranks, and each sees those whose rank is not above its
own: stretches of the context that see themselves both ways, ever longer ones, until all have one rank. The
clean copy stays causal, for the teacher.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.training.corpus import Piece

ANSWER_ALONE = 0.5  # of the blocks at an answer: the masks are the answer's
EXACT = 0.6  # of those: the block is the answer and nothing else, as a canvas of exactly N masks is
SHORT = 0.2  # of the other blocks: shorter than the block size, as the last block of a canvas may be
PREFIX = (
    0.2  # of the blocks: everything from some slot on is masked, the state that left-to-right decoding meets
)
NOISY_SHARE = 2.0  # noisy columns for each clean one


@dataclass(frozen=True)
class Block:
    """A noisy block: tokens `start .. start + len(masked) - 1` of a text, and which of them are masked.

    `ranks`: see `Rows`; None: all 0.
    """

    start: int
    masked: tuple[bool, ...]
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Noised:
    """A text and its noisy blocks."""

    ids: list[int]
    blocks: list[Block]

    @property
    def columns(self) -> int:
        """Columns that it takes in a row."""
        return len(self.ids) + sum(len(block.masked) for block in self.blocks)


@dataclass
class Rows:
    """Packed rows, each rows x length.

    Attributes:
        ids: what the model reads.
        positions: position of the token in its text.
        texts: number of the text in its row, from 1; 0 is padding.
        blocks: number of the noisy block in its row, from 1; 0 for clean columns.
        starts: where its block starts; for clean columns, its own position.
        ranks: inside a noisy block, each sees those whose rank is not above its own.
        targets: the token that stands there, for masked slots after a block's first; -1 elsewhere.
        weights: weight of that slot: 1 / number of such slots of its block.
        teachers: column of the clean token before it, where the slots on its left all show and those on its
            right do not: what stands there is what the teacher says of the next token; -1 elsewhere.
    """

    ids: Int[Tensor, "rows length"]
    positions: Int[Tensor, "rows length"]
    texts: Int[Tensor, "rows length"]
    blocks: Int[Tensor, "rows length"]
    starts: Int[Tensor, "rows length"]
    ranks: Int[Tensor, "rows length"]
    targets: Int[Tensor, "rows length"]
    weights: Float[Tensor, "rows length"]
    teachers: Int[Tensor, "rows length"]

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(**{name: value.to(device) for name, value in vars(self).items()})

    def __len__(self) -> int:
        return self.ids.shape[0]


def visible(rows: Rows) -> Bool[Tensor, "rows length length"]:
    """Who sees whom: `[r, q, k]` says whether column q sees column k. Padding sees itself: no softmax is
    empty.
    """
    text_q, text_k = rows.texts[:, :, None], rows.texts[:, None, :]
    block_q, block_k = rows.blocks[:, :, None], rows.blocks[:, None, :]
    # a clean column's own position counts as seen, a block's first position does not: inside the block its
    # own copy stands for it
    before = rows.positions[:, None, :] < rows.starts[:, :, None] + (block_q == 0).long()
    inside = (block_q == block_k) & (rows.ranks[:, None, :] <= rows.ranks[:, :, None])
    seen = (text_q == text_k) & (text_q > 0) & torch.where(block_k == 0, before, inside)
    return seen | torch.eye(rows.ids.shape[1], dtype=torch.bool, device=seen.device)


def additive(
    seen: Bool[Tensor, "rows length length"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows 1 length length"]:
    """`seen` as a mask to add to attention scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )[:, None]


def noise(piece: Piece, size: int, rng: random.Random) -> Noised:
    """Noisy blocks of a text: one at each answer, and more at random starts, about `NOISY_SHARE` columns a
    clean one.

    A block's first slot is predicted from the clean token before it, as in the teacher: no masks are spent on
    it alone.
    """
    blocks = [block for at, n in piece.answers if (block := _at_answer(len(piece.ids), at, n, size, rng))]
    while sum(len(b.masked) for b in blocks) < NOISY_SHARE * len(piece.ids) - size / 2:
        length = min(size, len(piece.ids) - 1)
        if rng.random() < SHORT:
            length = rng.randint(2, length)
        start = rng.randint(1, len(piece.ids) - length)
        blocks.append(Block(start, _masks(length, range(length), rng)))
    return Noised(piece.ids, blocks)


def _at_answer(length: int, at: int, n: int, size: int, rng: random.Random) -> Block | None:
    n = min(n, size)
    start, stop = at, at + n
    if n == 1 or rng.random() >= EXACT:
        start = max(1, at - rng.randint(0 if n > 1 else 1, max(1, size - n)))
        stop = min(length, max(start + size, at + n))
    if stop - start < 2:
        return None
    alone = rng.random() < ANSWER_ALONE or (start, stop) == (at, at + n)
    return Block(
        start, _masks(stop - start, range(at - start, at - start + n) if alone else range(stop - start), rng)
    )


def _masks(length: int, among: Sequence[int], rng: random.Random) -> tuple[bool, ...]:
    """k ~ U{1..n} of the n slots `among`, at least one of them not the block's first."""
    k = rng.randint(1, len(among))
    chosen = set(among[-k:] if rng.random() < PREFIX else rng.sample(among, k))
    if chosen == {0}:
        chosen = {0, rng.choice(among[1:])} if len(among) > 1 else {rng.randrange(1, length)}
    return tuple(slot in chosen for slot in range(length))


@dataclass
class _Row:
    """A row that is being filled: lists for the fields of `Rows`."""

    length: int
    texts: int = 0
    blocks: int = 0
    fields: dict[str, list] = field(default_factory=lambda: {name: [] for name in Rows.__dataclass_fields__})

    @property
    def room(self) -> int:
        """Columns that are left."""
        return self.length - len(self.fields["ids"])

    def add(self, noised: Noised, mask_id: int) -> None:
        """Put in a text, and its blocks as they are hidden."""
        self.texts += 1
        first, n = len(self.fields["ids"]), len(noised.ids)
        self._extend(noised.ids, range(n), range(n), 0, [0] * n, [-1] * n, [0.0] * n, [-1] * n)
        for block in noised.blocks:
            self.blocks += 1
            own = noised.ids[block.start : block.start + len(block.masked)]
            scored = [hidden and slot > 0 for slot, hidden in enumerate(block.masked)]
            weight = 1 / max(1, sum(scored))
            lead = block.masked.index(True)
            # whoever sees whom: what follows a prefix is what the teacher says of the next token
            taught = lead if lead > 0 and all(block.masked[lead:]) else -1
            self._extend(
                [mask_id if hidden else token for token, hidden in zip(own, block.masked)],
                range(block.start, block.start + len(own)),
                [block.start] * len(own),
                self.blocks,
                block.ranks or [0] * len(own),
                [token if s else -1 for token, s in zip(own, scored)],
                [weight * s for s in scored],
                [first + block.start + slot - 1 if slot == taught else -1 for slot in range(len(own))],
            )

    def _extend(self, ids, positions, starts, block, ranks, targets, weights, teachers) -> None:
        n = len(ids)
        values = (ids, positions, [self.texts] * n, [block] * n, starts, ranks, targets, weights, teachers)
        for name, value in zip(self.fields, values):
            self.fields[name].extend(value)


@dataclass(frozen=True)
class Opening:
    """How far attention is open.

    Attributes:
        block: tokens of a block.
        context: tokens of a stretch of context that sees itself both ways; 1: causal, and blocks with a clean
            context are read.
        full: share of the texts in which everything sees everything.
    """

    block: int
    context: int = 1
    full: float = 0.0


def opening(done: float, attention: str, block_size: int) -> Opening:
    """How far attention is open after a share `done` of the training.

    `block`: blocks of `block_size` from the first step to the last. `full`: blocks of 8, 16, 32 in the first
        30 %; then the
    context opens in stretches of 2, 4, 8, ...; full texts come in from 45 % on, and from 70 % on there are no
    others.
    """
    if attention == "block":
        return Opening(block_size)
    if done < 0.3:
        return Opening(block_size * 2 ** int(done * 10))
    stretch = 2 ** (1 + int((done - 0.3) * 15))
    return Opening(4 * block_size, stretch, min(1.0, max(0.0, (done - 0.45) * 4)))


def noise_opened(piece: Piece, opened: Opening, rng: random.Random) -> Noised:
    """As `noise`, with noisy copies of the whole text where the context is open.

    Each has a canvas; what follows it is cut off or shown.
    """
    if opened.context == 1 and rng.random() >= opened.full:
        return noise(piece, opened.block, rng)
    copies: list[Block] = []
    while sum(len(copy.masked) for copy in copies) < NOISY_SHARE * len(piece.ids) - len(piece.ids) / 2:
        copies.append(_copy(piece, opened, rng))
    return Noised(piece.ids, copies)


def _copy(piece: Piece, opened: Opening, rng: random.Random) -> Block:
    length = len(piece.ids)
    if piece.answers and rng.random() < ANSWER_ALONE:
        start, n = rng.choice(piece.answers)
    else:
        n = rng.randint(1, min(opened.block, length - 1))
        start = rng.randint(1, length - n)
    stop = start + n if rng.random() < 0.5 else length
    chosen = set(rng.sample(range(start, start + n), rng.randint(1, n)))
    all_see = rng.random() < opened.full
    ranks = tuple(
        0 if all_see or i >= start else -((start - i - 1) // opened.context + 1) for i in range(stop)
    )
    return Block(0, tuple(i in chosen for i in range(stop)), ranks)


def pack(draw: Callable[[], Noised], rows: int, length: int, mask_id: int) -> Rows:
    """Texts, drawn until the rows are full: the last ones that do not fit are left out.

    Args:
        draw: the next text; one longer than a row is skipped.
    """
    filling = [_Row(length) for _ in range(rows)]
    misses = 0
    while misses < 12 and any(row.room >= 24 for row in filling):
        text = draw()
        row = next((row for row in filling if row.room >= text.columns), None)
        if row is None:
            misses += 1
        else:
            row.add(text, mask_id)
    return _collate(filling)


def rows_of(texts: Sequence[Sequence[Noised]], mask_id: int) -> Rows:
    """A row for each list of texts, padded to the longest."""
    filling = [_Row(sum(text.columns for text in row)) for row in texts]
    for row, listed in zip(filling, texts):
        for text in listed:
            row.add(text, mask_id)
    return _collate(filling)


def _collate(rows: Sequence[_Row]) -> Rows:
    longest = max(len(row.fields["ids"]) for row in rows)
    fill = {"targets": -1, "teachers": -1, "weights": 0.0}
    return Rows(**{
        name: torch.tensor(
            [row.fields[name] + [fill.get(name, 0)] * (longest - len(row.fields[name])) for row in rows],
            dtype=torch.float32 if name == "weights" else torch.long,
        )
        for name in Rows.__dataclass_fields__
    })  # fmt: skip
