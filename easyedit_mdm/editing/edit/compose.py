"""Several edits as one: their changes added up, and where they are at odds, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import torch
from torch import Tensor

from easyedit_mdm.editing.edit.card import Base, Card
from easyedit_mdm.editing.edit.change import Change, Exact, LowRank
from easyedit_mdm.editing.edit.stack import PlainEdit
from easyedit_mdm.errors import EditError

OVERLAP = 0.9
AnyEdit = TypeVar("AnyEdit", bound=PlainEdit)


@dataclass(frozen=True)
class Conflict:
    """Two edits that are at odds.

    Attributes:
        first, second: their numbers, from 0.
        kind: `contradiction` (one prompt and subject, two targets), or `overlap` (one weight, written in
            nearly the same direction of its input: what one says, the other says too or takes back).
        what: the fact or the weight.
        detail: the two targets, or the cosine.
    """

    first: int
    second: int
    kind: str
    what: str
    detail: str

    def __str__(self) -> str:
        """As it is shown."""
        return f"edits {self.first + 1} and {self.second + 1}: {self.kind} at {self.what} ({self.detail})"


def conflicts(edits: Sequence[PlainEdit]) -> list[Conflict]:
    """Where edits are at odds with each other, pair by pair."""
    between = []
    for (i, first), (j, second) in combinations(enumerate(edits), 2):
        between += [Conflict(i, j, "contradiction", *pair) for pair in _contradictions(first, second)]
        between += [Conflict(i, j, "overlap", *pair) for pair in _overlaps(first, second)]
    return between


def compose(edits: Sequence[AnyEdit], force: bool = False) -> AnyEdit:
    """One edit that changes the base model by the sum of what several change.

    The edits belong to one base model, or each to the model with those before it. Their sum is rounded to the
    weights' dtype once, where applying them one after another rounds each time. What overlaps is noted in the
    card (`composed.conflicts`).

    Raises:
        EditError: without edits; for edits of different base models, with the fingerprints; for
            contradictions, unless forced.
    """
    if not edits:
        raise EditError("no edits to compose: give at least one")
    _check_bases(edits)
    disputes = conflicts(edits)
    opposed = [str(c) for c in disputes if c.kind == "contradiction"]
    if opposed and not force:
        raise EditError(
            "these edits contradict each other: "
            + "; ".join(opposed)
            + ". Leave one out, or compose them with force (--force)"
        )
    by_name: dict[str, list[Change]] = {}
    for edit in edits:
        for change in edit.changes:
            by_name.setdefault(change.name, []).append(change)
    changes = [_added(name, some) for name, some in by_name.items()]
    return type(edits[0])(changes, _card(edits, disputes), [one for edit in edits for one in edit.attached])


def _card(edits: Sequence[PlainEdit], disputes: Sequence[Conflict]) -> Card:
    methods = sorted({str(edit.card.get("method")) for edit in edits})
    card: Card = {
        "method": methods[0] if len(methods) == 1 else "several",
        "facts": [fact for edit in edits for fact in edit.card.get("facts", [])],
        "composed": {
            "edits": [{k: edit.card.get(k) for k in ("id", "method", "hyperparameters", "seed", "metrics",
                "guard", "versions")} for edit in edits],
            "conflicts": [str(c) for c in disputes],
        },
    }  # fmt: skip
    for key in ("hyperparameters", "seed", "versions"):
        if all(edit.card.get(key) == edits[0].card.get(key) for edit in edits) and key in edits[0].card:
            card[key] = edits[0].card[key]
    if "base" in edits[0].card:
        base: Base = {**edits[0].card["base"], "weights": {}}
        for edit in edits:
            base["weights"] = {
                **edit.card["base"].get("weights", {}),
                **base["weights"],
            }  # the first that changes a weight saw the base's
        card["base"] = base
        card.setdefault("versions", edits[0].card.get("versions", {}))
    return card


def _check_bases(edits: Sequence[PlainEdit]) -> None:
    """One base for all, or none is sealed; an edit may also stand on those before it, and then says so in
    `base.carries`.

    Raises:
        EditError: with the fingerprints that differ.
    """
    bases = [edit.card.get("base", {}) for edit in edits]
    first = bases[0].get("fingerprint")
    for number, base in enumerate(bases[1:], start=2):
        if base.get("fingerprint") != first and base.get("carries") != [
            edit.card.get("id") for edit in edits[: number - 1]
        ]:
            raise EditError(
                f"edits 1 and {number} belong to different base models: {bases[0].get('name')}, fingerprint"
                f" {first}, and {base.get('name')}, fingerprint {base.get('fingerprint')}. Only edits of one"
                " model can be composed"
            )


def _contradictions(first: PlainEdit, second: PlainEdit) -> list[tuple[str, str]]:
    def table(edit: PlainEdit) -> dict[tuple[str, str], str]:
        """Targets by prompt and subject."""
        return {
            (" ".join(f["prompt"].lower().split()), f["subject"].strip().lower()): f["target_new"].strip()
            for f in edit.card.get("facts", [])
        }

    one, other = table(first), table(second)
    return [(f"{prompt!r}", f"{one[prompt, subject]!r} against {other[prompt, subject]!r}") for prompt,
        subject in one
            if (prompt, subject) in other and one[prompt, subject] != other[prompt, subject]]  # fmt: skip


def _overlaps(first: PlainEdit, second: PlainEdit) -> list[tuple[str, str]]:
    """Weights that both change, reading nearly the same input: the largest cosine between the spaces of
    inputs that they answer to.
    """
    others = {change.name: change for change in second.changes}
    overlaps = []
    for change in first.changes:
        if change.name in others:
            cosine = float(torch.linalg.svdvals(_inputs(change).T @ _inputs(others[change.name])).max())
            if cosine > OVERLAP:
                overlaps.append((change.name, f"cosine {cosine:.2f} between the inputs that they answer to"))
    return overlaps


def _inputs(change: Change) -> Tensor:
    """An orthonormal basis, as columns, of the inputs to which a change answers."""
    if isinstance(change, LowRank):
        matrix = change.right
    else:
        matrix = change.delta.T if change.transposed else change.delta
    _, values, vectors = torch.linalg.svd(matrix.detach().double().cpu(), full_matrices=False)
    return vectors[values > values.max() * 1e-7].T if len(values) else vectors.T


def _added(name: str, changes: Sequence[Change]) -> Change:
    """The sum of changes of one weight: factors side by side, or, where one has none, the sum itself.

    Raises:
        EditError: if they are of different shapes.
    """
    first = changes[0]
    if any(c.shape != first.shape or c.transposed != first.transposed for c in changes):
        raise EditError(
            f"the edits change {name} in different shapes ({', '.join(str(c.shape) for c in changes)}): they"
            " are not of one model"
        )
    if len(changes) == 1:
        return first
    if all(isinstance(c, LowRank) for c in changes):
        left = torch.cat([c.left.float().cpu() for c in changes if isinstance(c, LowRank)], dim=1)
        right = torch.cat([c.right.float().cpu() for c in changes if isinstance(c, LowRank)], dim=0)
        return LowRank(name, left, right, first.transposed)
    return Exact(name, torch.stack([c.dense().cpu() for c in changes]).sum(0), first.transposed)
