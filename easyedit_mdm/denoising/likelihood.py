"""How likely a model holds a text after a prompt, for both paradigms.

A causal model has one answer: sum_i log p(y_i | prompt, y_<i). A masked model has one for each order of
revealing; the mean over a uniformly random order is the bound it was trained on at fixed length,

    E_order[log p] = N sum_S w_S mean_{i not in S} log p(y_i | prompt, y_S),    w_S = 1 / (N C(N, |S|)),

exactly computable while 2^N - 1 states are few (`exact`), and estimated by the published Monte Carlo
estimators otherwise: LLaDA's (k ~ U{1..N} tokens masked, weight N / k; arXiv 2502.09992, algorithm 3) and
Dream's (each token masked with probability t, weight 1 / t, t stratified over (eps, 1]). Chain rules go
through one order only.

A block-causal model's orders finish one block before they begin the next: the likelihood is exact over
blocks, any-order within each, and a sample of an estimator is of one block, drawn as often as it has slots.
See `denoising.states`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.denoising.states import Slots, schedule
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.geometry import right_padded

METHODS = ("causal", "exact", "llada", "dream", "left_to_right", "right_to_left")
MOST_EXACT = 5  # tokens of one block: 31 states
MOST_STATES = 2**MOST_EXACT - 1
DREAM_EPS = 1e-3


def log_likelihood(
    adapter: Adapter,
    prompts: Sequence[Int[Tensor, " _"]],
    targets: Sequence[Int[Tensor, " _"]],
    method: str | None = None,
    samples: int = 128,
    seed: int = 0,
    max_rows: int = 256,
    draws: Sequence[int] | None = None,
) -> list[float]:
    """log p(target | prompt) in nats, the sum over its tokens, one a pair.

    Args:
        prompts, targets: token ids without padding.
        method: one of `METHODS`; by default `causal` for causal models, and for masked ones `exact` up to 31
            states (5 tokens of one block) and `llada` beyond.
        samples: of a Monte Carlo estimator, a pair. What is drawn for a pair depends on `seed` and on its
            place in the list; of `llada`, two targets at the same place get the same draws, whatever their
            lengths.
        max_rows: rows of one forward pass.
        draws: a number a pair; pairs with the same one get the same draws, wherever they stand in the list.
            By default their place.

    Raises:
        HyperParameterError: for an unknown method, or one that the model or the target's length does not
            admit.
    """
    rows, right, weights, owner = [], [], [], []
    for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        slots = Slots(adapter.blocks(len(prompt), len(target)))
        how, drawn = method or default_method(adapter, slots), number if draws is None else draws[number]
        revealed, share = _plan(
            adapter, slots, how, samples, torch.Generator().manual_seed(seed * 1_000_003 + drawn)
        )
        for draw, (shown, weight) in enumerate(zip(revealed, share)):
            tail = target if how == "causal" else adapter.hidden.around(target, shown, draw)
            rows.append((prompt, tail))
            right.append(target)
            weights.append(weight)
            owner.append(number)
    each = _weighted(adapter, rows, right, weights, max_rows)
    return (
        torch.zeros(len(prompts), dtype=torch.float64).index_add_(0, torch.tensor(owner), each).tolist()
        if rows
        else []
    )


def default_method(adapter: Adapter, slots: Slots) -> str:
    """The method for a target with these slots, where none is named."""
    if not adapter.denoises:
        return "causal"
    return "exact" if slots.states <= MOST_STATES else "llada"


def _plan(
    adapter: Adapter, slots: Slots, method: str, samples: int, generator: torch.Generator
) -> tuple[Bool[Tensor, "states slots"], Float[Tensor, "states slots"]]:
    """Which tokens are shown in each row, and the weight of each token's log-probability."""
    length = len(slots)
    if method not in METHODS:
        raise HyperParameterError(f"unknown likelihood {method!r}: use one of {', '.join(METHODS)}")
    if (method == "causal") == adapter.denoises:
        raise HyperParameterError(
            f"likelihood {method!r} does not fit {adapter.name}, which is {adapter.spec.paradigm}"
        )
    if method == "causal":
        return torch.zeros(1, length, dtype=torch.bool), torch.ones(1, length)
    if method == "exact":
        if slots.states > MOST_STATES:
            raise HyperParameterError(
                f"the exact likelihood of {length} tokens takes {slots.states} forwards; it is offered up to"
                f" {MOST_STATES}: use 'llada'"
            )
        states = schedule("enumerate", slots.blocks, MOST_STATES).draw(0, generator)
        scored = states.scored
        return states.revealed, length * states.weights[:, None] * scored / scored.sum(1, keepdim=True)
    if method in ("left_to_right", "right_to_left"):
        return _chain(slots, leftwards=method == "right_to_left"), torch.eye(length)
    return _monte_carlo(slots, method, samples, generator)


def _numbers(slots: Slots) -> Int[Tensor, " slots"]:
    """The number of each slot's block."""
    return torch.repeat_interleave(torch.arange(len(slots.blocks)), torch.tensor(slots.blocks))


def _chain(slots: Slots, leftwards: bool) -> Bool[Tensor, "slots slots"]:
    """What stands before each slot of a chain rule: the blocks before its own, and its block's slots on one
    side of it.
    """
    number = _numbers(slots)
    earlier, own = number[None] < number[:, None], number[None] == number[:, None]
    beside = torch.ones(len(slots), len(slots)).tril(-1).bool()
    return earlier | (own & (beside.T if leftwards else beside))


def _monte_carlo(
    slots: Slots, method: str, samples: int, generator: torch.Generator
) -> tuple[Bool[Tensor, "states slots"], Float[Tensor, "states slots"]]:
    length, number = len(slots), _numbers(slots)
    if method == "llada":
        # as shares of the length, and slot by slot: targets of unlike lengths are judged by the same draws
        k = 1 + (torch.rand(samples, generator=generator) * length).long().clamp(max=length - 1)
        order = torch.rand(length, samples, generator=generator).T - number  # later blocks are hidden first
        hidden = order.argsort(1).argsort(1) < k[:, None]
        scored = hidden & torch.tensor([slots.inside(length - n) for n in k.tolist()])
        return ~hidden, scored * (length / scored.sum(1, keepdim=True)) / samples
    t = (torch.rand((), generator=generator) + torch.arange(samples) / samples) % 1
    ratio = ((1 - DREAM_EPS) * t + DREAM_EPS)[:, None]
    hidden = torch.rand(samples, length, generator=generator) < ratio
    if len(slots.blocks) == 1:
        return ~hidden, hidden / ratio / samples
    opened = number[torch.randint(length, (samples, 1), generator=generator)]
    scored = hidden & (number == opened)
    sizes = torch.tensor(slots.blocks)[opened]
    return (number < opened) | (~hidden & (number == opened)), scored * (length / sizes) / ratio / samples


@torch.no_grad()
def _weighted(
    adapter: Adapter,
    rows: list[tuple[Tensor, Tensor]],
    right: list[Tensor],
    weights: list[Tensor],
    max_rows: int,
) -> Float[Tensor, " rows"]:
    """Weighted sum of each row's log-probabilities; rows that weigh nothing are not run."""
    out = torch.zeros(len(rows), dtype=torch.float64)
    todo = [i for i in range(len(rows)) if bool(weights[i].any())]
    for start in range(0, len(todo), max_rows):
        part = todo[start : start + max_rows]
        ids, mask = right_padded([torch.cat(rows[i]) for i in part], adapter.ids.pad, adapter.device)
        most = max(len(right[i]) for i in part)
        at = torch.stack(
            [
                (len(rows[i][0]) + torch.arange(most)).clamp(max=len(rows[i][0]) + len(right[i]) - 1)
                for i in part
            ]
        ).to(ids.device)
        tokens = torch.stack([torch.nn.functional.pad(right[i], (0, most - len(right[i]))) for i in part])
        share = torch.stack(
            [torch.nn.functional.pad(weights[i].double(), (0, most - len(weights[i]))) for i in part]
        )
        canvas = torch.tensor([len(rows[i][0]) for i in part], device=ids.device)
        log_probs = adapter.token_logits(ids, mask, at=at, canvas=canvas).float().log_softmax(-1).cpu()
        of_tokens = log_probs.gather(-1, tokens[..., None])[..., 0].double()
        out[torch.tensor(part)] = (of_tokens * share).sum(1)
    return out
