"""Fluency as in ROME's evaluation: the entropy of the bigrams and trigrams of what the model writes after the
prompt.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import torch

from easyedit_mdm.denoising import DecodeConfig, decode
from easyedit_mdm.errors import RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.prompts import encode

LENGTH = 100


def ngram_entropy(text: str) -> float:
    """Mean over n = 2, 3 of the n-gram entropy in bits, weighted 2/3 and 4/3 (Meng et al., arXiv 2202.05262,
    appendix).
    """
    return sum(weight * _entropy(ngram_counts(text, n)) for n, weight in ((2, 2 / 3), (3, 4 / 3))) / 2


def ngram_counts(text: str, n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs. Words are runs of letters and digits; every other visible
    character stands alone.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return Counter(zip(*(words[i:] for i in range(n))))


def _entropy(counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values())


def fluency(adapter: Adapter, prompt: str, length: int = LENGTH, seed: int = 0) -> dict[str, float]:
    """`{"ngram_entropy": bits}` of prompt and continuation, EasyEdit's key, from `length` tokens denoised (or
    sampled) at temperature 1.

    The canvas is shortened to the model's positions where need be.
    """
    ids = torch.tensor(encode(adapter, prompt))
    room = min(length, adapter.max_positions - len(ids))
    if room < 1:
        raise RequestError(
            f"the prompt {prompt[:40]!r}... fills all {adapter.max_positions} positions of {adapter.name}: no"
            " room to write"
        )
    path = decode(adapter, [ids], [room], DecodeConfig(temperature=1.0, order="random", seed=seed))[0]
    return {
        "ngram_entropy": ngram_entropy(
            adapter.tokenizer.decode([*ids.tolist(), *path.tokens.tolist()], skip_special_tokens=True)
        )
    }
