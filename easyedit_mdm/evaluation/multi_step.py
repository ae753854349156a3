"""The multi-step metric: decode as many slots as the answer has tokens, really step by step, and compare.

Defined in docs/metrics.md. For autoregressive models the same keys come from greedy generation, so that
records of both paradigms can stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from easyedit_mdm.denoising import DecodeConfig, Trajectory, decode
from easyedit_mdm.denoising.sampler import writable
from easyedit_mdm.errors import RequestError
from easyedit_mdm.evaluation.records import Score, Sections
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.prompts import encode, target_ids


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that is wanted, and where its score stands in a case's record.

    Attributes:
        section: `rewrite`, `rephrase`, `locality`, ...
        key: its name within the section, where sections have names in them (`neighborhood`).
        alone: the score stands there by itself; else in a list.
    """

    section: str
    prompt: str
    answer: str
    key: str | None = None
    alone: bool = False


def score_questions(
    adapter: Adapter, questions: Sequence[Question], config: DecodeConfig = DecodeConfig()
) -> Sections:
    """The scores of a case, all questions decoded in one batch, in the one layout that records have.

    Raises:
        RequestError: as `score_prompts`.
    """
    sections: dict[str, Any] = {"locality": {}, "portability": {}}
    scored = score_prompts(adapter, [q.prompt for q in questions], [q.answer for q in questions], config)
    for question, score in zip(questions, scored):
        place = sections if question.key is None else sections.setdefault(question.section, {})
        name = question.key or question.section
        if question.alone:
            place[name] = score
        else:
            place.setdefault(name, []).append(score)
    return cast(Sections, sections)


def score_prompts(
    adapter: Adapter, prompts: Sequence[str], answers: Sequence[str], config: DecodeConfig = DecodeConfig()
) -> list[Score]:
    """Decode after each prompt and compare with its answer; all prompts go through the model together.

    Args:
        answers: one a prompt; its token count N is the number of slots that are compared.
        config: decode settings; a canvas longer than N is compared on its first N slots.

    Returns:
        a score for each prompt.

    Raises:
        RequestError: if an answer has no tokens or is longer than the canvas or the model.
    """
    if not prompts:
        return []
    targets = [target_ids(adapter, p, a) for p, a in zip(prompts, answers, strict=True)]
    for answer, target in zip(answers, targets):
        if config.canvas is not None and len(target) > config.canvas:
            raise RequestError(
                f"answer {answer!r} has {len(target)} tokens, more than the canvas of {config.canvas} masks"
            )
    ids = [torch.tensor(encode(adapter, p.rstrip())) for p in prompts]
    paths = decode(adapter, ids, [len(t) for t in targets], config)
    scores = [_score(adapter, path, t, config, len(prompt)) for path, t, prompt in zip(paths, targets, ids)]
    if adapter.denoises:
        for score, path, target in zip(scores, paths, targets):
            once = path.one_step[: len(target)]
            score |= {"one_step": _share(once, target), "one_step_exact": bool(torch.equal(once, target))}
    else:
        for score, right in zip(scores, teacher_forced(adapter, ids, targets)):
            score["teacher_forced"] = float(right.double().mean())
    return scores


def _score(
    adapter: Adapter, path: Trajectory, target: Int[Tensor, " n"], config: DecodeConfig, prompt: int
) -> Score:
    """What is said of one path, after a prompt of `prompt` tokens."""
    n, canvas = len(target), len(path.tokens)
    written = path.tokens[:n]
    first = path.first_committed()
    plan = config.plan(canvas, adapter.attention, adapter.before + prompt) if adapter.denoises else None
    steps, block = (plan.steps, plan.block) if plan else (canvas, None)
    settings = replace(config, canvas=canvas, steps=steps, block_length=block).record()
    return {
        "token_acc": _share(written, target),
        "exact": bool(torch.equal(written, target)),
        # past the answer's end no token is right: only the end of the text, or anything after it
        "first_commit": bool(first < n and path.tokens[first] == target[first]),
        "text": adapter.tokenizer.decode(path.tokens.tolist(), skip_special_tokens=True).strip(),
        "text_to_end": _to_end(adapter, path.tokens),
        "n_tokens": n,
        "tokens": written.tolist(),
        "decode": settings if adapter.denoises else {**settings, "order": "greedy"},
    }


def _to_end(adapter: Adapter, tokens: Int[Tensor, " canvas"]) -> str:
    """The canvas up to its first end-of-text token."""
    ends = (tokens == adapter.ids.eos).nonzero() if adapter.ids.eos is not None else tokens[:0]
    kept = tokens[: int(ends[0])] if len(ends) else tokens
    return adapter.tokenizer.decode(kept.tolist(), skip_special_tokens=True).strip()


def _share(written: Int[Tensor, " n"], target: Int[Tensor, " n"]) -> float:
    return float((written == target).double().mean())


def teacher_forced(
    adapter: Adapter, prompts: Sequence[Int[Tensor, " _"]], targets: Sequence[Int[Tensor, " _"]]
) -> list[Bool[Tensor, " _"]]:
    """Whether each token of an answer is predicted after the right ones (EasyEdit's token accuracy).

    In both paradigms from left to right; a masked model sees masks at and after the token. As in decoding,
    the mask and ids without a token are never predicted. So all tokens are right just where decoding from
    left to right writes the answer.
    """
    if not adapter.denoises:
        rows = [torch.cat([p, t]) for p, t in zip(prompts, targets)]
        best = best_tokens(adapter, rows, [len(p) for p in prompts], [len(t) for t in targets])
        return [tokens == target for tokens, target in zip(best, targets)]
    before = [torch.ones(len(t), len(t)).tril(-1).bool() for t in targets]
    return [right_in(adapter, p, t, shown).diagonal() for p, t, shown in zip(prompts, targets, before)]


def right_in(
    adapter: Adapter, prompt: Int[Tensor, " _"], target: Int[Tensor, " n"], shown: Bool[Tensor, "states n"]
) -> Bool[Tensor, "states n"]:
    """Whether a masked model's best token of each slot is the right one, in states that show some others."""
    rows = [torch.cat([prompt, adapter.hidden.around(target, some, i)]) for i, some in enumerate(shown)]
    best = best_tokens(adapter, rows, [len(prompt)] * len(rows), [len(target)] * len(rows))
    return torch.stack(best) == target


@torch.no_grad()
def best_tokens(
    adapter: Adapter, rows: list[Int[Tensor, " _"]], starts: Sequence[int], lengths: Sequence[int]
) -> list[Int[Tensor, " _"]]:
    """The token that decoding would choose for each slot, at temperature 0, where a row's slots start."""
    ids, mask = right_padded(rows, adapter.ids.pad, adapter.device)
    canvas = torch.tensor(starts, device=ids.device)
    at = canvas[:, None] + torch.arange(max(lengths), device=ids.device)
    logits = adapter.token_logits(ids, mask, at=at.clamp(max=ids.shape[1] - 1), canvas=canvas)
    best = writable(adapter, logits.float()).argmax(-1).cpu()
    return [tokens[:length] for tokens, length in zip(best, lengths)]
