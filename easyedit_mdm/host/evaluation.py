"""EasyEdit's evaluation record for masked models, and the multi-step section for both paradigms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.errors import HyperParameterError, RequestError
from easyedit_mdm.evaluation import fluency, score_prompts
from easyedit_mdm.models import Adapter

GROUP = "mdm.multi_step_denoising.token_accuracy"
LOCALITY_GROUP = "locality.mdm.multi_step_denoising.token_match"
_NOT_FOR_MASKED = ("ppl", "ood_ppl")


def edit_quality(
    adapter: Adapter, record: Mapping[str, Any], config: DecodeConfig, eval_metric: str = "token_em", test_generation: bool = False
) -> dict[str, Any]:
    """What EasyEdit's `compute_edit_quality` returns, from iterative denoising.

    `rewrite_acc` and `rephrase_acc` are lists of token accuracies, `locality` holds the tokens written for each prompt (compared
    before and after by EasyEdit), `portability` token accuracies, `multi_step` all of `score_prompts`.

    Raises:
        HyperParameterError: for EasyEdit's perplexity metrics, which have no meaning for a masked model.
    """
    if eval_metric in _NOT_FOR_MASKED:
        raise HyperParameterError(f"eval_metric={eval_metric!r} scores next tokens and means nothing for a masked model: use 'token_em'")
    scored = multi_step(adapter, record, config)
    result: dict[str, Any] = {"locality": {}, "portability": {}, "metric_meta": {}}
    for section in ("rewrite", "rephrase"):
        if section in scored:
            result[f"{section}_acc"] = _column(scored[section], "token_acc")
            result["metric_meta"][section] = meta(f"{section}_acc", GROUP)
    for key, scores in scored["locality"].items():
        result["locality"][f"{key}_output"] = _column(scores, "tokens")
    for key, scores in scored["portability"].items():
        result["portability"][f"{key}_acc"] = _column(scores, "token_acc")
    if test_generation:
        prompts = _listed(record["prompt"])
        result["fluency"] = {"ngram_entropy": sum(fluency(adapter, p)["ngram_entropy"] for p in prompts) / len(prompts)}
    result["multi_step"] = public(scored)
    return result


def multi_step(adapter: Adapter, record: Mapping[str, Any], config: DecodeConfig) -> dict[str, Any]:
    """Scores of all prompts of a record, decoded in one batch: `{section: {key: list}}`, lists where EasyEdit has lists."""
    asked: list[tuple[tuple[str, ...], str, str, bool]] = []

    def ask(path: tuple[str, ...], prompts: Any, answers: Any) -> None:
        """Note prompts to score; a single answer serves all prompts of a list."""
        listed = isinstance(prompts, list)
        wanted = answers if isinstance(answers, list) else [answers] * len(_listed(prompts))
        if len(wanted) != len(_listed(prompts)) or not all(isinstance(a, str) and a.strip() for a in wanted):
            raise RequestError(f"{'.'.join(path)}: each of {prompts!r} needs an answer that is not empty, got {answers!r}")
        asked.extend((path, p, a, listed) for p, a in zip(_listed(prompts), wanted))

    ask(("rewrite",), record["prompt"], record["target_new"])
    if record.get("rephrase_prompt"):
        ask(("rephrase",), record["rephrase_prompt"], record["target_new"])
    for section in ("locality", "portability"):
        for key, value in (record.get(section) or {}).items():
            ask((section, key), value["prompt"], value["ground_truth"])
    scores = score_prompts(adapter, [a[1] for a in asked], [a[2] for a in asked], config)
    out: dict[str, Any] = {"locality": {}, "portability": {}}
    for (path, _, _, listed), score in zip(asked, scores):
        place = out if len(path) == 1 else out[path[0]]
        if listed:
            place.setdefault(path[-1], []).append(score)
        else:
            place[path[-1]] = score
    return out


def public(scored: dict[str, Any]) -> dict[str, Any]:
    """Scores as they go into records: without the raw token ids."""

    def strip(value: Any) -> Any:
        """Walk down to the scores."""
        if isinstance(value, list):
            return [strip(v) for v in value]
        if "token_acc" in value:
            return {k: v for k, v in value.items() if k != "tokens"}
        return {k: strip(v) for k, v in value.items()}

    return strip(scored)


def meta(result_key: str, group: str) -> dict[str, str]:
    """EasyEdit's metric metadata: numbers of different groups are not to be averaged together."""
    return {"result_key": result_key, "protocol": "multi_step_denoising", "scorer": group.rsplit(".", 1)[1], "comparable_group": group}


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _column(scores: Any, key: str) -> list:
    return [score[key] for score in _listed(scores)]
