"""The ladder of honesty: one edit, judged by measures that leak different things. See docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from easyedit_mdm.denoising import DecodeConfig, decode, schedule
from easyedit_mdm.denoising.states import Slots, random_state
from easyedit_mdm.evaluation.multi_step import right_in, score_prompts, teacher_forced
from easyedit_mdm.evaluation.records import Rung, Score
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import encode, target_ids

CANVASES = (8, 16, 32)
DISTRACTOR = "The weather was fine that day."
_MAX_STATES = 31


def ladder(
    adapter: Adapter, prompts: Sequence[str], answers: Sequence[str], config: DecodeConfig = DecodeConfig()
) -> list[dict[str, Rung]]:
    """Every rung for each prompt, in the order of `records.RUNGS`.

    - `teacher_forced`: each token after the right ones before it, in both paradigms.
    - `left_to_right`, `random`, `steps_half` (masked models): N steps in another order, or N/2 steps.
    - `multi_step`: exactly N masks, N steps, the surest first; causal: N greedy tokens.
    - `one_step` (masked models): all N masks committed at once.
    - `any_order` (masked models): every masked slot in every state that shows right tokens elsewhere; in one
      state for each number of them where there are more than 31. Right in all states means right on every
      rung above: decoding goes through such states only.
    - `canvas8`, `canvas16`, `canvas32`: a longer canvas; exact if only the answer stands before the end of
      the text. Left out where the answer does not fit.
    - `in_context`: as `multi_step`, with a sentence that has nothing to do with it before the prompt.

    Args:
        config: seed and temperature of the decoding.
    """
    base = DecodeConfig(temperature=config.temperature, eps=config.eps, seed=config.seed)
    out = _teacher_forced(adapter, prompts, answers)
    scores = score_prompts(adapter, prompts, answers, base)
    if not adapter.denoises:
        _add(out, "multi_step", scores)
    else:
        for rungs, more in zip(out, decodings(adapter, prompts, answers, base, scores)):
            rungs |= more
        for rungs, prompt, answer in zip(out, prompts, answers):
            rungs["any_order"] = any_order(adapter, *_ids(adapter, prompt, answer))
    for canvas in CANVASES:
        which = [i for i, score in enumerate(scores) if score["n_tokens"] <= canvas]
        some = [prompts[i] for i in which], [answers[i] for i in which]
        for i, score in zip(which, score_prompts(adapter, *some, replace(base, canvas=canvas))):
            exact = score["text_to_end"] == answers[i].strip()
            out[i][f"canvas{canvas}"] = {"token_acc": score["token_acc"], "exact": exact}
    _add(out, "in_context", score_prompts(adapter, [f"{DISTRACTOR} {p}" for p in prompts], answers, base))
    return out


def decodings(
    adapter: Adapter,
    prompts: Sequence[str],
    answers: Sequence[str],
    config: DecodeConfig = DecodeConfig(),
    scores: Sequence[Score] | None = None,
) -> list[dict[str, Rung]]:
    """The rungs of a masked model that are ways of decoding exactly N masks: `left_to_right`, `random`,
    `multi_step`, `steps_half` and `one_step`.

    Args:
        scores: those of N steps, the surest first, where they are known already.
    """
    base = DecodeConfig(temperature=config.temperature, eps=config.eps, seed=config.seed)
    out: list[dict[str, Rung]] = [{} for _ in prompts]
    for order in ("left_to_right", "random"):
        _add(out, order, score_prompts(adapter, prompts, answers, replace(base, order=order)))
    scores = score_prompts(adapter, prompts, answers, base) if scores is None else scores
    _add(out, "multi_step", scores)
    _fewer_steps(adapter, prompts, answers, base, scores, out)
    return out


def remasked(
    adapter: Adapter, prompts: Sequence[str], answers: Sequence[str], config: DecodeConfig = DecodeConfig()
) -> list[Rung]:
    """N steps, and then every slot masked again and written anew, the least sure first: what a decoder can do
    about an answer that went wrong on the way, without an edit that foresaw it. Twice the forward passes.
    """
    base = DecodeConfig(temperature=config.temperature, eps=config.eps, seed=config.seed)
    rungs: list[Rung] = []
    for prompt, answer in zip(prompts, answers):
        rounds = len(target_ids(adapter, prompt, answer))
        (score,) = score_prompts(adapter, [prompt], [answer], replace(base, remask=rounds))
        rungs.append({"token_acc": score["token_acc"], "exact": score["exact"]})
    return rungs


def _add(out: Sequence[dict[str, Rung]], name: str, scores: Sequence[Score]) -> None:
    for rungs, score in zip(out, scores):
        rungs[name] = {"token_acc": score["token_acc"], "exact": score["exact"]}


def _fewer_steps(
    adapter: Adapter,
    prompts: Sequence[str],
    answers: Sequence[str],
    base: DecodeConfig,
    scores: Sequence[Score],
    out: Sequence[dict[str, Rung]],
) -> None:
    """Half the steps; one step, which `scores` know already."""
    lengths = [score["n_tokens"] for score in scores]
    for length in sorted(set(lengths)):
        which = [i for i, n in enumerate(lengths) if n == length]
        some = [prompts[i] for i in which], [answers[i] for i in which]
        halved = score_prompts(adapter, *some, replace(base, steps=math.ceil(length / 2)))
        _add([out[i] for i in which], "steps_half", halved)
    for rungs, score in zip(out, scores):
        rungs["one_step"] = {"token_acc": score["one_step"], "exact": score["one_step_exact"]}


def _ids(adapter: Adapter, prompt: str, answer: str) -> tuple[Int[Tensor, " _"], Int[Tensor, " _"]]:
    return torch.tensor(encode(adapter, prompt.rstrip())), target_ids(adapter, prompt, answer)


def _teacher_forced(
    adapter: Adapter, prompts: Sequence[str], answers: Sequence[str]
) -> list[dict[str, Rung]]:
    ids = [_ids(adapter, prompt, answer) for prompt, answer in zip(prompts, answers)]
    forced = teacher_forced(adapter, [prompt for prompt, _ in ids], [target for _, target in ids])
    return [
        {"teacher_forced": {"token_acc": float(right.double().mean()), "exact": bool(right.all())}}
        for right in forced
    ]


def any_order(adapter: Adapter, prompt: Int[Tensor, " _"], target: Int[Tensor, " _"]) -> Rung:
    """The share of masked slots whose best token is right, over states as `enumerate` weighs them."""
    blocks = adapter.blocks(len(prompt), len(target))
    states = schedule("enumerate", blocks, _MAX_STATES).draw(0, torch.Generator().manual_seed(0))
    right = right_in(adapter, prompt, target, states.revealed)
    shares = (right & states.scored).sum(1) / states.scored.sum(1)
    exact = bool((right | ~states.scored).all())
    return {"token_acc": float((states.weights * shares).sum()), "exact": exact, "states": len(right)}


def given_k(adapter: Adapter, prompt: str, answer: str, seed: int = 0) -> list[bool]:
    """Exact match given k right tokens (a random set for each k, block by block), k = 0..N-1; masked only."""
    target = target_ids(adapter, prompt, answer)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(encode(adapter, prompt.rstrip()))
    slots = Slots(adapter.blocks(len(ids), len(target)))
    states = [random_state(slots, k, generator)[0] for k in range(len(target))]
    given = [torch.where(torch.tensor(shown), target, -1) for shown in states]
    paths = decode(adapter, [ids] * len(given), [len(target)] * len(given), DecodeConfig(), given=given)
    return [bool(torch.equal(path.tokens[: len(target)], target)) for path in paths]
