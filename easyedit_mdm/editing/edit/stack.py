"""An edit as plain data, and the stack of edits that a model carries.

The stack is kept with the model. It says which edits are in it, in which order, and what each weight was
before: W + D - D is not W in floating point, so weights are put back from copies, bit for bit. Copies are
kept of each weight before the first edit and before the last one. What stood between is computed again from
the factors, and compared by hash. So a thousand edits cost two copies (a dozen while they are taken out one
by one), and any of them can be taken out. Ctrl-C never leaves weights and stack at odds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, nn

from easyedit_mdm.common.fingerprints import model_fingerprint, tensor_sha256
from easyedit_mdm.common.signals import uninterrupted
from easyedit_mdm.common.weights import Weights
from easyedit_mdm.editing.edit.attached import Attached, Prepared, attach, prepared
from easyedit_mdm.editing.edit.card import Card
from easyedit_mdm.editing.edit.change import Change, added
from easyedit_mdm.errors import EditError, OptimisationError

Result = TypeVar("Result")

# an attribute of the transformers model, so that a copy of the model knows its edits too
_STACK = "_easyedit_mdm_stack"


@dataclass(eq=False)
class PlainEdit:
    """The changes of an edit and its card, with what puts them into a model and takes them out.

    Attributes:
        changes: one change a weight.
        attached: what it adds to the forward pass without touching a weight.
        card: facts, method, hyperparameters, and figures of the optimisation; once sealed or saved also the
            base model's fingerprint, versions, seed and metrics.

    Raises:
        OptimisationError: if a change holds NaN or infinity.
    """

    changes: Sequence[Change]
    card: Card = field(default_factory=lambda: Card())
    attached: Sequence[Attached] = ()

    def __post_init__(self) -> None:
        for change in self.changes:
            if not all(value.isfinite().all() for value in change.tensors.values()):
                raise OptimisationError(
                    f"the update of {change.name} holds NaN or infinity; no weight was changed"
                )

    def __repr__(self) -> str:
        """One line: the method, its facts (three at most), the weights, and the size."""
        facts = self.card.get("facts", [])
        said = [f"{fact['prompt']!r} -> {fact['target_new']!r}" for fact in facts[:3]]
        said += [f"{len(facts) - 3} more"] if len(facts) > 3 else []
        places = [change.name for change in self.changes] + [
            part.module or part.KIND for part in self.attached
        ]
        method = self.card.get("method", "of no method")
        return (
            f"<Edit {method}: {'; '.join(said)} at {', '.join(places) or 'no weight'}, {self.bytes:,} bytes>"
        )

    @property
    def bytes(self) -> int:
        """What its tensors take in a file: factors, exact changes and attachments."""
        held = [*self.attached, *self.changes]
        return sum(v.numel() * v.element_size() for part in held for v in part.tensors.values())

    def apply(self, model: nn.Module) -> dict[str, Tensor]:
        """Add the changes to the weights; after an exception or Ctrl-C the weights are those of before.

        Returns:
            the original weights, by the changes' names.

        Raises:
            EditError: if the edit is applied to this model already, was made for another one, a weight is
                missing, tied, offloaded or of another shape, or the result does not fit its dtype. Nothing is
                changed then.
        """
        native = identity(model)
        entries = _still_there(native)
        if any(entry.edit is self for entry in entries):
            raise EditError("this edit is already applied to this model: revert it first")
        names = self.names_in(native)
        self._check_base(native)
        weights = Weights(native)
        before = {name: weights[name].detach().clone() for name in names.values()}
        changes = {names[change.name]: change for change in self.changes}
        after = {name: added(before[name], change) for name, change in changes.items()}
        entry = Entry(self, changes, _hashes(before), _hashes(after), before)
        pushed = _pushed(entries, entry)
        ready = _prepared(native, pushed)
        try:
            _settle(native, after, pushed, ready)
            return {name: before[first] for name, first in names.items()}
        except BaseException:
            _settle(native, before, entries)
            raise

    def revert(self, model: nn.Module) -> None:
        """Put the weights back that the edit replaced, bit for bit.

        Raises:
            EditError: if the edit is not applied to this model, or the weights have been changed since, by a
                later edit for example (see `undo`); nothing is changed then.
        """
        entries = _entries(identity(model))
        place = self._place(entries)
        mine = entries[place].was
        later = [name for name in mine if any(name in entry.was for entry in entries[place + 1 :])]
        if later:
            raise EditError(
                f"{', '.join(later)} has been changed since this edit was applied: revert later edits first, "
                "or take this one out from under them (undo)"
            )
        self.undo(model)

    def undo(self, model: nn.Module) -> None:
        """Take the edit out and leave the later ones in, as if it had never been among them.

        Raises:
            EditError: if the edit is not applied to this model, or something else than edits has changed its
                weights since; nothing is changed then.
        """
        native = identity(model)
        entries = _entries(native)
        values, left = _without(native, entries, self._place(entries))
        try:
            _settle(native, values, left)
        finally:
            _settle(native, values, left)  # once more, should Ctrl-C have struck before the first had begun

    def is_applied(self, model: nn.Module) -> bool:
        """Whether `apply` has put this edit into the model, and nothing here has taken it out."""
        return any(entry.edit is self for entry in _entries(identity(model)))

    def originals(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that this edit replaced in a model, by parameter name.

        Raises:
            EditError: if it is not applied.
        """
        entries = _entries(identity(model))
        place = self._place(entries)
        return {name: _levels(entries, place, name)[place] for name in entries[place].was}

    def edited_hashes(self, model: nn.Module) -> dict[str, str]:
        """SHA-256 of what the edit puts, or has put, into a model's weights, by parameter name.

        Raises:
            EditError: if it does not fit.
        """
        native = identity(model)
        for entry in _entries(native):
            if entry.edit is self:
                return dict(entry.edited)
        return _hashes(_sums(native, self))

    def names_in(self, native: nn.Module) -> dict[str, str]:
        """The parameters' first names (a tied weight has two), by the changes' own; every weight is checked.

        Raises:
            EditError: for one that does not fit.
        """
        weights, held = dict(native.named_parameters(remove_duplicate=False)), Weights(native, every=True)
        first = {id(value): name for name, value in native.named_parameters()}
        names: dict[str, str] = {}
        for change in self.changes:
            weight = weights.get(change.name)
            if weight is None or tuple(weight.shape) != change.shape:
                shape = "no such weight" if weight is None else tuple(weight.shape)
                raise EditError(
                    f"the edit does not fit this model: {change.name} should be {change.shape}, found {shape}"
                )
            if not held.writable(change.name):
                raise EditError(
                    f"{change.name} is offloaded and cannot be edited in place: load it without "
                    "offloading (device_map, max_memory)"
                )
            if not weight.is_floating_point():
                raise EditError(
                    f"{change.name} is {weight.dtype}, a quantised weight: load the model in bfloat16, "
                    "float16 or float32"
                )
            if first[id(weight)] in names.values():
                raise EditError(
                    f"the edit changes {change.name} twice: it is tied to {first[id(weight)]}, or named twice"
                )
            names[change.name] = first[id(weight)]
        return names

    def _place(self, entries: tuple[Entry, ...]) -> int:
        for place, entry in enumerate(entries):
            if entry.edit is self:
                return place
        raise EditError("this edit is not applied to this model")

    def _check_base(self, native: nn.Module) -> None:
        """A sealed edit goes into the model that it was made for, which may carry other edits that are known.

        Raises:
            EditError: with both fingerprints.
        """
        wanted = self.card.get("base", {}).get("fingerprint")
        if wanted is None:
            return
        now = model_fingerprint(native)
        if wanted != now and wanted != model_fingerprint(native, unedited(native)):
            base, dtype = self.card["base"], str(next(native.parameters()).dtype).removeprefix("torch.")
            made = base.get("dtype")
            hint = (
                ""
                if made == dtype
                else f" It was made in {made}, and this model is in {dtype}: load it in the same dtype."
            )
            raise EditError(
                f"this edit was made for another model: {base.get('name')}, fingerprint {wanted}; this "
                f"one has {now}.{hint} "
                "Give the base model that edit.json names, as it was."
            )


@dataclass(frozen=True, eq=False)
class Entry:
    """An edit in a model. All mappings are by the parameters' first names.

    Attributes:
        edit: the edit itself.
        changes: what it adds to each weight.
        was, edited: SHA-256 of each weight before the edit and with it.
        before: the weights before it, as far as they are kept (see `_pushed`).
        stored: they come from a folder. Another machine may have made them, and this one compute others: all
            are kept.
    """

    edit: PlainEdit
    changes: Mapping[str, Change]
    was: Mapping[str, str]
    edited: Mapping[str, str]
    before: Mapping[str, Tensor]
    stored: bool = False


def adopt(
    model: nn.Module, stack: Sequence[tuple[PlainEdit, Mapping[str, Tensor], Mapping[str, str]]]
) -> None:
    """Take a model that was loaded with edits in its weights for one to which they have been applied.

    Args:
        stack: in the order of application, each edit with the weights that it replaced and the hashes of what
            it put there, by parameter name, as they were kept.

    Raises:
        EditError: if the weights are not those that the edits left; nothing is noted then.
    """
    native = identity(model)
    held, under = Weights(native), dict[str, Tensor]()  # now, and under the edits that have been looked at

    def now(name: str) -> Tensor:
        """A weight as the next edit must have left it."""
        return under[name] if name in under else held[name]

    entries: list[Entry] = []
    for edit, originals, edited in reversed(stack):
        names = edit.names_in(native)
        firsts = set(names.values())
        wrong = [n for n in firsts if n not in originals or not _alike(originals[n], now(n))]
        if wrong or set(originals) != firsts:
            what = ", ".join(sorted(wrong)) or "there are more of them"
            raise EditError(f"the originals that were kept do not belong to edit and model: {what}")
        changed = sorted(n for n in firsts if edited.get(n) != tensor_sha256(now(n)))
        if changed:
            raise EditError(
                f"{', '.join(changed)} has been changed since edit {edit.card.get('id')} was applied: it "
                "cannot be taken back"
            )
        before = {n: originals[n].to(now(n).device) for n in firsts}
        changes = {names[change.name]: change for change in edit.changes}
        entries.append(Entry(edit, changes, _hashes(before), dict(edited), before, stored=True))
        under.update(originals)
    _settle(native, {}, tuple(reversed(entries)))


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def keeping(model: nn.Module, names: list[str], work: Callable[[], Result]) -> Result:
    """The result of `work`; some weights are put back after it, bit for bit, however it ended."""
    weights = Weights(identity(model), every=True)
    originals = {name: weights[name].detach().clone() for name in names}
    try:
        try:
            return work()
        finally:
            put(weights, originals)
    finally:
        put(weights, originals)  # once more, should Ctrl-C have struck before the first had begun


def write(model: nn.Module, edit: PlainEdit) -> None:
    """Put an edit into a model while `keeping` keeps its weights: nothing is noted of it.

    Raises:
        EditError: if it does not fit.
    """
    native = identity(model)
    put(Weights(native), _sums(native, edit))


def unedited(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the edits of a model replaced, as they were before the first of them, by name."""
    originals: dict[str, Tensor] = {}
    for entry in _entries(identity(model)):
        for name, value in entry.before.items():
            originals.setdefault(name, value)
    return originals


def carried(model: nn.Module) -> list[PlainEdit]:
    """The edits that a model carries, in order; forgets those whose weights somebody else has put back."""
    return [entry.edit for entry in _still_there(identity(model))]


def revert_all(model: nn.Module) -> None:
    """Take out all edits that a model carries: each weight is, bit for bit, what it was before the first.

    Raises:
        EditError: if something else than edits has changed these weights since; nothing is changed then.
    """
    native = identity(model)
    weights, last = (
        Weights(native),
        {n: h for entry in _entries(native) for n, h in entry.edited.items()},
    )
    _refuse({name for name, known in last.items() if tensor_sha256(weights[name]) != known})
    values = unedited(native)
    try:
        _settle(native, values, ())
    finally:
        _settle(native, values, ())


def identity(model: nn.Module) -> nn.Module:
    """The model that holds the weights: two adapters of one model are the same model."""
    return getattr(model, "native", model)


def put(weights: Weights, values: Mapping[str, Tensor]) -> None:
    """Copy values into weights; Ctrl-C waits until that is done."""
    with uninterrupted():
        for name, value in values.items():
            weights.put(name, value)


def _entries(native: nn.Module) -> tuple[Entry, ...]:
    return native.__dict__.get(_STACK, ())


def _still_there(native: nn.Module) -> tuple[Entry, ...]:
    """The entries but for those on top that somebody else took back: EasyEdit puts weights back itself."""
    entries, weights = _entries(native), Weights(native)
    while entries and entries[-1].was != entries[-1].edited and _holds(weights, entries[-1].was):
        entries = entries[:-1]
    native.__dict__[_STACK] = entries
    return entries


def _holds(weights: Mapping[str, Tensor], hashes: Mapping[str, str]) -> bool:
    return all(tensor_sha256(weights[name]) == known for name, known in hashes.items())


def _settle(
    native: nn.Module,
    values: Mapping[str, Tensor],
    entries: tuple[Entry, ...],
    ready: Prepared | None = None,
) -> None:
    """Put values into the weights and note the edits that they hold, both or neither."""
    ready = _prepared(native, entries) if ready is None else ready
    with uninterrupted():
        put(Weights(native), values)
        native.__dict__[_STACK] = entries
        if ready is not None:
            attach(native, ready)


def _prepared(native: nn.Module, entries: tuple[Entry, ...]) -> Prepared | None:
    """What the edits add to the forward pass; None where nothing is added, now or so far."""
    attached = [one for entry in entries for one in entry.edit.attached]
    now = any(entry.edit.attached for entry in _entries(native))
    return prepared(native, attached) if attached or now else None


def _sums(native: nn.Module, edit: PlainEdit) -> dict[str, Tensor]:
    """What an edit would put into a model's weights as they are now."""
    names, weights = edit.names_in(native), Weights(native)
    return {names[change.name]: added(weights[names[change.name]], change) for change in edit.changes}


def _hashes(values: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: tensor_sha256(value) for name, value in values.items()}


def _pushed(entries: tuple[Entry, ...], entry: Entry) -> tuple[Entry, ...]:
    """The entries with one more on top.

    Of the weights before the one that was on top, only those are kept that cannot be computed again: before
    the first edit of a weight, and after something else than an edit has changed it.
    """
    pushed = list(entries)
    for name in entry.was:
        touching = [place for place, known in enumerate(pushed) if name in known.was][-2:]
        if len(touching) < 2:
            continue
        lower, top = (pushed[place] for place in touching)
        if lower.edited[name] == top.was[name] and not top.stored:
            pushed[touching[1]] = replace(top, before={n: v for n, v in top.before.items() if n != name})
    return (*pushed, entry)


def _levels(entries: tuple[Entry, ...], place: int, name: str) -> dict[int, Tensor]:
    """A weight before the edit at `place`: kept, or computed from the nearest one kept below and the factors.

    Returns:
        it, by `place`, and what was computed on the way before some edits below, ever nearer to it: who takes
        out one edit after the other, from the last, and keeps them, computes few of them twice.

    Raises:
        EditError: if the factors do not give it bit for bit.
    """
    touching = [at for at, entry in enumerate(entries[: place + 1]) if name in entry.was]
    start = max(number for number, at in enumerate(touching) if name in entries[at].before)
    value, gap = entries[touching[start]].before[name], len(touching) - start
    levels = {touching[start]: value}
    for number in range(start + 1, len(touching)):
        value = added(value, entries[touching[number - 1]].changes[name])
        ahead = len(touching) - 1 - number
        if 2 * ahead <= gap:
            levels[touching[number]], gap = value, ahead
    if tensor_sha256(value) != entries[place].was[name]:
        raise EditError(
            f"{name} cannot be computed again bit for bit as it was before this edit (another number of "
            "threads, or another device?): take out all edits (revert_all), whose first weights are kept"
        )
    return levels


def _without(
    native: nn.Module, entries: tuple[Entry, ...], place: int
) -> tuple[dict[str, Tensor], tuple[Entry, ...]]:
    """The weights that change if an edit is taken out, and the entries that are left.

    Raises:
        EditError: if something else than edits has changed these weights since.
    """
    gone, below_it = entries[place], list(entries[:place])
    values: dict[str, Tensor] = {}
    known, hashes = dict(gone.edited), dict(gone.was)
    for name in gone.was:
        levels = _levels(entries, place, name)
        values[name] = levels.pop(place)
        for at, value in levels.items():
            below_it[at] = replace(below_it[at], before={**below_it[at].before, name: value})
    left = tuple(below_it)
    changed: set[str] = set()
    for entry in entries[place + 1 :]:
        shared = [name for name in entry.was if name in values]
        changed |= {name for name in shared if entry.was[name] != known[name]}
        if not shared:
            left = (*left, entry)
            continue
        before = {name: values[name] for name in shared}
        known |= {name: entry.edited[name] for name in shared}
        was = {**entry.was, **{name: hashes[name] for name in shared}}
        values |= {name: added(values[name], entry.changes[name]) for name in shared}
        hashes |= {name: tensor_sha256(values[name]) for name in shared}
        edited = {name: hashes.get(name, known_hash) for name, known_hash in entry.edited.items()}
        left = _pushed(
            left, replace(entry, was=was, edited=edited, before={**entry.before, **before}, stored=False)
        )
    weights = Weights(native)
    _refuse(changed | {name for name in values if tensor_sha256(weights[name]) != known[name]})
    return values, left


def _refuse(changed: set[str]) -> None:
    if changed:
        names = ", ".join(sorted(changed))
        raise EditError(
            f"{names} has been changed since this edit was applied, and not by an edit: put that back first"
        )
