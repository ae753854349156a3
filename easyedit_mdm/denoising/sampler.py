"""Iterative denoising: how a masked diffusion model writes.

A canvas of mask tokens stands after each prompt. At every step the model predicts all masked slots at once;
an *order* says how sure it is of each, and the surest are committed and stay. LLaDA's decoding (arXiv
2502.09992, its generate.py) reveals a fixed number of slots a step, block by block; Dream's (arXiv
2508.15487) reveals the fraction 1 - s/t of what is masked, with t running linearly from 1 to eps. A
block-causal model writes block by block: SDAR (arXiv 2510.06303) reveals a fixed number of slots a step, or
beside them all that are surer than a threshold. dLLM's samplers round a linear schedule. All are reproduced
token for token at temperature 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.errors import HyperParameterError, RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.attention import FULL, Attention
from easyedit_mdm.models.geometry import right_padded

PACES = ("even", "linear", "floor", "fraction")


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode: data, never hidden defaults.

    Attributes:
        canvas: masks after the prompt; None means as many as the answer has tokens.
        steps: denoising steps, shared out evenly over the blocks; None means one a mask. A block that the
            prompt's tail or the canvas's end cuts short takes as many slots a step as a whole one, and so
            fewer steps.
        block_length: blocks that are written one after the other. None: the model's own, which for full
            attention is one block; the blocks of a block-causal model may be divided further.
        order: which slots are committed first (a name in `ORDERS`).
        pace: how many a step. `even`: equally many, the remainder first (LLaDA, SDAR). `linear`: a linear
            schedule, rounded (dLLM). `floor`: after step s of n, floor(slots (n - s) / n) are still masked
            (RND1). `fraction`: 1 - s/t of what is masked, with t falling from 1 to eps (Dream); it knows no
            blocks. None: the order's own, even or Dream's.
        threshold: slots whose token is likelier than this are committed as well, however many; None for none.
        temperature: 0 for greedy.
        eps: where Dream's time ends; only its orders read it.
        top_k: only the k likeliest tokens of a slot count, 0 for all. None means the order's own: all for
            LLaDA's, 50 for Dream's, whose `diffusion_generate` inherits that from transformers'
            GenerationConfig; `entropy` depends on it.
        seed: of the generator that temperature and random orders draw from.
        remask: rounds after the last step (masked models). In each the slot that was committed with the least
            confidence, of those not yet taken, is masked again and written anew beside all others
            (Mask-Predict, Ghazvininejad et al., arXiv 1904.09324, one slot a round).
    """

    canvas: int | None = None
    steps: int | None = None
    block_length: int | None = None
    order: str = "low_confidence"
    pace: str | None = None
    threshold: float | None = None
    temperature: float = 0.0
    eps: float = 1e-3
    top_k: int | None = None
    seed: int = 0
    remask: int = 0

    def __post_init__(self) -> None:
        ORDERS[self.order]
        if self.remask < 0:
            raise HyperParameterError(f"decode setting remask={self.remask!r} must not be negative")
        for name in ("canvas", "steps", "block_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise HyperParameterError(
                    f"decode setting {name}={value!r} must be a whole number, at least 1 (or None)"
                )
        if self.pace is None:
            object.__setattr__(self, "pace", "even" if ORDERS[self.order].blocks else "fraction")
        if self.pace not in PACES:
            raise HyperParameterError(f"decode setting pace={self.pace!r} is not one of {', '.join(PACES)}")
        if ORDERS[self.order].bernoulli and self.pace != "fraction":
            raise HyperParameterError(
                f"order {self.order!r} has a pace of its own: leave pace out (got {self.pace!r})"
            )
        if self.pace == "fraction" and self.threshold is not None:
            raise HyperParameterError(
                f"pace 'fraction', order {self.order!r}'s own, takes no threshold: give another pace"
            )
        for name in ("temperature", "top_k", "eps", "threshold"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or value < 0):
                raise HyperParameterError(
                    f"decode setting {name}={value!r} must be a number and not negative"
                )
        if self.top_k is None:
            object.__setattr__(self, "top_k", ORDERS[self.order].top_k)

    def record(self) -> dict[str, Any]:
        """The settings as they go into records; without `remask` where there is none, as in older ones."""
        settings = asdict(self)
        return settings if self.remask else {k: v for k, v in settings.items() if k != "remask"}

    def plan(
        self, length: int, attention: Attention = FULL, prompt: int = 0, given: Sequence[bool] | None = None
    ) -> Plan:
        """Steps and blocks for a canvas of `length` slots after a prompt of `prompt` tokens.

        Args:
            given: which slots show a token from the start; `linear` and `floor` count what is masked, `even`
                what there is.

        Raises:
            HyperParameterError: if blocks or steps do not divide as LLaDA's decoding needs.
        """
        sizes = self._blocks(length, attention, prompt)
        steps, free = self.steps, self.pace in ("linear", "floor") or attention.block is not None
        if steps is not None and steps % len(sizes) and not free:
            blocks = len(sizes)
            raise HyperParameterError(
                f"{steps} steps do not spread evenly over {blocks} blocks; make steps a multiple of {blocks}"
            )
        each = max(sizes) if steps is None else math.ceil(steps / len(sizes))
        starts = list(itertools.accumulate(sizes[:-1], initial=0))
        shown = [0] * length if given is None or self.pace == "even" else list(map(int, given))
        masks = [n - sum(shown[start : start + n]) for start, n in zip(starts, sizes)]
        counts = [self._counts(n, max(sizes), each) for n in masks]
        turns = [Turn(start, n, k) for start, n, some in zip(starts, sizes, counts) for k in some]
        return Plan(length, each * len(sizes), self.block_length or attention.block or length, tuple(turns))

    def _blocks(self, length: int, attention: Attention, prompt: int) -> tuple[int, ...]:
        """Sizes of the blocks that are written one after the other."""
        block, whole = self.block_length or attention.block or length, attention.block
        if whole is None:
            if self.pace == "even" and length % block:
                raise HyperParameterError(
                    f"block_length {block} does not divide the canvas of {length} masks"
                )
            sizes = Attention(block, edges="canvas").blocks(0, length)
        else:
            if whole % block:
                raise HyperParameterError(
                    f"block_length {block} does not divide the model's blocks of {whole} tokens"
                )
            sizes = attention.blocks(prompt, length, within=block)
        if self.pace == "fraction" and len(sizes) > 1:
            raise HyperParameterError(
                f"order {self.order!r} knows no blocks: leave block_length out (got {block} for a canvas of"
                f" {length}); a block-causal model needs an order that knows them, or another pace"
            )
        return sizes

    def _counts(self, size: int, whole: int, steps: int) -> list[int]:
        """How many slots of a block are committed at each of its steps.

        Args:
            whole: the size of the largest block.
        """
        if self.pace == "linear":
            return _linear(size, steps)
        if self.pace == "floor":
            kept = [int(size * (left / steps)) for left in range(steps, -1, -1)]
            return [before - after for before, after in itertools.pairwise(kept) if before > after]
        base, extra = divmod(whole, steps)
        counts = [base + (i < extra) for i in range(steps)]
        if size == whole:
            return counts
        needed = next(i for i, total in enumerate(itertools.accumulate(counts), 1) if total >= size)
        return counts[:needed]


def _linear(size: int, steps: int) -> list[int]:
    """dLLM's counts: what is still masked times 1 - s/t, rounded half to even, with t falling from 1 to 0;
    none where it is 0.
    """
    times = torch.tensor([i / steps for i in range(steps, -1, -1)])
    masked = 1 - (1 - times)  # the share that is masked at each time, in float32 as theirs
    left, counts = size, []
    for later, now in zip(masked[1:], masked[:-1]):
        counts.append(min(round(left * (1 - (later / now).item())), left))
        left -= counts[-1]
    return [n for n in counts if n]


@dataclass(frozen=True)
class Turn:
    """One step of a plan: `count` of the `size` slots from `start` on are committed."""

    start: int
    size: int
    count: int


@dataclass(frozen=True)
class Plan:
    """A decode of one canvas.

    Attributes:
        length: slots.
        steps: denoising steps, as `DecodeConfig.steps` means them.
        block: slots of a block.
        turns: what each step does; Dream's orders read only how many there are.
    """

    length: int
    steps: int
    block: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Order:
    """How sure the model is of each slot.

    Attributes:
        score: (probabilities, chosen tokens' probabilities, generator) -> one number a slot, larger first.
        blocks: its own pace is LLaDA's, a fixed number a step, in blocks; otherwise Dream's fraction of what
            is masked.
        bernoulli: each masked slot is revealed with probability 1 - s/t on its own (Dream's `origin`).
    """

    score: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    blocks: bool
    bernoulli: bool = False

    @property
    def top_k(self) -> int:
        """Tokens a slot that count by default, 0 for all."""
        return 0 if self.blocks else 50


ORDERS: Registry[Order] = Registry("decoding order")
_STEPS = 1_000_003  # draws of noise that a seed has to itself


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=generator.device).to(like.device)


def _margin(probs: Tensor) -> Tensor:
    top = probs.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


ORDERS.register("low_confidence")(Order(lambda probs, chosen, g: chosen, blocks=True))
ORDERS.register("random")(Order(lambda probs, chosen, g: _noise(chosen, g), blocks=True))
ORDERS.register("left_to_right")(
    Order(
        lambda probs, chosen, g: (
            -torch.arange(chosen.shape[-1], device=chosen.device, dtype=chosen.dtype).expand_as(chosen)
        ),
        blocks=True,
    )
)
ORDERS.register("maskgit_plus")(Order(lambda probs, chosen, g: chosen, blocks=False))
ORDERS.register("topk_margin")(Order(lambda probs, chosen, g: _margin(probs), blocks=False))
ORDERS.register("entropy")(
    Order(lambda probs, chosen, g: (probs * (probs + 1e-10).log()).sum(-1), blocks=False)
)
ORDERS.register("origin")(Order(lambda probs, chosen, g: _noise(chosen, g), blocks=False, bernoulli=True))


@dataclass(frozen=True)
class Trajectory:
    """What happened to one canvas.

    Attributes:
        tokens: the tokens at the end, slot by slot.
        step: the step at which each slot was committed, from 0; -1 for tokens that were given. Slots never
            change afterwards: this is the history. (With `remask` the last time counts.)
        confidence: the probability each token had when it was committed.
        one_step: what each slot would have been if all had been committed at the first step.
    """

    tokens: Int[Tensor, " slots"]
    step: Int[Tensor, " slots"]
    confidence: Float[Tensor, " slots"]
    one_step: Int[Tensor, " slots"]

    def first_committed(self) -> int:
        """The slot that was committed first; the surest of them where a step commits several."""
        written = self.step >= 0
        first = (written & (self.step == self.step[written].min())).nonzero().flatten()
        return int(first[self.confidence[first].argmax()])

    def frames(self, mask_id: int) -> list[list[int]]:
        """The canvas before the first step and after every later one, masked slots showing `mask_id`."""
        count = int(self.step.max()) + 1 if len(self.step) else 0
        return [torch.where(self.step < i, self.tokens, mask_id).tolist() for i in range(count + 1)]


@dataclass
class _Canvas:
    """The batch while it is being decoded; slots beyond a row's own length count as committed."""

    ids: Tensor
    mask: Tensor
    at: Tensor
    starts: Tensor
    plans: list[Plan]
    masked: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    step: Tensor = field(init=False)
    confidence: Tensor = field(init=False)
    one_step: Tensor = field(init=False)
    rewritten: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lengths = torch.tensor([p.length for p in self.plans], device=self.ids.device)
        self.masked = torch.arange(self.at.shape[1], device=self.ids.device)[None] < lengths[:, None]
        self.tokens, self.step, self.one_step = (torch.zeros_like(self.at) for _ in range(3))
        self.confidence = torch.zeros(self.at.shape, device=self.ids.device)
        self.rewritten = torch.zeros_like(self.masked)


@torch.no_grad()
def decode(
    adapter: Adapter,
    prompts: Sequence[Int[Tensor, " _"]],
    lengths: Sequence[int],
    config: DecodeConfig = DecodeConfig(),
    generator: torch.Generator | None = None,
    given: Sequence[Int[Tensor, " _"]] | None = None,
) -> list[Trajectory]:
    """Denoise a canvas after each prompt; prompts and canvases of one batch may differ in length.

    A causal model writes its canvas from left to right, one token a step, whatever the order; `one_step` then
    means nothing beyond the first slot. Where hidden slots show noise it is drawn anew at every step, from
    `config.seed`; a token that is written stays (transformers' own decoder may take it back).

    Args:
        prompts: token ids, one row a prompt, without padding.
        lengths: masks after each prompt (`config.canvas` overrides them all).
        generator: for temperature and random orders; one seeded with `config.seed` by default.
        given: for masked models, tokens that stand in the canvas from the start, one row a prompt, -1 where
            it is masked. Their step is -1.

    Raises:
        RequestError: if a prompt and its canvas are longer than the model's positions, or a canvas is empty.
        HyperParameterError: for `remask` with an autoregressive model.
    """
    if not adapter.denoises:
        if config.remask:
            raise HyperParameterError(
                f"decode setting remask={config.remask}: {adapter.name} is autoregressive and masks nothing"
            )
        config = DecodeConfig(
            config.canvas,
            temperature=config.temperature,
            order="left_to_right",
            top_k=config.top_k,
            seed=config.seed,
        )
    generator = generator or torch.Generator().manual_seed(config.seed)
    lengths = [config.canvas or n for n in lengths]
    _check(adapter, prompts, lengths)
    sight = (
        adapter.attention if adapter.denoises else FULL
    )  # an autoregressive model's canvas is one block, written leftmost first
    shown = (
        [None] * len(prompts) if given is None else [[token >= 0 for token in row.tolist()] for row in given]
    )
    plans = [
        config.plan(n, sight, adapter.before + len(p), known) for p, n, known in zip(prompts, lengths, shown)
    ]
    state = _lay_out(adapter, prompts, plans)
    if given is not None:
        _reveal(adapter, state, given)
    place, step = [0] * len(prompts), 0  # the turn that each row has come to
    while going := [r for r, plan in enumerate(state.plans) if place[r] < len(plan.turns)]:
        turns = [state.plans[r].turns[place[r]] for r in going]
        _denoise(adapter, state, torch.tensor(going, device=state.ids.device), turns, step, config, generator)
        for r in going:
            place[r] = _next(state, r, place[r], config)
        step += 1
    surest = replace(config, order="low_confidence", pace="even", threshold=None)
    for turn in range(config.remask):
        _rewrite(adapter, state, step + turn, surest, generator)
    return [
        Trajectory(
            *(getattr(state, name)[r, :n].cpu() for name in ("tokens", "step", "confidence", "one_step"))
        )
        for r, n in enumerate(lengths)
    ]


def _next(state: _Canvas, row: int, place: int, config: DecodeConfig) -> int:
    """The turn after this one; with a threshold, a block that is full sooner than planned ends there."""
    turns = state.plans[row].turns
    turn = turns[place]
    place += 1
    if config.threshold is not None and not state.masked[row, turn.start : turn.start + turn.size].any():
        while place < len(turns) and turns[place].start == turn.start:
            place += 1
    return place


def _check(adapter: Adapter, prompts: Sequence[Tensor], lengths: Sequence[int]) -> None:
    for prompt, length in zip(prompts, lengths):
        if length < 1:
            raise RequestError("a canvas needs at least one mask: the answer has no tokens")
        if len(prompt) + length > adapter.max_positions:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and a canvas of {length} exceed the"
                f" {adapter.max_positions} positions of {adapter.name}"
            )


def _lay_out(adapter: Adapter, prompts: Sequence[Tensor], plans: list[Plan]) -> _Canvas:
    rows = [torch.cat([p.cpu(), adapter.hidden.slots(plan.length)]) for p, plan in zip(prompts, plans)]
    ids, mask = right_padded(rows, adapter.ids.pad, adapter.device)
    starts = torch.tensor([len(p) for p in prompts], device=ids.device)
    at = starts[:, None] + torch.arange(max(p.length for p in plans), device=ids.device)
    return _Canvas(ids, mask, at.clamp(max=ids.shape[1] - 1), starts, plans)


def _reveal(adapter: Adapter, state: _Canvas, given: Sequence[Tensor]) -> None:
    """Put the tokens that are given into the canvas."""
    if not adapter.denoises:
        raise RequestError(
            f"{adapter.name} is autoregressive: tokens behind the one it writes next cannot be given"
        )
    for row, tokens in enumerate(given):
        shown = tokens.to(state.ids.device)
        known = shown >= 0
        at = state.at[row, : len(shown)][known]
        state.ids[row, at] = shown[known]
        for values, value in ((state.masked, False), (state.step, -1)):
            values[row, : len(shown)][known] = value
        state.tokens[row, : len(shown)][known] = shown[known]


def _denoise(
    adapter: Adapter,
    state: _Canvas,
    rows: Tensor,
    turns: list[Turn],
    step: int,
    config: DecodeConfig,
    generator: torch.Generator,
) -> None:
    """One step for the rows that are not done."""
    order = ORDERS[config.order]
    if adapter.hidden.noise:
        _renew(adapter, state, rows, config.seed * _STEPS + step)
    logits = adapter.token_logits(
        state.ids[rows], state.mask[rows], at=state.at[rows], canvas=state.starts[rows]
    ).float()
    probs, tokens, chosen = _choose(adapter, logits, config, order, generator)
    if step == 0:
        state.one_step[rows] = tokens
    scores = order.score(probs, chosen, generator)
    commit = _select(state, rows, turns, step, scores, config)
    if config.threshold is not None:
        commit |= _open(state, rows, turns) & (chosen > config.threshold)
    at = state.at[rows]
    ids = state.ids[rows]
    ids.scatter_(1, at, torch.where(commit, tokens, ids.gather(1, at)))
    state.ids[rows] = ids
    for name, value in (("tokens", tokens), ("step", torch.full_like(tokens, step)), ("confidence", chosen)):
        getattr(state, name)[rows] = torch.where(
            commit, value.to(getattr(state, name).dtype), getattr(state, name)[rows]
        )
    state.masked[rows] = state.masked[rows] & ~commit


def _rewrite(
    adapter: Adapter, state: _Canvas, step: int, config: DecodeConfig, generator: torch.Generator
) -> None:
    """Mask the least sure slot of each row again and write it anew; one that was rewritten before is left
    alone, as are tokens that were given.
    """
    lengths = torch.tensor([plan.length for plan in state.plans], device=state.ids.device)
    own = torch.arange(state.at.shape[1], device=state.ids.device)[None] < lengths[:, None]
    free = own & (state.step >= 0) & ~state.rewritten
    rows = free.any(1).nonzero()[:, 0]
    if not len(rows):
        return
    slot = state.confidence.masked_fill(~free, torch.inf).argmin(1)[rows]
    state.rewritten[rows, slot] = True
    state.masked[rows, slot] = True
    state.ids[rows, state.at[rows, slot]] = adapter.hidden.slots(1, config.seed * _STEPS + step).to(state.ids)
    turns = [Turn(int(place), 1, 1) for place in slot.tolist()]
    _denoise(adapter, state, rows, turns, step, config, generator)


def _renew(adapter: Adapter, state: _Canvas, rows: Tensor, draw: int) -> None:
    """Draw the noise of hidden slots anew, the same for all rows: their company changes nothing."""
    at, ids = state.at[rows], state.ids[rows]
    noise = adapter.hidden.slots(at.shape[1], draw).to(ids.device)
    shown = torch.where(state.masked[rows], noise, ids.gather(1, at))
    state.ids[rows] = ids.scatter(1, at, shown)


def writable(adapter: Adapter, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """Logits of what a decoder may write: minus infinity for the mask token and for ids without a token."""
    logits = logits.clone()
    if adapter.masked:
        logits[..., adapter.ids.mask] = -torch.inf
    logits[..., adapter.vocabulary :] = -torch.inf
    return logits


def _choose(
    adapter: Adapter,
    logits: Float[Tensor, "rows slots vocab"],
    config: DecodeConfig,
    order: Order,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, a token for each slot, and that token's probability.

    What may not be written (`writable`) is never chosen, though it keeps its share of the probability.
    """
    temperature, top_k = config.temperature, config.top_k or 0
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(
            logits < logits.topk(top_k).values[..., -1:], torch.finfo(logits.dtype).min
        )
    probs = (logits if temperature == 0 or order.blocks else logits / temperature).softmax(-1)
    pickable = writable(adapter, logits)
    if (
        temperature > 0
    ):  # Gumbel's trick samples softmax(logits / temperature); float64, as LLaDA's authors found needed
        noise = (
            torch.rand(pickable.shape, generator=generator, dtype=torch.float64, device=generator.device)
            .to(pickable.device)
            .clamp(min=1e-300)
        )
        pickable = pickable.double() / temperature - (-noise.log()).log()
    tokens = pickable.argmax(-1)
    return probs, tokens, probs.gather(-1, tokens[..., None])[..., 0]


def _open(state: _Canvas, rows: Tensor, turns: list[Turn]) -> Bool[Tensor, "rows slots"]:
    """The masked slots of the block that each row writes in."""
    masked = state.masked[rows]
    start = torch.tensor([turn.start for turn in turns], device=masked.device)[:, None]
    size = torch.tensor([turn.size for turn in turns], device=masked.device)[:, None]
    slots = torch.arange(masked.shape[1], device=masked.device)
    return masked & (slots >= start) & (slots < start + size)


def _select(
    state: _Canvas, rows: Tensor, turns: list[Turn], step: int, scores: Tensor, config: DecodeConfig
) -> Bool[Tensor, "rows slots"]:
    """Which slots are committed at this step."""
    order, plans = ORDERS[config.order], [state.plans[r] for r in rows.tolist()]
    masked = _open(state, rows, turns)
    if order.bernoulli:
        keep = torch.tensor([_dream_fraction(p, step, config.eps) for p in plans], device=masked.device)
        return masked & (scores < keep[:, None])
    counts = [turn.count for turn in turns]
    if config.pace == "fraction":
        left = masked.sum(-1).tolist()
        counts = [int(n * _dream_fraction(p, step, config.eps)) for n, p in zip(left, plans)]
    ranked = scores.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = ranked.argsort(dim=-1)
    return masked & (rank < torch.tensor(counts, device=masked.device)[:, None])


def _dream_fraction(plan: Plan, step: int, eps: float) -> float:
    if step == plan.steps - 1:
        return 1.0
    times = torch.linspace(1, eps, plan.steps + 1)
    return float(1 - times[step + 1] / times[step])


def generate(
    adapter: Adapter,
    input_ids: Int[Tensor, "rows length"],
    attention_mask: Int[Tensor, "rows length"] | Bool[Tensor, "rows length"] | None = None,
    max_new_tokens: int | None = None,
    *,
    max_length: int | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    order: str = "low_confidence",
    pace: str | None = None,
    threshold: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    do_sample: bool = False,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool | None = None,
) -> Int[Tensor, "rows total"]:
    """`model.generate` for masked models: the prompt columns as given, then `max_new_tokens` denoised tokens.

    Args:
        max_length: prompt columns plus new tokens, where `max_new_tokens` is not given.
        steps, block_length, order, pace, threshold, top_k: see `DecodeConfig`. A model with blocks counted
            from the row's start writes its last block to the end, and what goes beyond `max_new_tokens` is
            cut off.
        temperature: used if positive and sampling is not switched off; `do_sample=True` alone means 1.0.
        eos_token_id: if given, what follows the first such token becomes `pad_token_id`.
        use_cache: masked models have no exact cache; either value gives the same tokens.

    Raises:
        HyperParameterError: if neither length is given, or they leave no room.
    """
    if max_new_tokens is None:
        if max_length is None:
            raise HyperParameterError(
                "generate needs max_new_tokens (or max_length): a masked model writes a canvas of fixed"
                " length"
            )
        max_new_tokens = max_length - input_ids.shape[1]
    if max_new_tokens < 1:
        raise HyperParameterError(f"max_new_tokens={max_new_tokens} must be at least 1")
    heat = (1.0 if temperature is None else temperature) if do_sample else (temperature or 0.0)
    if (
        generator is None and heat > 0
    ):  # as elsewhere in torch: torch.manual_seed decides, and the next call draws anew
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
    config = DecodeConfig(None, steps, block_length, order, pace, threshold, heat, top_k=top_k)
    shown = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    prompts = [row[keep].cpu() for row, keep in zip(input_ids, shown)]
    lengths = [_whole(adapter.attention, adapter.before + len(prompt), max_new_tokens) for prompt in prompts]
    done = decode(adapter, prompts, lengths, config, generator)
    new = torch.stack([t.tokens[:max_new_tokens] for t in done]).to(input_ids.device)
    if eos_token_id is not None:
        ends = torch.isin(new, torch.tensor(eos_token_id, device=new.device)).long()
        ended = ends.cumsum(-1) - ends > 0
        new = new.masked_fill(ended, adapter.ids.pad if pad_token_id is None else pad_token_id)
    return torch.cat([input_ids, new], dim=1)


def _whole(attention: Attention, prompt: int, slots: int) -> int:
    """As many slots as it takes for the last block to be whole, where blocks are counted from the row's
    start.
    """
    if attention.block is None or attention.edges != "start":
        return slots
    return slots + -(prompt + slots) % attention.block
