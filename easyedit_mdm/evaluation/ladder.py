"""The ladder of honesty: one edit, judged by measures that leak different things. Defined in docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from easyedit_mdm.denoising import DecodeConfig, decode, schedule
from easyedit_mdm.denoising.states import Slots, random_state
from easyedit_mdm.evaluation.multi_step import score_prompts, teacher_forced
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.prompts import encode, target_ids

CANVASES = (8, 16, 32)
DISTRACTOR = "The weather was fine that day."
FIRST, LAST = "teacher_forced", "in_context"
_MAX_STATES = 31

Rung = dict[str, float | bool]


def ladder(adapter: Adapter, prompts: Sequence[str], answers: Sequence[str], config: DecodeConfig = DecodeConfig()) -> list[dict[str, Rung]]:
    """Every rung for each prompt: `{rung: {"token_acc", "exact"}}`. Their order is not one of strictness.

    - `teacher_forced`: causal: each token after the right ones before it (EasyEdit's). Masked, its any-order analogue: each
      still-masked slot in states that show right tokens elsewhere (all states, or one for each number of them beyond 31).
      Exact there implies exact in every other way of filling the N masks, so long as all states are asked.
    - `one_step`: parallel commit, all N masks committed at once (masked models).
    - `multi_step`: exactly N masks, N steps; causal: N greedy tokens.
    - `canvas8`, `canvas16`, `canvas32`: a longer canvas; exact if nothing but the answer stands before the end of the text.
      Left out where the answer does not fit.
    - `steps_half`, `random`, `left_to_right`: as `multi_step` with N/2 steps, or in another order (masked models).
    - `in_context`: as `multi_step`, with a sentence that has nothing to do with it before the prompt.

    Args:
        config: seed and temperature of the decoding.
    """
    base = DecodeConfig(temperature=config.temperature, eps=config.eps, seed=config.seed)
    scores = score_prompts(adapter, prompts, answers, base)
    out: list[dict[str, Rung]] = [{FIRST: rung} for rung in _teacher_forced(adapter, prompts, answers)]
    for rungs, score in zip(out, scores):
        if adapter.masked:
            rungs["one_step"] = {"token_acc": score["one_step"], "exact": score["one_step"] == 1.0}
        rungs["multi_step"] = _rung(score)
    for canvas in CANVASES:
        which = [i for i, s in enumerate(scores) if s["n_tokens"] <= canvas]
        longer = score_prompts(adapter, [prompts[i] for i in which], [answers[i] for i in which], replace(base, canvas=canvas))
        for i, score in zip(which, longer):
            out[i][f"canvas{canvas}"] = {"token_acc": score["token_acc"], "exact": score["text_to_end"] == answers[i].strip()}
    if adapter.masked:
        _other_ways(adapter, prompts, answers, base, out)
    for rungs, score in zip(out, score_prompts(adapter, [f"{DISTRACTOR} {p}" for p in prompts], answers, base)):
        rungs[LAST] = _rung(score)
    return out


def mirage_gap(rungs: dict[str, Rung]) -> float:
    """Exact match on the first rung minus exact match on the last. In masked models it can be negative."""
    return float(rungs[FIRST]["exact"]) - float(rungs[LAST]["exact"])


def _rung(score: dict[str, Any]) -> Rung:
    return {"token_acc": score["token_acc"], "exact": score["exact"]}


def _other_ways(adapter: Adapter, prompts: Sequence[str], answers: Sequence[str], base: DecodeConfig, out: list[dict[str, Rung]]) -> None:
    for order in ("random", "left_to_right"):
        for rungs, score in zip(out, score_prompts(adapter, prompts, answers, replace(base, order=order))):
            rungs[order] = _rung(score)
    lengths = [len(target_ids(adapter, p, a)) for p, a in zip(prompts, answers)]
    for length in sorted(set(lengths)):
        which = [i for i, n in enumerate(lengths) if n == length]
        config = replace(base, steps=math.ceil(length / 2))
        for i, score in zip(which, score_prompts(adapter, [prompts[i] for i in which], [answers[i] for i in which], config)):
            out[i]["steps_half"] = _rung(score)


def _teacher_forced(adapter: Adapter, prompts: Sequence[str], answers: Sequence[str]) -> list[Rung]:
    targets = [target_ids(adapter, p, a) for p, a in zip(prompts, answers)]
    ids = [torch.tensor(encode(adapter, p.rstrip())) for p in prompts]
    shares = [_any_order(adapter, p, t) for p, t in zip(ids, targets)] if adapter.masked else teacher_forced(adapter, ids, targets)
    return [{"token_acc": share, "exact": share > 1 - 1e-9} for share in shares]


@torch.no_grad()
def _any_order(adapter: Adapter, prompt: Int[Tensor, " _"], target: Int[Tensor, " _"]) -> float:
    """Mean, over states as `enumerate` weighs them, of the share of masked slots whose best token is the right one."""
    blocks = adapter.attention.blocks(len(prompt), len(target))
    states = schedule("enumerate", blocks, _MAX_STATES).draw(0, torch.Generator().manual_seed(0))
    rows = [torch.cat([prompt, torch.where(shown, target, adapter.ids.slot)]) for shown in states.revealed]
    batch, mask = right_padded(rows, adapter.ids.pad, adapter.device)
    at = (len(prompt) + torch.arange(len(target))).expand(len(rows), -1).to(batch.device)
    canvas = torch.full((len(rows),), len(prompt), device=batch.device)
    right = adapter.token_logits(batch, mask, at=at, canvas=canvas).argmax(-1).cpu() == target
    return float((states.weights * (right & states.scored).sum(1) / states.scored.sum(1)).sum())


def given_k(adapter: Adapter, prompt: str, answer: str, seed: int = 0) -> list[bool]:
    """Exact match given k revealed right tokens (a random set for each k, block by block), for k = 0..N-1; masked models only."""
    target = target_ids(adapter, prompt, answer)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(encode(adapter, prompt.rstrip()))
    slots = Slots(adapter.attention.blocks(len(ids), len(target)))
    states = [random_state(slots, k, generator)[0] for k in range(len(target))]
    given = [torch.where(torch.tensor(shown), target, -1) for shown in states]
    paths = decode(adapter, [ids] * len(given), [len(target)] * len(given), DecodeConfig(), given=given)
    return [bool(torch.equal(path.tokens[: len(target)], target)) for path in paths]
