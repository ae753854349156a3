"""The model that lm-evaluation-harness runs under the name `easyedit_mdm`; importing this registers it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from easyedit_mdm.api import load_model
from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.harness import load_edits
from easyedit_mdm.harness.scoring import (
    Likelihood,
    Scoring,
    greedy,
    likelihoods,
    rolling,
    split,
    write_until,
)
from easyedit_mdm.models import Adapter

LOG = logging.getLogger(__name__)
_SCORING = ("likelihood", "samples", "seed", "rows", "canvas", "steps")
_LOADING = ("dtype", "revision", "mask_id", "block", "family")


@register_model("easyedit_mdm")
class EditedLM(LM):
    """A model by name, folder or hub id, with or without edits.

    Args:
        pretrained: what `load_model` takes, or a model that is loaded already.
        edits: a folder that `easyedit-mdm edit` wrote, or a folder of such folders.
        batch_size: the harness's; rows of one forward pass. `auto` leaves them as they are.
        options: those of `Scoring`, and `dtype`, `revision`, `mask_id`, `block`, `family` of `load_model`.

    Raises:
        HyperParameterError: for an unknown option.
        CheckpointError, EditError: if the model or an edit cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | Adapter,
        edits: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        unknown = sorted(set(options) - {*_SCORING, *_LOADING})
        if unknown:
            near = did_you_mean(unknown[0], ("pretrained", "edits", *_SCORING, *_LOADING))
            raise HyperParameterError(f"model_args: unknown {', '.join(unknown)}{near}")
        settings = {name: options[name] for name in _SCORING if name in options}
        if batch_size not in (None, "auto"):
            settings.setdefault("rows", int(str(batch_size)))
        self.scoring = Scoring(**settings)
        loading = {name: options[name] for name in _LOADING if name in options}
        self.adapter = (
            pretrained
            if isinstance(pretrained, Adapter)
            else load_model(pretrained, device=_there(device), **loading)
        )
        self.edits = [] if edits is None else load_edits(edits)
        for edit in self.edits:
            edit.apply(self.adapter)
        self._device = self.adapter.device
        self._found: list[Likelihood] = []

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `scoring.likelihoods` and `scoring.greedy`; choices of one question get the same draws."""
        pairs = [split(self.adapter, *request.args) for request in requests]
        draws = [int(getattr(request, "doc_id", None) or 0) for request in requests]
        scored = likelihoods(self.adapter, pairs, self.scoring, draws)
        self._found += scored
        return [(f.value, g) for f, g in zip(scored, greedy(self.adapter, pairs, self.scoring))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """See `scoring.rolling`."""
        values = []
        for request in tqdm(requests, disable=disable_tqdm, desc="texts"):
            draw = int(getattr(request, "doc_id", None) or 0)
            self._found.append(rolling(self.adapter, request.args[0], self.scoring, draw))
            values.append(self._found[-1].value)
        return values

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See `scoring.write_until`."""
        return [
            write_until(self.adapter, request.args[0], request.args[1], self.scoring)
            for request in tqdm(requests, disable=disable_tqdm, desc="generations")
        ]

    def forget(self) -> None:
        """Forget the likelihoods that `get_model_info` sums up."""
        self._found = []

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: edits, settings, and the errors of its likelihoods."""
        estimated = [likelihood.error for likelihood in self._found if likelihood.error]
        return {
            "edits": [edit.card.get("id") for edit in self.edits],
            "scoring": vars(self.scoring),
            "likelihoods": {
                "exact": len(self._found) - len(estimated),
                "estimated": len(estimated),
                "mean_standard_error": sum(estimated) / len(estimated) if estimated else 0.0,
                "largest_standard_error": max(estimated, default=0.0),
            },
        }

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests."""
        return str(self.adapter.name).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's own chat template."""
        return self.adapter.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def _there(device: str | None) -> str | None:
    """The device; the harness's command line says `cuda` where nobody asked, also without one."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        LOG.warning("there is no CUDA device: %s is not used", device)
        return None
    return device
