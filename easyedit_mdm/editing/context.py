"""Context prefixes: random text before the prompt, so that an edit does not hang on the prompt standing
first.

ROME lets the model write them (Meng et al., section 3.1 of arXiv 2202.05262). Kept per model and setting,
never shared.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from easyedit_mdm.denoising import DecodeConfig, decode
from easyedit_mdm.editing.hparams import StateHyperParams
from easyedit_mdm.editing.request import encode
from easyedit_mdm.models import Adapter

STARTS = ("The", "Therefore", "Because", "I", "You")

_WRITTEN: weakref.WeakKeyDictionary[nn.Module, dict[tuple, tuple[str, ...]]] = weakref.WeakKeyDictionary()


def context_templates(
    adapter: Adapter, length_params: Sequence[Sequence[int]], seed: int = 0
) -> tuple[str, ...]:
    """The bare template `{}` and, for each (length, n) pair, n prefixes of about `length` tokens, each ending
    in ". {}".

    Sampled at temperature 1 from the model itself with a generator of its own: the same model and seed give
    the same prefixes, and a second model never sees the first one's.
    """
    key = (tuple(map(tuple, length_params)), seed)
    written = _WRITTEN.setdefault(adapter.native, {})
    if key not in written:
        generator = torch.Generator().manual_seed(seed)
        texts = [t for length, n in length_params for t in _write(adapter, length, n, generator)]
        written[key] = ("{}", *(t.replace("{", "").replace("}", "") + ". {}" for t in texts))
    return written[key]


def prefixes_of(adapter: Adapter, hparams: StateHyperParams) -> Sequence[str]:
    """The context prefixes of an edit: those that the hyperparameters give, or that the model writes when it
    is first asked.
    """
    given = hparams.context_templates
    return given or context_templates(adapter, hparams.context_template_length_params, hparams.seed)


def _write(adapter: Adapter, length: int, n: int, generator: torch.Generator) -> list[str]:
    starts = [STARTS[i % len(STARTS)] for i in range(n)]
    prompts = [torch.tensor(encode(adapter, start)) for start in starts]
    room = [max(1, length - len(p)) for p in prompts]
    done = decode(adapter, prompts, room, DecodeConfig(order="left_to_right", temperature=1.0), generator)
    return [
        start + adapter.tokenizer.decode(t.tokens, skip_special_tokens=True) for start, t in zip(starts, done)
    ]
