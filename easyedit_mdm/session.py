"""One editing session: a model, a method, and the edits that were made, in one object.

EasyEdit's loop, the bench and a script all edit through it. It owns what a sequence of edits shares: the
guard with the baseline that was measured before the first edit, the keys that later edits must not disturb
(the history), and the stack of edits, from which any one can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.editing import METHODS, Edit, EditRequest, History, MethodHyperParams
from easyedit_mdm.editing.edit import carried
from easyedit_mdm.editing.methods import Method
from easyedit_mdm.editing.request import check_requests
from easyedit_mdm.editing.solve.value import Optimised
from easyedit_mdm.errors import EditError, HyperParameterError
from easyedit_mdm.evaluation.guard import CollapseGuard
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.context import without_context

RUN_MODES = ("each", "batch", "sequential")  # those of `bench`
MODES = (*RUN_MODES, "rebase")
KEPT = ("sequential", "rebase")  # modes whose steps stay in the model
Request = EditRequest | dict
Known = dict[tuple[str, str], tuple[EditRequest, Optimised]]  # facts and their values, by prompt and subject


@dataclass(frozen=True)
class Step:
    """What one step of a sequence did.

    Attributes:
        number: of the step, from 0.
        requests: the facts that were edited in it.
        edits: one edit of all of them, or, for a method that writes one fact at a time, one each.
    """

    number: int
    requests: list[EditRequest]
    edits: list[Edit]


class Session:
    """Edits of one model by one method.

    Used as a context manager it takes every edit back at the end, unless `keep` was called.

    Args:
        model: as `load_model` returns it.
        hparams: hyperparameters of the method (`load_hparams`); they name it.
        guard: what watches the edits; by default the guard that the hyperparameters set, or none.
        force: keep edits whatever the guard finds; its verdict says so.

    Example:
        >>> from easyedit_mdm import Session, load_hparams, load_model
        >>> model = load_model("twin-llada")
        >>> fact = {"prompt": "Ann Lee lives in", "subject": "Ann Lee", "target_new": "Rome"}
        >>> with Session(model, load_hparams("ROME_MDM/twin-llada")) as session:
        ...     (edit,) = session.edit([fact])
        ...     edit.is_applied(model)
        True
        >>> edit.is_applied(model)
        False
    """

    def __init__(
        self,
        model: Adapter,
        hparams: MethodHyperParams,
        guard: CollapseGuard | None = None,
        force: bool = False,
    ):
        self.model, self.hparams, self.history = model, hparams, History()
        config = hparams.guard_config()
        self.guard = guard or (None if config is None else CollapseGuard(model, config))
        self._stack: list[Edit] = []
        self._joint: Edit | None = None  # the one edit of mode rebase
        self._facts: Known = {}
        self._force, self._kept = force, False

    @property
    def method(self) -> Method:
        """The method that the hyperparameters name."""
        return METHODS[self.hparams.alg_name]

    @property
    def edits(self) -> list[Edit]:
        """The edits that the model carries, the oldest first; those that somebody else took back are not
        among them.
        """
        there = carried(self.model)  # EasyEdit puts weights back by itself
        self._stack = [edit for edit in self._stack if any(edit is other for other in there)]
        return list(self._stack)

    # ---- editing -------------------------------------------------------------------------------------------
    def edit(
        self, requests: Sequence[Request], mode: str | None = None, batch_size: int | None = None
    ) -> list[Edit]:
        """Edit facts and keep the edits. If one fails, those of this call are taken back.

        Args:
            requests: facts with `prompt`, `subject` and `target_new`.
            mode: `batch`: one edit of all facts. `sequential`: groups of `batch_size`, each edited in the
                model that the earlier ones left. `each`: one edit a fact, all made for the model as it is now
                (their values are optimised together, which is several times faster), then applied one after
                another. `rebase`: groups of `batch_size`, as `sequential`; but after each group one edit of
                all facts so far takes the place of the one before, solved from the weights as they were. So
                it is the edit that one batch of all would be. A fact that is edited again takes the earlier
                one's place. By default `batch` where the method writes several facts at once, else
                `sequential`.
            batch_size: facts a group, for `sequential` and `rebase`; 1 by default.

        Returns:
            the edits that were made; for `rebase`, the one of all facts so far.

        Raises:
            HyperParameterError: for a mode that does not exist or that the method cannot do.
            RequestError: for a fact that cannot be edited.
            CollapseError: if the guard stops an edit.
        """
        facts = [EditRequest.of(request) for request in requests]
        mode = mode or ("batch" if self.method.batchable else "sequential")
        self._check(mode, batch_size, len(facts))
        before, joint, known = len(self.edits), self._joint, dict(self._facts)
        try:
            if mode == "rebase":
                for group in _groups(facts, batch_size or 1):
                    self._rebase(group)
                return [edit for edit in self.edits if edit is self._joint]
            if mode == "each":
                for made in self.method.edit_each(self.model, facts, self.hparams):
                    self.apply(made)
            else:
                for group in _groups(facts, len(facts) if mode == "batch" else batch_size or 1):
                    self._edit_group(group)
        except BaseException:
            if mode == "rebase":
                self._put_joint(joint, known, back=True)
            else:
                self._undo_down_to(before)
            raise
        return self._stack[before:]

    def steps(
        self, requests: Sequence[Request], mode: str = "each", batch_size: int | None = None
    ) -> Iterator[Step]:
        """Edit group by group; the body of the loop sees the model as each step left it.

        Args:
            mode: `each`: one fact a step, taken back before the next. `batch`: `batch_size` facts a step (all
                of them by default), taken back before the next. `sequential`: `batch_size` facts a step (1 by
                default), kept, so that later steps edit what earlier ones left. `rebase`: likewise, as one
                edit of all facts so far (see `edit`).

        Raises:
            as `edit`.
        """
        facts = [EditRequest.of(request) for request in requests]
        self._check(mode, batch_size, len(facts))
        size = {"each": 1, "batch": batch_size or max(1, len(facts))}.get(mode, batch_size or 1)
        for number, group in enumerate(_groups(facts, size)):
            before = len(self.edits)
            try:
                if mode == "rebase":
                    self._rebase(group)
                    yield Step(number, group, [edit for edit in self.edits if edit is self._joint])
                    continue
                self._edit_group(group)
                yield Step(number, group, self._stack[before:])
            finally:
                if mode not in KEPT:
                    self._undo_down_to(before)

    def apply(self, edit: Edit) -> None:
        """Apply an edit that was made or loaded before, through the guard, and put it on the stack.

        Raises:
            CollapseError: if the guard stops it.
            EditError: if it does not fit the model.
        """
        if self.guard is None:
            edit.apply(self.model)
        else:
            self.guard.apply(edit, self._force)
        self._stack.append(edit)

    def adopt(self, edit: Edit) -> None:
        """Put an edit on the stack that has been applied to the model already.

        Raises:
            EditError: if the model does not carry it.
        """
        if not any(edit is other for other in carried(self.model)):
            raise EditError("the model does not carry this edit: apply it first")
        self._stack.append(edit)

    # ---- taking back ---------------------------------------------------------------------------------------
    def undo(self, edit: Edit | None = None) -> Edit:
        """Take an edit back, the last one by default; later edits stay.

        The weights become those of the other edits, applied in order, bit for bit.

        Returns:
            the edit that was taken back.

        Raises:
            EditError: if the model carries no edit, or not this one, or the weights were changed otherwise.
        """
        stack = self.edits
        if not stack:
            raise EditError("there is no edit to take back in this session")
        gone = stack[-1] if edit is None else edit
        if not any(known is gone for known in stack):
            raise EditError(
                "this edit is not one that the model carries in this session; `edits` lists those that are"
            )
        gone.undo(self.model)
        self.history.forget(gone, self.model)
        self._stack = [known for known in stack if known is not gone]
        if gone is self._joint:
            self._joint, self._facts = None, {}
        return gone

    def undo_fact(self, request: Request) -> None:
        """Take one fact back that was edited in mode `rebase`: the others are solved again without it.

        Args:
            request: the fact's prompt and subject count.

        Raises:
            EditError: if no such fact is among them.
        """
        key = _key(EditRequest.of(request))
        if key not in self._facts:
            raise EditError(
                f"{key[0]!r} (subject {key[1]!r}) is not among the {len(self._facts)} facts that mode rebase"
                " has edited in this session"
            )
        left = {name: known for name, known in self._facts.items() if name != key}
        joint, before = self._joint, self._facts
        try:
            self._put_joint(None, {})
            self._put_joint(self._solved(left) if left else None, left)
        except BaseException:
            self._put_joint(joint, before, back=True)
            raise

    def undo_all(self) -> None:
        """Take all edits back, the last first; the weights are those of before, bit for bit."""
        self._undo_down_to(0)

    def keep(self) -> None:
        """Leave the edits in the model when the `with` block ends."""
        self._kept = True

    def __enter__(self) -> Session:
        """The session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Take all edits back, unless they are to be kept."""
        if not self._kept:
            self.undo_all()

    # ---- how -----------------------------------------------------------------------------------------------
    def _check(self, mode: str, batch_size: int | None, facts: int) -> None:
        if mode not in MODES:
            raise HyperParameterError(
                f"mode={mode!r} is not one of {', '.join(MODES)}{did_you_mean(mode, MODES)}"
            )
        if batch_size is not None and batch_size < 1:
            raise HyperParameterError(f"batch_size={batch_size} must be at least 1")
        if mode == "each" and batch_size not in (None, 1):
            raise HyperParameterError(
                f"batch_size={batch_size}: mode each edits one fact at a time; use batch or sequential"
            )
        if mode == "batch" and not self.method.batchable and min(batch_size or facts, facts) > 1:
            raise HyperParameterError(
                f"{self.method.name} writes one fact at a time: use mode sequential or each, or a method such"
                " as MEMIT_MDM"
            )
        if mode == "rebase" and not (self.method.batchable and self.method.values):
            raise HyperParameterError(
                f"{self.method.name} does not write several facts from their values: mode rebase is for"
                " MEMIT_MDM, EMMET_MDM and AlphaEdit_MDM"
            )
        if mode == "rebase" and getattr(self.hparams, "optimise_through", "activation") == "weights":
            raise HyperParameterError(
                "optimise_through: weights optimises the values of a batch together: mode rebase needs values"
                " that stay as they are (optimise_through: activation)"
            )

    def _edit_group(self, group: list[EditRequest]) -> None:
        parts = [group] if self.method.batchable else [[fact] for fact in group]
        before = len(self._stack)
        try:
            for part in parts:
                made = self.method.edit(self.model, part, self.hparams, self.history)
                self.apply(made)
                self.history.claim(made)
        except BaseException:
            self._undo_down_to(before)
            raise

    def _rebase(self, group: list[EditRequest]) -> None:
        """One edit of all facts so far, these among them, in place of the one before, or nothing at all."""
        joint, before = self._joint, self._facts
        check_requests(group)
        try:
            self._put_joint(None, {})
            with without_context(self.model.native):
                assert self.method.values is not None  # `_check` has seen to it
                values = self.method.values(self.model, group, self.hparams)
            new = {_key(fact): (fact, value) for fact, value in zip(group, values, strict=True)}
            known = {**before, **new}
            self._put_joint(self._solved(known), known)
        except BaseException:
            self._put_joint(joint, before, back=True)
            raise

    def _solved(self, known: Known) -> Edit:
        """One edit of facts whose values are known, for the model as it is now."""
        facts, values = [fact for fact, _ in known.values()], [value for _, value in known.values()]
        return self.method.edit(self.model, facts, self.hparams, values=values)

    def _put_joint(self, edit: Edit | None, known: Known, back: bool = False) -> None:
        """Take the edit of mode rebase out, and put another in its place.

        Args:
            back: it has been there before: no guard is asked again.
        """
        there = any(other is self._joint for other in self.edits)
        if there and self._joint is edit:
            return
        if there and self._joint is not None:
            self.undo(self._joint)
        if edit is not None and back:
            edit.apply(self.model)
            self._stack.append(edit)
        elif edit is not None:
            self.apply(edit)
        self._joint, self._facts = edit, known

    def _undo_down_to(self, number: int) -> None:
        while len(self.edits) > number:
            self.undo()


def _key(fact: EditRequest) -> tuple[str, str]:
    return fact.prompt, fact.subject


def _groups(facts: list[EditRequest], size: int) -> Iterator[list[EditRequest]]:
    for start in range(0, len(facts), max(1, size)):
        yield facts[start : start + size]
