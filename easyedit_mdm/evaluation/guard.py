"""The collapse guard: an edit past its thresholds is refused, or taken back, with the figures."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.guard import GuardConfig, reasons, update_figures
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.errors import CollapseError, StatisticsError
from easyedit_mdm.evaluation.perplexity import perplexity
from easyedit_mdm.models import Adapter
from easyedit_mdm.statistics import text_source

TEXTS, WORDS = 6, 24
_PLAIN = (
    "The river rises in the hills to the north and reaches the sea after a journey of about two hundred miles.",
    "She put the letters back into the drawer, locked it, and went downstairs to make some tea before the others came home.",
    "Water boils at a lower temperature on a mountain because the pressure of the air is lower there.",
    "The committee met on Tuesday to discuss the budget for the coming year, but no decision was taken.",
    "He learned to play the piano as a child and gave his first concert at the age of twelve.",
    "Most of the houses in the old town were built of stone, with small windows and steep roofs.",
)


class CollapseGuard:
    """Applies edits to one model and watches what they do to it.

    Args:
        adapter: the model, as it is before the first edit: the perplexity that later edits are held against is taken then, so that
            a sequence of edits cannot ruin the model in small steps.
        config: the thresholds.
    """

    def __init__(self, adapter: Adapter, config: GuardConfig = GuardConfig()):
        self.adapter, self.config = adapter, config
        self._before: float | None = None
        self._texts: list[str] | None = None

    def apply(self, edit: Edit, force: bool = False) -> dict[str, Any]:
        """Apply an edit, unless that would ruin the model.

        Args:
            force: keep it whatever the figures say.

        Returns:
            `on`, `figures`, `thresholds`, `reasons` (past which thresholds), `verdict` (`passed`, or `kept by force`); also in the edit's
            card, as `guard`.

        Raises:
            CollapseError: if a figure lies past its threshold, with all figures; the weights are those of before.
            EditError: if the edit does not fit.
        """
        figures: dict[str, float | None] = update_figures(edit, self.adapter)
        self._judge(edit, figures, force, "refused; no weight was changed")
        if self.config.perplexity_ratio is None:
            edit.apply(self.adapter)
            return self._judge(edit, figures, force, "")
        before = self._baseline(edit)
        edit.apply(self.adapter)
        kept = False
        try:
            after = self._perplexity(edit)
            figures |= {"perplexity_before": before, "perplexity_after": after, "perplexity_ratio": after / before}
            record = self._judge(edit, figures, force, "rolled back; the weights are those of before")
            kept = True
            return record
        finally:
            if not kept and edit.is_applied(self.adapter):
                edit.revert(self.adapter)

    def _judge(self, edit: Edit, figures: dict[str, float | None], force: bool, done: str) -> dict[str, Any]:
        found = reasons(figures, self.config)
        verdict = "passed" if not found else "kept by force" if force else done.split(";")[0]
        record = {"on": True, "verdict": verdict, "reasons": found, "figures": dict(figures), "thresholds": asdict(self.config)}
        edit.card["guard"] = record
        if found and not force:
            shown = ", ".join(f"{k} {'not known' if v is None else format(v, '.3g')}" for k, v in figures.items())
            raise CollapseError(
                f"the edit would damage the model: {'; '.join(found)} ({shown}). It was {done}. Weaken it (clamp_norm_factor, mom2_eps), set the "
                "threshold (guard), or keep it with force (--force)"
            )
        return record

    def _baseline(self, edit: Edit) -> float:
        if self._before is None:
            self._before = self._perplexity(edit)
        return self._before

    def _perplexity(self, edit: Edit) -> float:
        if self._texts is None:
            self._texts = held_out(self.config.text or edit.card.get("hyperparameters", {}).get("mom2_dataset"), asked=self.config.text is not None)
        try:
            value = float(perplexity(self.adapter, self._texts, max_tokens=32)["value"])
        except OverflowError:
            return math.inf
        return math.inf if math.isnan(value) else value


def apply_guarded(adapter: Adapter, edit: Edit, hparams: ROMEMDMHyperParams) -> dict[str, Tensor]:
    """Apply an edit, through the guard if the hyperparameters set one.

    Returns:
        the original weights, by the changes' names.

    Raises:
        CollapseError: if the guard stops it; the weights are those of before.
        EditError: if the edit does not fit.
    """
    config = hparams.guard_config()
    if config is None:
        return edit.apply(adapter)
    CollapseGuard(adapter, config).apply(edit)
    return edit.originals(adapter)


def held_out(name: str | None, asked: bool = True) -> list[str]:
    """A few lines of a text, or plain sentences.

    Args:
        name: a text (`text_source`), or None.
        asked: the text was asked for by name, so it must be there; else it is used only if it is at hand without a network.

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
        raise StatisticsError(f"the guard's text {str(Path(name))!r} has no line of more than five words: give a text of sentences")
    step = max(1, len(lines) // TEXTS)
    return [" ".join(words) for words in lines[::step][:TEXTS]] or list(_PLAIN)
