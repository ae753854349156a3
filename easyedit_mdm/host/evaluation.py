"""EasyEdit's evaluation record for masked models, and the multi-step section for both paradigms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from easyedit_mdm.denoising import DecodeConfig
from easyedit_mdm.errors import HyperParameterError, RequestError
from easyedit_mdm.evaluation import fluency
from easyedit_mdm.evaluation.multi_step import Question, score_questions
from easyedit_mdm.evaluation.records import Sections, scores
from easyedit_mdm.models import Adapter

GROUP = "mdm.multi_step_denoising.token_accuracy"
LOCALITY_GROUP = "locality.mdm.multi_step_denoising.token_match"
_NOT_FOR_MASKED = ("ppl", "ood_ppl")


def edit_quality(
    adapter: Adapter,
    record: Mapping[str, Any],
    config: DecodeConfig,
    eval_metric: str = "token_em",
    test_generation: bool = False,
) -> dict[str, Any]:
    """What EasyEdit's `compute_edit_quality` returns, from iterative denoising.

    `rewrite_acc` and `rephrase_acc` are lists of token accuracies, `locality` holds the tokens written for
    each prompt (compared before and after by EasyEdit), `portability` token accuracies, `multi_step` all
    scores.

    Raises:
        HyperParameterError: for EasyEdit's perplexity metrics, which have no meaning for a masked model.
    """
    if eval_metric in _NOT_FOR_MASKED:
        raise HyperParameterError(
            f"eval_metric={eval_metric!r} scores next tokens and means nothing for a masked model: use "
            "'token_em'"
        )
    scored = multi_step(adapter, record, config)
    result: dict[str, Any] = {"metric_meta": {}}
    for name, part in (("rewrite", scored.get("rewrite")), ("rephrase", scored.get("rephrase"))):
        if part is not None:
            result[f"{name}_acc"] = [score["token_acc"] for score in scores(part)]
            result["metric_meta"][name] = meta(f"{name}_acc", GROUP)
    result["locality"] = {
        f"{key}_output": [score["tokens"] for score in scores(part)]
        for key, part in scored["locality"].items()
    }
    result["portability"] = {
        f"{key}_acc": [score["token_acc"] for score in scores(part)]
        for key, part in scored["portability"].items()
    }
    if test_generation:
        entropies = [fluency(adapter, p)["ngram_entropy"] for p in _listed(record["prompt"])]
        result["fluency"] = {"ngram_entropy": sum(entropies) / len(entropies)}
    result["multi_step"] = public(scored)
    return result


def multi_step(adapter: Adapter, record: Mapping[str, Any], config: DecodeConfig) -> Sections:
    """Scores of all prompts of EasyEdit's record, decoded in one batch; lists where EasyEdit has lists."""
    questions = _questions("rewrite", None, record["prompt"], record["target_new"])
    if record.get("rephrase_prompt"):
        questions += _questions("rephrase", None, record["rephrase_prompt"], record["target_new"])
    for section in ("locality", "portability"):
        for key, value in (record.get(section) or {}).items():
            questions += _questions(section, key, value["prompt"], value["ground_truth"])
    return score_questions(adapter, questions, config)


def _questions(section: str, key: str | None, prompts: Any, answers: Any) -> list[Question]:
    """Prompts to score; a single answer serves all prompts of a list."""
    listed = _listed(prompts)
    wanted = answers if isinstance(answers, list) else [answers] * len(listed)
    if len(wanted) != len(listed) or not all(isinstance(a, str) and a.strip() for a in wanted):
        name = section if key is None else f"{section}.{key}"
        raise RequestError(f"{name}: each of {prompts!r} needs an answer that is not empty, got {answers!r}")
    alone = not isinstance(prompts, list)
    return [Question(section, prompt, answer, key, alone) for prompt, answer in zip(listed, wanted)]


def public(scored: Sections) -> Sections:
    """Scores as they go into EasyEdit's records: without the raw token ids."""
    shown = copy.deepcopy(scored)
    for score in scores(list(shown.values())):
        score.pop("tokens", None)
    return shown


def meta(result_key: str, group: str) -> dict[str, str]:
    """EasyEdit's metric metadata: numbers of different groups are not to be averaged together."""
    scorer = group.rsplit(".", 1)[1]
    return {
        "result_key": result_key,
        "protocol": "multi_step_denoising",
        "scorer": scorer,
        "comparable_group": group,
    }


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]
