"""CounterFact's scores from likelihoods (Meng et al., arXiv 2202.05262, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from easyedit_mdm.denoising import log_likelihood
from easyedit_mdm.denoising.likelihood import default_method
from easyedit_mdm.denoising.states import Slots
from easyedit_mdm.evaluation.records import Counterfact
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import encode, target_ids


class Preference:
    """log p of two objects after each of some prompts, by one likelihood.

    A masked model's likelihood is `exact` where all targets are short enough for that, else `llada` for all
    of them, from the same draws: an exact value is not held against an estimate.

    Args:
        samples, seed: of the Monte Carlo estimator (`easyedit_mdm.denoising.log_likelihood`).

    Attributes:
        likelihood: which one.
        new, true: log p in nats, one a prompt, summed over the object's tokens.
        new_tokens, true_tokens: numbers of tokens, one a prompt.
    """

    def __init__(
        self,
        adapter: Adapter,
        prompts: Sequence[str],
        target_new: str,
        target_true: str,
        samples: int = 128,
        seed: int = 0,
    ):
        ids = [torch.tensor(encode(adapter, p.rstrip())) for p in prompts]
        new, true = ([target_ids(adapter, p, text) for p in prompts] for text in (target_new, target_true))
        blocks = [adapter.blocks(len(p), len(t)) for p, *both in zip(ids, new, true) for t in both]
        methods = {default_method(adapter, Slots(sizes)) for sizes in blocks}
        self.likelihood = methods.pop() if len(methods) == 1 else "llada"
        self.new, self.true = (
            log_likelihood(adapter, ids, targets, self.likelihood, samples, seed) for targets in (new, true)
        )
        self.new_tokens, self.true_tokens = ([len(t) for t in targets] for targets in (new, true))

    def log_probabilities(self, per_token: bool) -> list[tuple[float, float]]:
        """(new, true) for each prompt; `per_token`: means, which do not punish longer objects."""
        if not per_token:
            return list(zip(self.new, self.true))
        counts = zip(self.new_tokens, self.true_tokens)
        return [(new / n, true / t) for new, true, (n, t) in zip(self.new, self.true, counts)]


def counterfact_scores(
    adapter: Adapter,
    prompt: str,
    paraphrases: Sequence[str],
    neighbours: Sequence[str],
    target_new: str,
    target_true: str,
    samples: int = 128,
) -> Counterfact:
    """ES, PS, NS (share of prompts on which the right object is likelier), EM, PM, NM (mean difference in p).

    Right is the new object on the prompt and its paraphrases, the true one on neighbours, whose difference is
    turned round. All prompts are judged by one likelihood.

    Returns:
        the scores from `sum` and `per_token` log-probabilities, and the name of the `likelihood`. A masked
        model's is a bound of log p, and not to be compared with an autoregressive model's.
    """
    prompts = [prompt, *paraphrases, *neighbours]
    preference = Preference(adapter, prompts, target_new, target_true, samples)
    return {
        "sum": _scores(preference.log_probabilities(per_token=False), len(paraphrases)),
        "per_token": _scores(preference.log_probabilities(per_token=True), len(paraphrases)),
        "likelihood": preference.likelihood,
    }


def _scores(pairs: Sequence[tuple[float, float]], paraphrases: int) -> dict[str, float]:
    ends = 1, 1 + paraphrases
    out: dict[str, float] = {}
    for letter, some, sign in (
        ("E", pairs[: ends[0]], 1),
        ("P", pairs[ends[0] : ends[1]], 1),
        ("N", pairs[ends[1] :], -1),
    ):
        if some:
            new, true = torch.tensor(some, dtype=torch.float64).T
            out[f"{letter}S"] = float((sign * (new - true) > 0).double().mean())
            out[f"{letter}M"] = float((sign * (new.exp() - true.exp())).mean())
    return out
