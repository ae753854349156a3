"""Weights come back to the last bit: after any sequence of apply, revert and compose, after exceptions, after
Ctrl-C at any point.
"""

from __future__ import annotations

import contextlib
import copy
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_rome import REQUEST, hparams
from torch import nn

import easyedit_mdm
from easyedit_mdm import Edit, make_edit
from easyedit_mdm.common.fingerprints import parameter_hashes
from easyedit_mdm.common.signals import uninterrupted
from easyedit_mdm.editing import LowRank
from easyedit_mdm.editing.edit import Exact
from easyedit_mdm.editing.edit import stack as editing
from easyedit_mdm.editing.edit.stack import carried, revert_all
from easyedit_mdm.errors import EditError

PACKAGE = str(Path(easyedit_mdm.__file__).parent)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEQUENCES = 1200


@pytest.fixture(autouse=True, scope="module")
def ctrl_c_works():
    """Python's own handler of Ctrl-C: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Small(nn.Module):
    """Three weights, the last tied to the first under a second name."""

    def __init__(self, dtype: torch.dtype, tied: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("a", (6, 4)), ("b", (5, 6)), ("c", (6, 4))):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            setattr(self, name, layer)
        if tied:
            self.c.weight = self.a.weight


def edits_for(model: nn.Module) -> list[Edit]:
    """Edits of one weight, of two, by factors and exact, of the tied weight by its second name; each changes
    every bit pattern it touches.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (6, 4), "b.weight": (5, 6), "c.weight": (6, 4)}

    def low(name: str, rank: int = 1) -> LowRank:
        """Positive factors: no sum of changes is nothing."""
        return LowRank(
            name,
            torch.rand(shapes[name][0], rank, generator=generator) + 1,
            torch.rand(rank, shapes[name][1], generator=generator) + 1,
        )

    def exact(name: str) -> Exact:
        """A positive change."""
        return Exact(name, torch.rand(shapes[name], generator=generator) + 1)

    whole = [
        [low("a.weight")],
        [low("b.weight", 2)],
        [exact("c.weight")],
        [low("a.weight"), exact("b.weight")],
        [low("b.weight"), low("c.weight")],
    ]
    return [Edit(list(changes), {"facts": []}) for changes in whole]


class Broken(BaseException):
    """Something that goes wrong where nobody expects it."""


@contextlib.contextmanager
def failing_copy(after: int, error: type[BaseException]):
    """The next copying of weights breaks down after some weights; those after it work."""
    real, count = editing.put, []

    def put(weights, values):
        if count:
            return real(weights, values)
        count.append(1)
        real(weights, dict(list(values.items())[:after]))
        raise error

    editing.put = put
    try:
        yield
    finally:
        editing.put = real


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """Every parameter's bytes, by name."""
    return {name: p.detach().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


class Oracle:
    """What each weight should be: a stack of states, each with the edit that brought it there."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.first = {id(p): name for name, p in model.named_parameters()}
        self.base = bits_of(model)
        self.stacks: dict[str, list[tuple[int, bytes]]] = {name: [] for name in self.base}
        self.edits = edits_for(model)

    @property
    def order(self) -> list[int]:
        """Numbers of the edits that are in the model, as it says itself."""
        return [
            next(n for n, edit in enumerate(self.edits) if edit is known) for known in carried(self.model)
        ]

    def names(self, edit: Edit) -> list[str]:
        """The weights of an edit by their first names."""
        every = dict(self.model.named_parameters(remove_duplicate=False))
        return [self.first[id(every[change.name])] for change in edit.changes]

    def on_top(self, number: int, edit: Edit) -> bool:
        """Whether nothing stands on an edit."""
        return all(self.stacks[name] and self.stacks[name][-1][0] == number for name in self.names(edit))

    def applied(self, number: int) -> bool:
        """Whether an edit is in the model."""
        return any(number == known for stack in self.stacks.values() for known, _ in stack)

    def without(self, number: int, edit: Edit) -> None:
        """The stacks as they are if an edit was never applied: a model of its own takes the others in
        order.
        """
        order = [known for known in self.order if known != number]
        other = Small(next(self.model.parameters()).dtype, len(self.base) < 3)
        self.stacks = {name: [] for name in self.base}
        for known in order:
            again = Edit(self.edits[known].changes)
            again.apply(other)
            now = bits_of(other)
            for name in self.names(again):
                self.stacks[name].append((known, now[name]))

    def check(self) -> None:
        """Every parameter is what it should be."""
        wanted = {name: stack[-1][1] if stack else self.base[name] for name, stack in self.stacks.items()}
        assert bits_of(self.model) == wanted


OPERATIONS = st.one_of(
    st.tuples(st.just("apply"), st.integers(0, 9)),
    st.tuples(st.just("revert"), st.integers(0, 9)),
    st.tuples(st.just("undo"), st.integers(0, 9)),
    st.tuples(st.just("compose"), st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.just("apply, broken"), st.integers(0, 9), st.integers(0, 2)),
    st.tuples(st.just("revert, broken"), st.integers(0, 9), st.integers(0, 2)),
)
count = {"sequences": 0, "undone": 0, "composed": 0, "composed and applied": 0, "taken back": 0}


@settings(max_examples=SEQUENCES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    tied=st.booleans(),
    operations=st.lists(OPERATIONS, min_size=2, max_size=12),
)
@example(
    dtype="float16",
    tied=True,
    operations=[("apply", 0), ("apply", 2), ("revert", 0), ("revert, broken", 2, 0), ("revert", 2)],
)
def sequences(dtype, tied, operations):
    """Any sequence leaves every weight where the edits that are still in it put it, and without them where it
    was.
    """
    count["sequences"] += 1
    model = Small(DTYPES[dtype], tied)
    oracle = Oracle(model)
    edits = oracle.edits
    for operation in operations:
        step(operation, edits, oracle)
        oracle.check()
    while remaining := [n for n, edit in enumerate(edits) if edit.is_applied(model)]:
        top = next(n for n in reversed(remaining) if oracle.on_top(n, edits[n]))
        step(("revert", top), edits, oracle)
        oracle.check()
    assert bits_of(model) == oracle.base


def step(operation: tuple, edits: list[Edit], oracle: Oracle) -> None:
    """One operation on the model and on the oracle."""
    what, number = operation[0], operation[1] % len(edits)
    if what == "undo" and operation[1] < 5 and oracle.order:  # mostly one that is in the model
        number = oracle.order[operation[1] % len(oracle.order)]
    edit, model = edits[number], oracle.model
    if what == "compose":
        edits.append(
            Edit.compose([edit, edits[operation[2] % len(edits)]])
        )  # no facts, no conflicts: it always works
        count["composed"] += 1
        return
    breaking = failing_copy(operation[2], Broken) if "broken" in what else contextlib.nullcontext()
    before = bits_of(model)
    try:
        with breaking:
            getattr(edit, what.split(",")[0])(model)
    except (EditError, Broken) as error:
        names = oracle.names(edit)
        if "broken" not in what:
            assert isinstance(error, EditError)
        if isinstance(error, Broken):
            pass
        elif what.startswith(
            "apply"
        ):  # refused for one of two reasons: it is in already, or changes one tied weight twice
            assert oracle.applied(number) or len(set(names)) < len(names)
            assert oracle.applied(number) or "twice" in str(error)
        else:
            assert not (oracle.applied(number) if what == "undo" else oracle.on_top(number, edit))
        if not (what == "revert, broken" and isinstance(error, Broken)):
            assert bits_of(model) == before
            return
        # a revert that broke down was finished by its second attempt
        assert not edit.is_applied(model)
    note(what, number, edit, oracle)


def note(what: str, number: int, edit: Edit, oracle: Oracle) -> None:
    """The operation has worked: the oracle follows."""
    now = bits_of(oracle.model)
    count["composed and applied"] += number >= 5 and what.startswith("apply")
    count["taken back"] += what.startswith("revert")
    if what == "undo":
        count["undone"] += any(oracle.stacks[name][-1][0] != number for name in oracle.names(edit))
        oracle.without(number, edit)
        return
    for name in oracle.names(edit):
        if what.startswith("apply"):
            oracle.stacks[name].append((number, now[name]))
        else:
            assert oracle.stacks[name].pop()[0] == number


@pytest.mark.end_to_end
def test_any_sequence():
    """At least a thousand random ones, in three dtypes, with tied weights and without."""
    sequences()
    assert count["sequences"] >= 1000 and all(count.values()), count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_undo_in_the_middle_of_a_thousand(dtype):
    """Without fact 17 the weights are those of the 999 others applied in order; without all, the base's."""
    model, other = (Small(DTYPES[dtype], False) for _ in range(2))
    base, generator = parameter_hashes(model), torch.Generator().manual_seed(2)
    edits = []
    for _ in range(1000):
        factors = torch.randn(6, 3, generator=generator) * 0.1, torch.randn(3, 4, generator=generator)
        edits.append(Edit([LowRank("a.weight", *factors)]))
        edits[-1].apply(model)
    kept = sum(len(entry.before) for entry in editing._entries(model))
    assert kept == 2  # the weight before the first edit, and before the last
    edits[16].undo(model)
    rest = [edit for edit in edits if edit is not edits[16]]
    for edit in rest:
        Edit(edit.changes).apply(other)
    assert parameter_hashes(model) == parameter_hashes(other) and carried(model) == rest
    assert torch.equal(
        rest[500].originals(model)["a.weight"], carried(other)[500].originals(other)["a.weight"]
    )
    with pytest.raises(EditError, match="revert later edits first"):
        rest[500].revert(model)
    with pytest.raises(EditError, match="not applied"):
        edits[16].undo(model)
    for edit in (rest[0], rest[998], rest[997]):  # from both ends
        edit.undo(model)
    assert len(carried(model)) == 996
    for edit in rest[996:400:-1]:
        edit.revert(model)
    assert sum(len(entry.before) for entry in editing._entries(model)) < 15  # and not one for each
    revert_all(model)
    assert parameter_hashes(model) == base and not carried(model)


def test_what_somebody_else_changed_is_not_undone():
    """Weights that are no longer what the edits left are left alone; those put back by others are known to be
    back.
    """
    model = Small(torch.float32, False)
    first, second = edits_for(model)[0], edits_for(model)[0]
    weights = first.apply(model)
    model.a.weight.data.copy_(weights["a.weight"])  # as EasyEdit does
    assert carried(model) == []
    first.apply(model)
    with torch.no_grad():
        model.a.weight[0, 0] += 1
    second.apply(model)
    now = parameter_hashes(model)
    with pytest.raises(EditError, match=r"a\.weight has been changed since"):
        first.undo(model)
    assert parameter_hashes(model) == now
    Edit([LowRank("a.weight", torch.ones(6, 1), torch.ones(1, 4))]).apply(model)
    carried(model)[-1].revert(model)
    second.revert(model)  # back to what somebody else made of it
    for undo in (first.revert, revert_all):
        with pytest.raises(EditError, match="not by an edit"):
            undo(model)


def test_a_copy_of_a_model_knows_its_edits():
    """Applied, copied, taken back in both."""
    model = Small(torch.bfloat16, False)
    base, edit = parameter_hashes(model), edits_for(model)[3]
    edit.apply(model)
    other = copy.deepcopy(model)
    edit.revert(model)
    assert not edit.is_applied(other) and parameter_hashes(other) != base  # the copy carries a copy
    carried(other)[0].revert(other)
    assert parameter_hashes(other) == parameter_hashes(model) == base


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


def interrupted_at(event: int, call: Callable[[], object], everywhere: bool = False) -> tuple[int, bool]:
    """Run `call`, sending this process SIGINT before its `event`-th bytecode in the modules that change
    weights (or line, in the package).

    Returns:
        how many there were, and whether `call` ended in KeyboardInterrupt.
    """
    seen = 0
    watched = ("edit/stack.py", "edit/change.py", "edit/edit.py", "common/signals.py")

    def trace(frame, kind, _):
        nonlocal seen
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) or (not everywhere and not name.endswith(watched)):
            return None
        frame.f_trace_opcodes = not everywhere
        if kind == ("line" if everywhere else "opcode"):
            seen += 1
            if seen == event:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
        return seen, False
    except KeyboardInterrupt:
        return seen, True
    finally:
        sys.settrace(before)


@pytest.mark.end_to_end
def test_ctrl_c_at_any_bytecode_of_apply_and_revert():
    """A real signal before each bytecode: `apply` leaves the weights of before, `revert` is done or not
    begun.
    """
    model = Small(torch.bfloat16, tied=True)
    base = parameter_hashes(model)
    edit = edits_for(model)[4]
    total, _ = interrupted_at(0, lambda: edit.apply(model))
    edited = parameter_hashes(model)
    assert total > 200 and edited != base
    edit.revert(model)
    stopped = 0
    for event in range(1, total):  # the last one is the return itself, at which Python looks for no signal
        _, struck = interrupted_at(event, lambda: edit.apply(model))
        assert struck and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        stopped += struck
        assert parameter_hashes(model) == base and not edit.is_applied(model), (
            f"at bytecode {event} of {total}"
        )
    total, _ = interrupted_at(0, lambda: (edit.apply(model), edit.revert(model)))
    finished = 0
    for event in range(1, total + 1):
        if not edit.is_applied(model):
            edit.apply(model)
        interrupted_at(event, lambda: edit.revert(model))
        assert parameter_hashes(model) == (edited if edit.is_applied(model) else base), (
            f"at bytecode {event} of {total}"
        )
        finished += not edit.is_applied(model)
    assert 0 < finished < total and stopped > 200


def test_ctrl_c_at_any_bytecode_of_undo():
    """A real signal before each bytecode: the edit is out from under the later one, or still in."""
    model = Small(torch.bfloat16, tied=False)
    lower, upper = edits_for(model)[0], edits_for(model)[3]
    upper.apply(model)
    alone = parameter_hashes(model)
    upper.revert(model)

    def both() -> None:
        """One on the other."""
        for edit in (upper, lower):
            if edit.is_applied(model):
                edit.undo(model)
        lower.apply(model)
        upper.apply(model)

    both()
    whole = parameter_hashes(model)
    total, _ = interrupted_at(0, lambda: lower.undo(model))
    assert parameter_hashes(model) == alone and total > 200
    finished = 0
    for event in range(1, total + 1, 3):
        both()
        interrupted_at(event, lambda: lower.undo(model))
        assert parameter_hashes(model) == (whole if lower.is_applied(model) else alone), (
            f"at bytecode {event} of {total}"
        )
        finished += not lower.is_applied(model)
    assert 0 < finished < total / 3


@pytest.mark.parametrize("method", ["MEMIT_MDM", "AlphaEdit_MDM", "ROME_MDM"])
@pytest.mark.end_to_end
def test_ctrl_c_while_an_edit_is_made(tiny, tmp_path, method):
    """Methods that change layers on the way put them back: a signal at random lines of the whole of it."""
    (tmp_path / "text.txt").write_text(
        "The river song of the old city was written by a good singer in the year 1923. " * 40
    )
    model = tiny("llada")
    base = parameter_hashes(model)
    several = (
        {"layers": [0, 1, 2], "mom2_eps": 1e-2}
        if method == "MEMIT_MDM"
        else {"layers": [0, 1], "nullspace_threshold": 1e9}
        if method[0] == "A"
        else {}
    )
    more = (
        {}
        if method == "ROME_MDM"
        else {
            "mom2_dataset": str(tmp_path / "text.txt"),
            "mom2_n_tokens": 200,
            "stats_dir": str(tmp_path),
            **several,
        }
    )
    plan = hparams(alg_name=method, v_num_grad_steps=2, **more)
    make_edit(model, REQUEST, plan)  # the statistics are made now
    total, _ = interrupted_at(0, lambda: make_edit(model, REQUEST, plan), everywhere=True)
    rng, stopped = random.Random(0), 0
    late = [total - n for n in range(0, 60, 3)]  # where layers are changed and put back
    for event in [*rng.sample(range(1, total), 20), *late]:
        _, struck = interrupted_at(event, lambda: make_edit(model, REQUEST, plan), everywhere=True)
        stopped += struck
        assert parameter_hashes(model) == base, f"at line {event} of {total}"
    assert stopped >= 20


def test_signals_wait():
    """Inside the block they are kept, after it they arrive, and the handlers are as they were."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("term"))
    try:
        with pytest.raises(KeyboardInterrupt):
            with uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                with uninterrupted():
                    pass
                seen.append("done")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["done", "term"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llada", "gpt2"])
def test_every_method_leaves_the_model_alone(tiny, family, dtype):
    """Made, applied, taken back, broken: whole models, in every dtype."""
    model = tiny(family, dtype=dtype)
    base = parameter_hashes(model)
    edit = make_edit(model, REQUEST, hparams(v_num_grad_steps=3, v_lr=0.1))
    edit.apply(model)
    with failing_copy(0, Broken), pytest.raises(Broken):
        edit.revert(model)
    assert parameter_hashes(model) == base
    with failing_copy(1, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        edit.apply(model)
    assert parameter_hashes(model) == base and not edit.is_applied(model)
