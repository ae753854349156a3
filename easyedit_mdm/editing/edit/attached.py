"""What an edit adds to a model's forward pass without touching a weight: memories at a site, and tokens
before every row.

An attachment is plain data, as a change of a weight is. What the model does follows from the attachments of
all edits that it carries, in order: those of one kind at one module are put together into one function of
the module's input and output. So taking one out of the middle leaves what the others would have given alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from easyedit_mdm.common.registry import Registry
from easyedit_mdm.errors import EditError
from easyedit_mdm.models.context import put_context
from easyedit_mdm.models.native import PutBefore

# (input of the module, its output) -> its output
Answer = Callable[[Tensor, Tensor], Tensor]
_HANDLES = "_easyedit_mdm_hooks"
_KEYS = 256  # whose distances are taken at once


@dataclass(frozen=True, eq=False)
class Attached:
    """One attachment.

    Attributes:
        module: dotted path of the module that it sits on; empty for one that sits before the model.
        tensors: what it holds; safetensors keeps it.
        settings: numbers and words; `edit.json` keeps them.
    """

    module: str
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    KIND: ClassVar[str] = ""
    TENSORS: ClassVar[tuple[str, ...]] = ()
    SETTINGS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if set(self.tensors) != set(self.TENSORS) or set(self.settings) != set(self.SETTINGS):
            raise EditError(
                f"a {self.KIND} needs tensors {list(self.TENSORS)} and settings {list(self.SETTINGS)}, got"
                f" {sorted(self.tensors)} and {sorted(self.settings)}"
            )
        for name, value in self.tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise EditError(f"{name} of a {self.KIND} holds NaN or infinity; nothing was changed")

        self._check_parts()

    def _check_parts(self) -> None:
        """Whether tensors and settings belong together: they may come from a file that anybody wrote.

        Raises:
            EditError: if not.
        """

    def _matrices(self, *names: str) -> None:
        """Floating-point matrices with a row for each other."""
        matrices = {name: self.tensors[name] for name in names}
        if any(value.dim() != 2 or not value.is_floating_point() for value in matrices.values()) or (
            len({len(value) for value in matrices.values()}) != 1
        ):
            shapes = {name: (tuple(value.shape), str(value.dtype)) for name, value in matrices.items()}
            raise EditError(f"a {self.KIND} needs matrices with equally many rows, got {shapes}")

    def _ids(self, *names: str) -> None:
        """Token ids, one after the other."""
        for name in names:
            value = self.tensors[name]
            if value.dim() != 1 or value.dtype != torch.int64 or (len(value) and int(value.min()) < 0):
                raise EditError(
                    f"{name} of a {self.KIND} is {value.dtype} of shape {tuple(value.shape)}: these are no"
                    " token ids"
                )

    def _numbers(self, *names: str) -> None:
        """Settings that are finite numbers and not negative."""
        for name in names:
            value = self.settings[name]
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not right or not 0 <= value < float("inf"):
                raise EditError(f"{name}={value!r} of a {self.KIND} must be a number, at least 0")

    def check(self, native: nn.Module, module: nn.Module) -> None:
        """Whether it fits the model, and the module in it.

        Raises:
            EditError: if not.
        """

    @classmethod
    def joined(cls, parts: Sequence[Attached]) -> Answer:
        """What all attachments of this kind at one module do together, the oldest first."""
        raise NotImplementedError


KINDS: Registry[type[Attached]] = Registry("attachment")


@KINDS.register("residual memory")
class ResidualMemory(Attached):
    """Keys and residuals of facts, from which one linear memory is solved for all of them:

        W = K^T (K K^T + ridge I)^-1 R,    output += alpha top_q(x W)

    for every input x of the module, K and R being the rows of all facts that the model carries. top_q keeps
    the largest entries by magnitude, a share q of them.
    """

    KIND = "residual memory"
    TENSORS = ("keys", "residuals")
    SETTINGS = ("ridge", "alpha", "top_q")

    def _check_parts(self) -> None:
        self._matrices("keys", "residuals")
        self._numbers("ridge", "alpha", "top_q")

    def check(self, native: nn.Module, module: nn.Module) -> None:
        """As `Attached.check`."""
        keys, residuals = self.tensors["keys"], self.tensors["residuals"]
        check_widths(self, module, keys.shape[1], residuals.shape[1])

    @classmethod
    def joined(cls, parts: Sequence[Attached]) -> Answer:
        """As `Attached.joined`; the settings are the last edit's."""
        settings = parts[-1].settings
        weight = solved(
            torch.cat([part.tensors["keys"] for part in parts]),
            torch.cat([part.tensors["residuals"] for part in parts]),
            settings["ridge"],
        )
        return _Recalled(weight, settings["alpha"], settings["top_q"])


def solved(
    keys: Float[Tensor, "facts inner"], residuals: Float[Tensor, "facts width"], ridge: float
) -> Float[Tensor, "inner width"]:
    """K^T (K K^T + ridge I)^-1 R, in float64, as float32.

    Raises:
        EditError: if the system is singular.
    """
    wide, right = keys.double(), residuals.double()
    matrix = wide @ wide.T + ridge * torch.eye(len(wide), dtype=torch.float64, device=wide.device)
    factor, wrong = torch.linalg.cholesky_ex(matrix)
    if int(wrong):
        raise EditError(f"two facts have the same key and ridge={ridge}: give a positive ridge")
    return (wide.T @ torch.cholesky_solve(right, factor)).float()


@dataclass
class _Recalled:
    """A linear memory, of which the largest entries are added."""

    weight: Tensor
    alpha: float
    top_q: float

    def __call__(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """The module's output, with what the memory recalls."""
        recalled = entering.float() @ self.weight.to(entering.device)
        kept = max(1, round(self.top_q * recalled.shape[-1]))
        if kept < recalled.shape[-1]:
            least = recalled.abs().topk(kept, dim=-1).values[..., -1:]
            recalled = torch.where(recalled.abs() >= least, recalled, 0.0)
        return leaving + (self.alpha * recalled).to(leaving)


@KINDS.register("codebook")
class Codebook(Attached):
    """GRACE's memory (Hartvigsen et al., arXiv 2211.11031): wherever the module's input lies within a key's
    radius, its output is that key's value.

    One fact a part: its keys (in several states of a masked model there are several) with one value each, and
    the tokens of its target, by which facts that say the same are told from those that do not. Two keys of
    different facts within reach of each other share the distance between them: each gets half as its radius.
    """

    KIND = "codebook"
    TENSORS = ("keys", "values", "target")
    SETTINGS = ("radius",)

    def _check_parts(self) -> None:
        self._matrices("keys", "values")
        self._ids("target")
        self._numbers("radius")

    def check(self, native: nn.Module, module: nn.Module) -> None:
        """As `Attached.check`."""
        check_widths(self, module, self.tensors["keys"].shape[1], self.tensors["values"].shape[1])

    @classmethod
    def joined(cls, parts: Sequence[Attached]) -> Answer:
        """As `Attached.joined`."""
        keys = torch.cat([part.tensors["keys"] for part in parts]).float()
        values = torch.cat([part.tensors["values"] for part in parts]).float()
        return _Nearest(keys, values, radii(parts))


def radii(parts: Sequence[Attached]) -> Float[Tensor, " keys"]:
    """How far the keys of several facts reach, the facts added one after the other (GRACE, algorithm 1).

    A new key that lies beyond the reach of its nearest one keeps its whole radius. Otherwise, if the two
    facts have different targets, both reach half the distance between them. (Where the targets are the same
    EasyEdit widens the old key and adds none; here the new key stands beside it, with its own value.)
    """
    keys = torch.cat([part.tensors["keys"] for part in parts]).double()
    owners = [number for number, part in enumerate(parts) for _ in part.tensors["keys"]]
    reaches: list[float] = []
    for begin in range(0, len(keys), _KEYS):  # some at a time: memory grows with the keys, not their square
        apart = torch.cdist(
            keys[begin : begin + _KEYS], keys[: begin + _KEYS], compute_mode="donot_use_mm_for_euclid_dist"
        )
        for distances, owner in zip(apart, owners[begin : begin + _KEYS]):
            target, radius = parts[owner].tensors["target"], float(parts[owner].settings["radius"])
            earlier = owners.index(owner)  # keys of other facts
            reach = radius
            if earlier:
                nearest = int(distances[:earlier].argmin())
                distance = float(distances[nearest])
                same = torch.equal(parts[owners[nearest]].tensors["target"], target)
                if distance <= radius + reaches[nearest] and not same:
                    reaches[nearest], reach = distance / 2 - 1e-5, distance / 2
            reaches.append(reach)
    return torch.tensor(reaches)


@dataclass
class _Nearest:
    """Keys, the values that stand for them, and how far each reaches."""

    keys: Tensor
    values: Tensor
    radii: Tensor

    def __call__(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """The module's output, replaced where a key is near."""
        keys, reach = self.keys.to(entering.device), self.radii.to(entering.device)
        nearest = torch.cdist(entering.float(), keys, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
        near = nearest.values <= reach[nearest.indices]
        values = self.values.to(leaving)[nearest.indices.to(leaving.device)]
        return torch.where(near.to(leaving.device)[..., None], values, leaving)


@KINDS.register("context")
class Context(Attached):
    """Tokens that stand before every row: demonstrations, the new fact, and what leads on to the prompt. Of
    several, the facts stand one after the other, between the demonstrations and the lead of the last.
    """

    KIND = "context"
    TENSORS = ("demonstrations", "fact", "lead")

    def _check_parts(self) -> None:
        self._ids(*self.TENSORS)

    def check(self, native: nn.Module, module: nn.Module) -> None:
        """As `Attached.check`."""
        most = cast(Any, native).get_input_embeddings().weight.shape[0]
        ids = torch.cat(list(self.tensors.values()))
        if self.module or (len(ids) and int(ids.max()) >= most):
            raise EditError(
                f"the edit does not fit this model: its context has token {int(ids.max())} at"
                f" {self.module or 'the beginning'}, and the model {most} tokens"
            )


def check_widths(one: Attached, module: nn.Module, inner: int, width: int) -> None:
    """Whether the module takes and gives so many numbers.

    Raises:
        EditError: if not.
    """
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else "no weight"
    if shape not in ((width, inner), (inner, width)):
        raise EditError(
            f"the edit does not fit this model: its {one.KIND} at {one.module} takes {inner} numbers and"
            f" gives {width}, the module has {shape}"
        )


# ---- in a model --------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """The functions of all attachments of a model, ready to be put in."""

    answers: list[tuple[nn.Module, Answer]]
    context: Int[Tensor, " tokens"] | None


def prepared(native: nn.Module, attached: Sequence[Attached]) -> Prepared:
    """What attachments, the oldest first, come to in a model; nothing is changed yet.

    Raises:
        EditError: if one does not fit.
    """
    places: dict[tuple[str, str], list[Attached]] = {}
    for one in attached:
        places.setdefault((one.module, one.KIND), []).append(one)
    contexts = [one for one in attached if isinstance(one, Context)]
    for context in contexts:
        places.pop((context.module, Context.KIND), None)
        context.check(native, native)
    modules = dict(native.named_modules())
    answers = []
    for (name, kind), parts in places.items():
        if not name or name not in modules:
            raise EditError(f"the edit does not fit this model: there is no module {name!r}")
        for part in parts:
            part.check(native, modules[name])
        answers.append((modules[name], KINDS[kind].joined(parts)))
    return Prepared(answers, _said(contexts))


def _said(contexts: Sequence[Attached]) -> Int[Tensor, " tokens"] | None:
    if not contexts:
        return None
    last, facts = contexts[-1].tensors, [one.tensors["fact"] for one in contexts]
    return torch.cat([last["demonstrations"], *facts, last["lead"]])


def attach(native: nn.Module, ready: Prepared) -> None:
    """Let a model's forward pass do what was prepared, and nothing that was there before."""
    for handle in native.__dict__.get(_HANDLES, ()):
        handle.remove()
    handles = [module.register_forward_hook(_Hook(answer)) for module, answer in ready.answers]
    if ready.context is not None:
        put_before = PutBefore(ready.context)
        handles.append(native.register_forward_pre_hook(put_before.before, with_kwargs=True))
        handles.append(native.register_forward_hook(put_before.after, with_kwargs=True))
    native.__dict__[_HANDLES] = tuple(handles)
    if not handles:
        del native.__dict__[_HANDLES]
    put_context(native, ready.context)


@dataclass
class _Hook:
    """Torch's forward hook, as an object that a copy of the model copies."""

    answer: Answer

    def __call__(self, _: nn.Module, args: tuple, out: Any) -> Any:
        """The module's output, changed."""
        first = out[0] if isinstance(out, tuple) else out
        changed = self.answer(args[0], first)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed
