"""The multi-step metric: decode as many slots as the answer has tokens, really step by step, and compare.

Defined in docs/metrics.md. For autoregressive models the same keys come from greedy generation, so that records of both
paradigms can stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from easyedit_mdm.denoising import DecodeConfig, Trajectory, decode
from easyedit_mdm.errors import RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.prompts import encode, target_ids


def score_prompts(adapter: Adapter, prompts: Sequence[str], answers: Sequence[str], config: DecodeConfig = DecodeConfig()) -> list[dict[str, Any]]:
    """Decode after each prompt and compare with its answer; all prompts go through the model together.

    Args:
        answers: one a prompt; its token count N is the number of slots that are compared.
        config: decode settings; a canvas longer than N is compared on its first N slots.

    Returns:
        for each prompt: `token_acc` (share of the N slots that are right), `exact` (all are), `first_commit` (the first
        slot committed was right), `one_step` (share that is right when all slots are committed at the first step; for
        autoregressive models: teacher-forced token accuracy), `text`, `n_tokens`, `tokens` (the N ids), `decode` (settings).

    Raises:
        RequestError: if an answer has no tokens or is longer than the canvas or the model.
    """
    if not prompts:
        return []
    targets = [target_ids(adapter, p, a) for p, a in zip(prompts, answers, strict=True)]
    for answer, target in zip(answers, targets):
        if config.canvas is not None and len(target) > config.canvas:
            raise RequestError(f"answer {answer!r} has {len(target)} tokens, more than the canvas of {config.canvas} masks")
    ids = [torch.tensor(encode(adapter, p.rstrip())) for p in prompts]
    paths = decode(adapter, ids, [len(t) for t in targets], config)
    if adapter.masked:
        at_once = [_share(path.one_step[: len(t)], t) for path, t in zip(paths, targets)]
    else:
        at_once = teacher_forced(adapter, ids, targets)
    scored = zip(paths, targets, at_once, map(len, ids))
    return [_score(adapter, path, t, once, config, prompt) for path, t, once, prompt in scored]


def _score(
    adapter: Adapter, path: Trajectory, target: Int[Tensor, " n"], one_step: float, config: DecodeConfig, prompt: int
) -> dict[str, Any]:
    """What is said of one path, after a prompt of `prompt` tokens."""
    n = len(target)
    written = path.tokens[:n]
    first = path.first_committed()
    plan = config.plan(len(path.tokens), adapter.attention, prompt) if adapter.masked else None
    settings = replace(config, canvas=len(path.tokens), steps=plan.steps if plan else len(path.tokens), block_length=plan.block if plan else None)
    return {
        "token_acc": _share(written, target),
        "exact": bool(torch.equal(written, target)),
        # past the answer's end there is no right token to commit: only the end of the text, or anything after it
        "first_commit": bool(first < n and path.tokens[first] == target[first]),
        "one_step": one_step,
        "text": adapter.tokenizer.decode(path.tokens.tolist(), skip_special_tokens=True).strip(),
        "text_to_end": _to_end(adapter, path.tokens),
        "n_tokens": n,
        "tokens": written.tolist(),
        "decode": settings.record() if adapter.masked else {**settings.record(), "order": "greedy"},
    }


def _to_end(adapter: Adapter, tokens: Int[Tensor, " canvas"]) -> str:
    """The canvas up to its first end-of-text token."""
    ends = (tokens == adapter.ids.eos).nonzero() if adapter.ids.eos is not None else tokens[:0]
    kept = tokens[: int(ends[0])] if len(ends) else tokens
    return adapter.tokenizer.decode(kept.tolist(), skip_special_tokens=True).strip()


def _share(written: Int[Tensor, " n"], target: Int[Tensor, " n"]) -> float:
    return float((written == target).double().mean())


@torch.no_grad()
def teacher_forced(adapter: Adapter, prompts: Sequence[Int[Tensor, " _"]], targets: Sequence[Int[Tensor, " _"]]) -> list[float]:
    """Share of the answer's tokens that a causal model predicts, each after the right ones before it (EasyEdit's token accuracy)."""
    ids, mask = right_padded([torch.cat([p, t]) for p, t in zip(prompts, targets)], adapter.ids.pad, adapter.device)
    most = max(len(t) for t in targets)
    at = torch.tensor([[min(len(p) + i, len(p) + len(t) - 1) for i in range(most)] for p, t in zip(prompts, targets)], device=ids.device)
    best = adapter.token_logits(ids, mask, at=at).argmax(-1).cpu()
    return [_share(best[i, : len(t)], t) for i, t in enumerate(targets)]
