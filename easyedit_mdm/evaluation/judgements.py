"""CounterFact's scores from likelihoods (Meng et al., arXiv 2202.05262, section 3.3): which of two objects a model holds likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import encode, target_ids


def preference(
    adapter: Adapter, prompts: Sequence[str], target_new: str, target_true: str, normalised: bool = False, samples: int = 128, seed: int = 0
) -> dict[str, list[float]]:
    """log p of both objects after each prompt.

    Args:
        normalised: divide by the number of tokens, so that longer objects are not punished for their length.
        samples, seed: of the Monte Carlo estimator, where it is used (`easyedit_mdm.denoising.log_likelihood`).

    Returns:
        `new`, `true` (nats) and `difference` = p(new) - p(true), a list each.
    """
    ids = [torch.tensor(encode(adapter, p.rstrip())) for p in prompts]
    found = {}
    for name, text in (("new", target_new), ("true", target_true)):
        targets = [target_ids(adapter, p, text) for p in prompts]
        values = log_likelihood(adapter, ids, targets, samples=samples, seed=seed)
        found[name] = [v / len(t) for v, t in zip(values, targets)] if normalised else values
    difference = [float(torch.tensor(n).exp() - torch.tensor(t).exp()) for n, t in zip(found["new"], found["true"])]
    return {**found, "difference": difference}


def counterfact_scores(
    adapter: Adapter,
    prompt: str,
    paraphrases: Sequence[str],
    neighbours: Sequence[str],
    target_new: str,
    target_true: str,
    normalised: bool = False,
    samples: int = 128,
) -> dict[str, Any]:
    """ES, PS, NS (share of prompts on which the right object is likelier) and EM, PM, NM (mean difference in probability).

    Right is the new object on the prompt and its paraphrases, the true one on neighbours, whose difference is turned round.
    """
    out: dict[str, Any] = {}
    for letter, prompts, sign in (("E", [prompt], 1), ("P", paraphrases, 1), ("N", neighbours, -1)):
        if not prompts:
            continue
        found = preference(adapter, prompts, target_new, target_true, normalised, samples)
        wins = [sign * (n - t) > 0 for n, t in zip(found["new"], found["true"])]
        out[f"{letter}S"] = sum(wins) / len(wins)
        out[f"{letter}M"] = sign * sum(found["difference"]) / len(wins)
    return out
