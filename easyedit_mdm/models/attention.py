"""Who sees whom, as data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from easyedit_mdm.errors import ModelError

EDGES = ("start", "canvas")
CONTEXTS = ("blocks", "causal")


@dataclass(frozen=True)
class Attention:
    """Which tokens each token sees: those of its own block and of earlier ones.

    Attributes:
        block: tokens of a block. None: one block, so that every token sees every other; 1: causal.
        edges: where blocks begin. `start`: they are counted from each row's first visible token (SDAR, arXiv
            2510.06303; LLaDA2; Fast-dLLM v2). `canvas`: the first column of the canvas begins one (dLLM's
            `bd3lm` sampler).
        first_alone: the first token of a block is written before the others, by itself: it is read from the
            block before, as an autoregressive model's would be (Fast-dLLM v2, arXiv 2509.26328).
        context: what stands before the canvas is in blocks itself (`blocks`), or each of its tokens sees only
            its left (`causal`), as in an adapted model that reads its context as it was pretrained to.
        masks_last: causal over the known tokens first and the hidden slots last, whatever their positions: a
            known token sees the known ones on its left, a hidden slot every known token and the hidden slots
            on its left (WeDLM).

    Raises:
        ModelError: for a block of less than one token, or an unknown name.
    """

    block: int | None = None
    edges: str = "start"
    context: str = "blocks"
    first_alone: bool = False
    masks_last: bool = False

    def __post_init__(self) -> None:
        if self.block is not None and (
            not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1
        ):
            raise ModelError(
                f"a block of {self.block!r} tokens: a block-causal model needs a whole number, at least 1"
            )
        for name, known in (("edges", EDGES), ("context", CONTEXTS)):
            if getattr(self, name) not in known:
                raise ModelError(f"attention {name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.masks_last and (self.block is not None or self.context != "blocks"):
            raise ModelError("an attention whose masks come last has neither blocks nor a context of its own")

    @property
    def asks_for_hidden(self) -> bool:
        """Whether it makes a difference which slots are hidden."""
        return self.masks_last

    @property
    def full(self) -> bool:
        """Whether every token sees every other."""
        return self.block is None and self.context == "blocks" and not self.masks_last

    @property
    def causal(self) -> bool:
        """Whether every token sees only its left."""
        return self.block == 1

    @property
    def asks_for_canvas(self) -> bool:
        """Whether it makes a difference where the canvas begins."""
        from_canvas = self.block is not None and self.edges == "canvas"
        return not self.causal and (from_canvas or self.context == "causal")

    def blocks(self, prompt: int, slots: int, within: int | None = None) -> tuple[int, ...]:
        """Sizes of the blocks that `slots` slots after a prompt of `prompt` tokens fall into, in the order
        they are written.

        The first holds fewer slots where the prompt's tail stands in it, the last where the slots end before
        it does.

        Args:
            within: blocks are divided further, into parts of this many tokens, which are written one after
                the other.
        """
        if self.block is None:
            return (slots,)
        before = prompt if self.edges == "start" else 0
        places = range(before, before + slots)
        part = within or self.block
        marks = [(at // part, self.first_alone and at % self.block > 0) for at in places]
        return tuple(len(list(some)) for _, some in itertools.groupby(marks))

    def __str__(self) -> str:
        """In words, as tables show it."""
        if self.masks_last:
            return "causal over known tokens first, masks last"
        kind = "full" if self.block is None else "causal" if self.causal else f"block-causal of {self.block}"
        edges = ", from the canvas" if self.block and not self.causal and self.edges == "canvas" else ""
        edges += ", the first by itself" if self.first_alone else ""
        return kind + edges + (", causal context" if self.context == "causal" and not self.causal else "")


FULL, CAUSAL = Attention(), Attention(1)
