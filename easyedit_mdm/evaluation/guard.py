"""The collapse guard: an edit past its thresholds is refused, or taken back, with the figures."""

from __future__ import annotations

import math
from dataclasses import asdict

from torch import Tensor

from easyedit_mdm.common.weights import Weights
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.edit.card import Verdict
from easyedit_mdm.editing.guard import GuardConfig, held_out, reasons, update_figures
from easyedit_mdm.errors import CollapseError
from easyedit_mdm.evaluation.perplexity import perplexity
from easyedit_mdm.models import Adapter


class CollapseGuard:
    """Applies edits to one model and watches what they do to it.

    Args:
        adapter: the model, as it is before the first edit. The perplexity and the weights that later edits
            are held against are those of then, so that a sequence of edits cannot ruin the model in small
            steps.
        config: the thresholds.
    """

    def __init__(self, adapter: Adapter, config: GuardConfig = GuardConfig()):
        self.adapter, self.config = adapter, config
        self._before: float | None = None
        self._texts: list[str] | None = None
        self._weights: dict[str, Tensor] = {}  # as they were before the first edit, of those that were edited

    def apply(self, edit: Edit, force: bool = False) -> Verdict:
        """Apply an edit, unless that would ruin the model.

        Args:
            force: keep it whatever the figures say.

        Returns:
            `on`, `figures`, `thresholds`, `reasons` (past which thresholds), `verdict` (`passed`, or `kept by
            force`); also in the edit's card, as `guard`.

        Raises:
            CollapseError: if a figure lies past its threshold, with all figures; the weights are those of
                before.
            EditError: if the edit does not fit.
        """
        figures: dict[str, float | None] = update_figures(edit, self.adapter)
        figures["norm_ratio_all"] = self._norm_ratio_of_all(edit)
        self._judge(edit, figures, force, "refused; no weight was changed")
        if self.config.perplexity_ratio is None:
            edit.apply(self.adapter)
            return self._judge(edit, figures, force, "")
        before = self._baseline(edit)
        edit.apply(self.adapter)
        kept = False
        try:
            after = self._perplexity(edit)
            figures |= {
                "perplexity_before": before,
                "perplexity_after": after,
                "perplexity_ratio": after / before,
            }
            record = self._judge(edit, figures, force, "rolled back; the weights are those of before")
            kept = True
            return record
        finally:
            if not kept and edit.is_applied(self.adapter):
                edit.revert(self.adapter)

    def _judge(self, edit: Edit, figures: dict[str, float | None], force: bool, done: str) -> Verdict:
        exceeded = reasons(figures, self.config)
        verdict = "passed" if not exceeded else "kept by force" if force else done.split(";")[0]
        record: Verdict = {
            "on": True,
            "verdict": verdict,
            "reasons": exceeded,
            "figures": dict(figures),
            "thresholds": asdict(self.config),
        }
        edit.card["guard"] = record
        if exceeded and not force:
            shown = ", ".join(
                f"{k} {'not known' if v is None else format(v, '.3g')}" for k, v in figures.items()
            )
            raise CollapseError(
                f"the edit would damage the model: {'; '.join(exceeded)} ({shown}). It was {done}. Weaken it"
                " (clamp_norm_factor, mom2_eps), set the threshold (guard), or keep it with force (--force)"
            )
        return record

    def _norm_ratio_of_all(self, edit: Edit) -> float:
        """||W_after - W_first|| / ||W_first||, the worst over the edit's weights: what all edits of the
        sequence come to.
        """
        weights = Weights(self.adapter.native, every=True)
        worst = 0.0
        for change in edit.changes:
            now = weights[change.name].detach()
            first = self._weights.setdefault(change.name, now.clone())
            moved = (now - first).float() + change.dense().to(now.device)
            worst = max(worst, float(moved.norm() / first.float().norm().clamp(min=1e-30)))
        return worst

    def _baseline(self, edit: Edit) -> float:
        if self._before is None:
            self._before = self._perplexity(edit)
        return self._before

    def _perplexity(self, edit: Edit) -> float:
        if self._texts is None:
            self._texts = held_out(
                self.config.text or edit.card.get("hyperparameters", {}).get("mom2_dataset"),
                asked=self.config.text is not None,
            )
        try:
            value = float(perplexity(self.adapter, self._texts, max_tokens=32)["value"])
        except OverflowError:
            return math.inf
        return math.inf if math.isnan(value) else value
