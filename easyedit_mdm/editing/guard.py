"""The collapse guard, as far as the update alone tells: figures that grow before a model breaks, held against
thresholds.

One rank-one edit can ruin a model (Yang et al., arXiv 2402.09656); it shows in a tiny denominator (Gupta et
al., arXiv 2403.07175), in the norm of the update, and at the latest in perplexity, which
`easyedit_mdm.evaluation.guard` adds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from easyedit_mdm.common.kinds import checked
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.errors import HyperParameterError, StatisticsError
from easyedit_mdm.statistics import text_source

TEXTS, WORDS = 6, 24
_PLAIN = (
    (
        "The river rises in the hills to the north and reaches the sea after a journey of about two hundred"
        " miles."
    ),
    (
        "She put the letters back into the drawer, locked it, and went downstairs to make some tea before the"
        " others came home."
    ),
    "Water boils at a lower temperature on a mountain because the pressure of the air is lower there.",
    "The committee met on Tuesday to discuss the budget for the coming year, but no decision was taken.",
    "He learned to play the piano as a child and gave his first concert at the age of twelve.",
    "Most of the houses in the old town were built of stone, with small windows and steep roofs.",
)


@dataclass(frozen=True)
class GuardConfig:
    """Thresholds; None leaves a figure out. Where the defaults come from is told in docs/edits.md.

    Attributes:
        norm_ratio: the most that ||dW|| / ||W|| may be in any weight (Frobenius norms), of one edit and of
            all edits of a sequence together.
        condition: the largest condition number of the second moments, with their ridge.
        denominator: the least that the closed form may divide by, next to what it could have been: |k . u| /
            ||k|| of a rank-one method, smallest over largest pivot of a batched one's system.
        perplexity_ratio: the most that perplexity of held-out text may grow by (pseudo-perplexity of a masked
            model).
        text: the held-out text (`easyedit_mdm.statistics.text_source`); by default that of the statistics if
            it is a file or ships with the package, else a few plain sentences.
    """

    norm_ratio: float | int | None = 20.0
    condition: float | int | None = 1e9
    denominator: float | int | None = 1e-4
    perplexity_ratio: float | int | None = 3.0
    text: str | None = None

    def __post_init__(self) -> None:
        for name in ("norm_ratio", "condition", "denominator", "perplexity_ratio"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value <= 0
            ):
                raise HyperParameterError(
                    f"guard setting {name}={value!r} must be a number above 0, or null to leave it out"
                )
        if self.text is not None and not isinstance(self.text, str):
            raise HyperParameterError(f"guard setting text={self.text!r} must name a text")

    @classmethod
    def of(cls, settings: Any) -> GuardConfig:
        """From a mapping, as hyperparameter files hold it.

        Raises:
            HyperParameterError: for a setting that does not exist, or has no sense.
        """
        if not isinstance(settings, Mapping):
            raise HyperParameterError(
                f"guard={settings!r} must be a mapping of thresholds, {{}} for the defaults, or null for no"
                " guard"
            )
        return cls(**checked(cls, settings, "guard setting"))


def update_figures(edit: Edit, model: nn.Module) -> dict[str, float | None]:
    """The worst of `norm_ratio`, `condition` and `denominator` over an edit's weights; None for what its
    method does not know.

    Raises:
        EditError: if the edit does not fit the model.
    """
    updates = list(_solved_systems(edit.card))
    conditions = [_number(t["condition"]) for t in updates if "condition" in t]
    denominators = [
        abs(_number(t["denominator"], 0.0)) / (_number(t["key_norm"]) if "key_norm" in t else 1.0)
        for t in updates
        if "denominator" in t
    ]
    return {
        "norm_ratio": max((row["norm_ratio"] for row in edit.diff(model)), default=None),
        "condition": max(conditions, default=None),
        "denominator": min(denominators, default=None),
    }


def reasons(figures: Mapping[str, float | None], config: GuardConfig) -> list[str]:
    """What lies past a threshold, in words; empty if all is well."""
    exceeded = []
    limits = {"norm_ratio_all": config.norm_ratio, **dataclasses.asdict(config)}
    for name, wrong in (
        ("norm_ratio", "above"),
        ("norm_ratio_all", "above"),
        ("condition", "above"),
        ("perplexity_ratio", "above"),
        ("denominator", "below"),
    ):
        value, limit = figures.get(name), limits[name]
        if (
            value is not None
            and limit is not None
            and not (value <= limit if wrong == "above" else value >= limit)
        ):
            exceeded.append(f"{name} {value:.3g} is {wrong} {limit:.3g}")
    return exceeded


def _solved_systems(card: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the method wrote of each system that it solved: the card itself, or one entry a layer; of each
    part, if the edit is composed.
    """
    yield card
    yield from card.get("layers", {}).values()


def _number(value: Any, missing: float = math.inf) -> float:
    """A figure; what JSON could not hold (infinity) has become null."""
    return missing if value is None else float(value)


def held_out(name: str | None, asked: bool = True) -> list[str]:
    """A few lines of a text, or plain sentences.

    Args:
        name: a text (`text_source`), or None.
        asked: the text was asked for by name, so it must be there; else it is used only if it is at hand
            without a network.

    Raises:
        StatisticsError: if a text that was asked for is missing, or has no line of some length.
    """
    if name is None or (not asked and str(name).startswith("datasets:")):
        return list(_PLAIN)
    try:
        document = next(iter(text_source(name).documents()), "")
    except StatisticsError:
        if asked:
            raise
        return list(_PLAIN)
    lines = [line.split()[:WORDS] for line in document.splitlines() if len(line.split()) > 5]
    if not lines and asked:
        raise StatisticsError(
            f"the guard's text {str(name)!r} has no line of more than five words: give a text of sentences"
        )
    step = max(1, len(lines) // TEXTS)
    return [" ".join(words) for words in lines[::step][:TEXTS]] or list(_PLAIN)
