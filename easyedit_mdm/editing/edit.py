"""An edit is an object, not a changed model: a change for each weight, and a card that says what they are.

What an edit does to a model it can take back to the last bit, whatever happens in between: the weights that it replaces are
kept (W + D - D is not W in floating point), and the copying itself is not cut in two by Ctrl-C.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from easyedit_mdm.common.fingerprints import model_fingerprint, tensor_sha256
from easyedit_mdm.common.signals import uninterrupted
from easyedit_mdm.errors import EditError, OptimisationError

Result = TypeVar("Result")


@dataclass(frozen=True)
class LowRank:
    """A change of one weight, `left @ right`, for a weight stored outputs x inputs (its transpose where `transposed`)."""

    name: str
    left: Float[Tensor, "outputs rank"]
    right: Float[Tensor, "rank inputs"]
    transposed: bool = False

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The change in the shape in which the weight is stored, in float32."""
        change = self.left.float() @ self.right.float()
        return change.T if self.transposed else change

    @property
    def shape(self) -> tuple[int, int]:
        """The shape in which the weight is stored."""
        shape = (self.left.shape[0], self.right.shape[1])
        return shape[::-1] if self.transposed else shape

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the change is made of."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True)
class Exact:
    """A change of one weight that has no low rank, in the shape in which the weight is stored."""

    name: str
    delta: Float[Tensor, "rows columns"]
    transposed: bool = False

    def dense(self) -> Float[Tensor, "rows columns"]:
        """The change in float32."""
        return self.delta.float()

    @property
    def shape(self) -> tuple[int, int]:
        """The shape in which the weight is stored."""
        return (self.delta.shape[0], self.delta.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the change is made of."""
        return {"delta": self.delta}


Change = LowRank | Exact


@dataclass(frozen=True)
class _State:
    """An edit in a model: the weights that it replaced, and the hashes of what it put there, by the parameters' first names."""

    originals: dict[str, Tensor]
    edited: dict[str, str]


# for each model the edits that it carries, in the order of their application; an edit that nobody holds any more drops out
_CARRIED: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Edit]]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Edit:
    """The result of a method.

    Attributes:
        changes: one change a weight.
        card: facts, method, hyperparameters, and figures of the optimisation; once sealed or saved also the base model's
            fingerprint, versions, seed and metrics.
    """

    changes: Sequence[Change]
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._states: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
        for change in self.changes:
            if not all(value.isfinite().all() for value in change.tensors.values()):
                raise OptimisationError(f"the update of {change.name} holds NaN or infinity; no weight was changed")

    # ---- in and out of a model -------------------------------------------------------------------------------
    def apply(self, model: nn.Module) -> dict[str, Tensor]:
        """Add the changes to the model's weights; after an exception or Ctrl-C the weights are those of before.

        Returns:
            the original weights, by the changes' names.

        Raises:
            EditError: if the edit is applied to this model already, was made for another one, a weight is missing, tied,
                offloaded or of another shape, or the result does not fit its dtype. Nothing is changed then.
        """
        native = identity(model)
        if native in self._states:
            raise EditError("this edit is already applied to this model: revert it first")
        names = self._names(native)
        self._check_base(native)
        weights = dict(native.named_parameters())
        originals = {name: weights[name].detach().clone() for name in names.values()}
        edited = {names[change.name]: _sum(weights[names[change.name]], change) for change in self.changes}
        state = _State(originals, {name: tensor_sha256(value) for name, value in edited.items()})
        try:
            with uninterrupted():
                self._states[native] = state
                self._register(native)
                put(weights, edited)
            return {change: originals[name] for change, name in names.items()}
        except BaseException:
            self._take_out(native)
            raise

    def revert(self, model: nn.Module) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            EditError: if the edit is not applied to this model, or the weights have been changed since, by a later edit for
                example; nothing is changed then.
        """
        native = identity(model)
        if native not in self._states:
            raise EditError("this edit is not applied to this model")
        weights = dict(native.named_parameters())
        changed = [name for name, known in self._states[native].edited.items() if tensor_sha256(weights[name]) != known]
        if changed:
            raise EditError(f"{', '.join(changed)} has been changed since this edit was applied: revert later edits first")
        try:
            self._take_out(native)
        finally:
            self._take_out(native)  # once more, should Ctrl-C have struck before the first had begun; else there is nothing to do

    def is_applied(self, model: nn.Module) -> bool:
        """Whether `apply` has put this edit into the model and `revert` has not taken it back."""
        return identity(model) in self._states

    def originals(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that this edit replaced in a model, by parameter name.

        Raises:
            EditError: if it is not applied.
        """
        if not self.is_applied(model):
            raise EditError("this edit is not applied to this model")
        return dict(self._states[identity(model)].originals)

    def edited_hashes(self, model: nn.Module) -> dict[str, str]:
        """SHA-256 of what the edit puts, or has put, into a model's weights, by parameter name.

        Raises:
            EditError: if it does not fit.
        """
        native = identity(model)
        if native in self._states:
            return dict(self._states[native].edited)
        names, weights = self._names(native), dict(native.named_parameters())
        return {names[c.name]: tensor_sha256(_sum(weights[names[c.name]], c)) for c in self.changes}

    def _register(self, native: nn.Module) -> None:
        _CARRIED[native] = [*(known for known in _CARRIED.get(native, []) if known() is not None), weakref.ref(self)]

    def _take_out(self, native: nn.Module) -> None:
        """Put the originals back and forget them; nothing if there are none."""
        with uninterrupted():
            state = self._states.get(native)
            if state is not None:
                put(dict(native.named_parameters()), state.originals)
                _CARRIED[native] = [known for known in _CARRIED.get(native, []) if known() not in (self, None)]
                del self._states[native]

    def _names(self, native: nn.Module) -> dict[str, str]:
        """The parameters' first names (a tied weight has two), by the changes' own; every weight is checked.

        Raises:
            EditError: for one that does not fit.
        """
        weights = dict(native.named_parameters(remove_duplicate=False))
        first = {id(value): name for name, value in native.named_parameters()}
        names: dict[str, str] = {}
        for change in self.changes:
            weight = weights.get(change.name)
            if weight is None or tuple(weight.shape) != change.shape:
                found = "no such weight" if weight is None else tuple(weight.shape)
                raise EditError(f"the edit does not fit this model: {change.name} should be {change.shape}, found {found}")
            if weight.is_meta:
                raise EditError(f"{change.name} is offloaded and cannot be edited in place: load it without offloading (device_map, max_memory)")
            if not weight.is_floating_point():
                raise EditError(f"{change.name} is {weight.dtype}, a quantised weight: load the model in bfloat16, float16 or float32")
            if first[id(weight)] in names.values():
                raise EditError(f"the edit changes {change.name} twice: it is tied to {first[id(weight)]}, or named twice")
            names[change.name] = first[id(weight)]
        return names

    # ---- which model it belongs to ---------------------------------------------------------------------------
    def seal(self, model: nn.Module, name: str | None = None) -> Edit:
        """Write into the card what the edit belongs to: the base model's fingerprint, versions, and figures of each weight.

        The base is the model as it is now, without this edit if it is applied. A card that names its base is left alone.

        Raises:
            EditError: if the edit does not fit the model.
        """
        from easyedit_mdm.editing.sealing import seal

        return seal(self, model, name)

    def _check_base(self, native: nn.Module) -> None:
        """A sealed edit goes into the model that it was made for, which may carry other edits that are known.

        Raises:
            EditError: with both fingerprints.
        """
        wanted = self.card.get("base", {}).get("fingerprint")
        if wanted is None:
            return
        now = model_fingerprint(native)
        if wanted != now and wanted != model_fingerprint(native, below(native)):
            base, found = self.card["base"], str(next(native.parameters()).dtype).removeprefix("torch.")
            same = base.get("dtype") == found
            hint = "" if same else f" It was made in {base.get('dtype')}, and this model is in {found}: load it in the same dtype."
            raise EditError(
                f"this edit was made for another model: {base.get('name')}, fingerprint {wanted}; this one has {now}.{hint} "
                "Give the base model that edit.json names, as it was."
            )

    # ---- files and forms; what they do is told in the modules that do it -------------------------------------
    def save(self, folder: str | Path, model: nn.Module | None = None) -> Path:
        """Write `edit.safetensors` and `edit.json` into a new folder; see `easyedit_mdm.editing.files.save`."""
        from easyedit_mdm.editing.files import save

        return save(self, folder, model)

    @staticmethod
    def load(folder: str | Path) -> Edit:
        """Read the folder of an edit; see `easyedit_mdm.editing.files.load`."""
        from easyedit_mdm.editing.files import load

        return load(folder)

    @staticmethod
    def compose(edits: list[Edit], force: bool = False) -> Edit:
        """One edit of several; see `easyedit_mdm.editing.compose.compose`."""
        from easyedit_mdm.editing.compose import compose

        return compose(edits, force)

    def diff(self, model: nn.Module | None = None) -> list[dict[str, Any]]:
        """What the edit changes, a row a weight; see `easyedit_mdm.editing.sealing.weight_figures`."""
        from easyedit_mdm.editing.sealing import weight_figures

        return weight_figures(self, model)

    def to_peft(self, folder: str | Path) -> Path:
        """Write a LoRA adapter that `peft` loads onto the base model; see `easyedit_mdm.editing.export.to_peft`."""
        from easyedit_mdm.editing.export import to_peft

        return to_peft(self, folder)


def adopt(model: nn.Module, stack: Sequence[tuple[Edit, Mapping[str, Tensor], Mapping[str, str]]]) -> None:
    """Take a model that was loaded with edits in its weights for one to which they have been applied.

    Args:
        stack: in the order of application, each edit with the weights that it replaced and the hashes of what it put there, by
            parameter name, as they were kept.

    Raises:
        EditError: if the weights are not those that the edits left; nothing is noted then.
    """
    native = identity(model)
    now: dict[str, Tensor] = dict(native.named_parameters())
    states: list[tuple[Edit, _State]] = []
    for edit, originals, edited in reversed(stack):
        names = set(edit._names(native).values())
        wrong = [n for n in names if n not in originals or originals[n].shape != now[n].shape or originals[n].dtype != now[n].dtype]
        changed = [n for n in names if edited.get(n) != tensor_sha256(now[n])]
        if wrong or set(originals) != names:
            raise EditError(f"the originals that were kept do not belong to edit and model: {', '.join(sorted(wrong)) or 'there are more of them'}")
        if changed:
            raise EditError(f"{', '.join(sorted(changed))} has been changed since edit {edit.card.get('id')} was applied: it cannot be taken back")
        states.append((edit, _State({n: originals[n].to(now[n].device) for n in names}, dict(edited))))
        now |= originals
    for edit, state in reversed(states):
        edit._states[native] = state
        edit._register(native)


def keeping(model: nn.Module, names: list[str], work: Callable[[], Result]) -> Result:
    """The result of `work`, with some weights put back after it, bit for bit, whatever it did and however it ended."""
    weights = dict(identity(model).named_parameters(remove_duplicate=False))
    originals = {name: weights[name].detach().clone() for name in names}
    try:
        try:
            return work()
        finally:
            put(weights, originals)
    finally:
        put(weights, originals)  # once more, should Ctrl-C have struck before the first had begun


def below(native: nn.Module) -> dict[str, Tensor]:
    """The weights of a model as they were before the edits that it is known to carry, by name; only those that were replaced."""
    found: dict[str, Tensor] = {}
    for edit in carried(native):
        for name, value in edit.originals(native).items():
            found.setdefault(name, value)
    return found


def carried(model: nn.Module) -> list[Edit]:
    """The edits that a model is known to carry, in order; those that nobody holds any more are not known."""
    edits = [known() for known in _CARRIED.get(identity(model), [])]
    return [edit for edit in edits if edit is not None and edit.is_applied(model)]


def identity(model: nn.Module) -> nn.Module:
    """The model that holds the weights: two adapters of one model are the same model."""
    return getattr(model, "native", model)


def put(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into weights; Ctrl-C waits until that is done."""
    with uninterrupted():
        for name, value in values.items():
            weights[name].data.copy_(value)  # no decorator for no_grad: Ctrl-C in its wrapper would strike behind the caller's back


def _sum(weight: Tensor, change: Change) -> Tensor:
    """W + D, in the weight's dtype.

    Raises:
        EditError: if it does not fit that.
    """
    value = (weight.detach().float() + change.dense().detach().to(weight.device)).to(weight.dtype)
    if not value.isfinite().all():
        why = "it already holds NaN or infinity" if not weight.isfinite().all() else f"the sum is too large for {weight.dtype}"
        raise EditError(f"{change.name} cannot be changed: {why}; no weight was changed")
    return value
