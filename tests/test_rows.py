"""Rows of one forward pass: what stands in them, what is read where and how it weighs, and which share a
pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.request import Prompt
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.editing.solve.rows import Rows, build_rows
from easyedit_mdm.models.geometry import similar


def facts() -> dict[int, Fact]:
    """Facts number 3 and 5: targets of three tokens and of one, two contexts each, the second longer."""
    anchor = Prompt(torch.tensor([40, 41, 42]), 1)
    one = [Prompt(torch.tensor([10, 11]), 1), Prompt(torch.tensor([7, 8, 10, 11]), 3)]
    other = [Prompt(torch.tensor([20, 21, 22]), 0), Prompt(torch.tensor([9, 20, 21, 22]), 1)]
    return {
        3: Fact(one, torch.tensor([50, 51, 52]), anchor),
        5: Fact(other, torch.tensor([60]), Prompt(torch.tensor([43]), 0)),
    }


def built(model, name: str = "enumerate", kl_position: str = "slot") -> Rows:
    """Their rows under a schedule."""
    plans = {i: Plan.of(model, fact, name) for i, fact in facts().items()}
    states = {i: plan.draw(0, torch.Generator().manual_seed(0)) for i, plan in plans.items()}
    return build_rows(model, facts(), states, kl_position, plans[3].dealt)


def shown(rows: Rows, i: int) -> list[int]:
    """A row without its padding."""
    return rows.ids[i][rows.mask[i].bool()].tolist()


def test_masked_rows(tiny):
    """Contexts x states for each fact, masks in hidden slots, read there; then an anchor that is read at the
    slot after it.
    """
    model = tiny("llada")
    rows, mask = built(model), model.ids.mask
    assert rows.fact.tolist() == [3] * 15 + [5] * 3 and rows.anchor.tolist() == (
        [False] * 14 + [True] + [False] * 2 + [True]
    )
    assert shown(rows, 0) == [10, 11, mask, mask, mask] and shown(rows, 1) == [7, 8, 10, 11, mask, mask, mask]
    assert shown(rows, 2) == [10, 11, 50, mask, mask] and shown(rows, 13) == [7, 8, 10, 11, mask, 51, 52]
    assert rows.fact_at[:2].tolist() == [1, 3]
    assert rows.canvas[:2].tolist() == [2, 4] and rows.canvas[14] == 3
    assert rows.at[:2].tolist() == [[2, 3, 4], [4, 5, 6]]
    assert rows.tokens[0].tolist() == [50, 51, 52] and rows.tokens[15, 0] == 60
    assert (
        shown(rows, 14) == [40, 41, 42, mask] and rows.at[14].tolist() == [3, 3, 3] and rows.fact_at[14] == 1
    )
    assert built(model, kl_position="subject_last").at[14, 0] == 2, "the token after the subject's last"
    for number, states in ((3, 7), (5, 1)):
        mine = (rows.fact == number) & ~rows.anchor
        assert float(rows.weights[mine].sum()) == pytest.approx(1, abs=1e-6) and int(mine.sum()) == 2 * states
    assert not rows.weights[rows.anchor].any() and not rows.weights[15:17, 1:].any(), (
        "slots that a target does not have weigh nothing"
    )
    assert torch.allclose(rows.weights[0], torch.full((3,), 1 / 3 / 3 / 2)), (
        "k = 0: one state of three kinds, three slots, two contexts"
    )
    assert torch.allclose(rows.weights[2], torch.tensor([0, 1.0, 1.0]) / 9 / 2 / 2), (
        "k = 1: three states, two hidden slots"
    )
    assert rows.turn.tolist() == [-1] * 18 and rows.reach is None


def test_causal_rows(tiny):
    """One row a context: the target without its last token, which nothing is read after; the anchor ends
    where it is read.
    """
    model = tiny("llama")
    rows = built(model, "full_mask")
    assert [shown(rows, i) for i in range(3)] == [[10, 11, 50, 51], [7, 8, 10, 11, 50, 51], [40, 41, 42]]
    assert [shown(rows, i) for i in range(3, 6)] == [[20, 21, 22], [9, 20, 21, 22], [43]]
    assert rows.at[0].tolist() == [2, 3, 4] and rows.at[2, 0] == 3, (
        "aligned with tokens: read where the next one would stand"
    )
    short = built(model, "full_mask", "subject_last")
    assert shown(short, 2) == [40, 41] and short.at[2, 0] == 2


def test_dealt_rows(tiny):
    """`spread`: state s in context c counts at the steps t with (c + t) mod states = s; those of a step weigh
    1 together.
    """
    rows = built(tiny("llada"), "spread")
    states = int(rows.period[0])
    for step in range(2 * states):
        counting = rows.counting(step)
        mine = counting & (rows.fact == 3) & ~rows.anchor
        numbers = mine.nonzero().flatten().tolist()
        assert [(n % 2, n // 2) for n in numbers] == sorted(
            [(c, (c + step) % states) for c in range(2)], key=lambda pair: pair[::-1]
        )
        assert float(rows.weights[mine].sum()) == pytest.approx(1, abs=1e-6) and counting[rows.anchor].all()


def test_shifted_rows(tiny):
    """Every site in one column, padding on the left; tokens, sites and places that are read move together."""
    model = tiny("llama")
    rows = built(model, "full_mask")
    moved = rows.aligned(pad=0)
    assert set(moved.fact_at.tolist()) == {3} and moved.ids.shape[1] == max(
        int(r.mask.sum() + 3 - r.fact_at) for r in map(rows.take, single(rows))
    )
    for i in range(len(rows)):
        by = 3 - int(rows.fact_at[i])
        assert shown(moved, i) == shown(rows, i) and int(moved.mask[i].argmax()) == by
        assert (
            moved.ids[i, moved.fact_at[i]] == rows.ids[i, rows.fact_at[i]]
            and (moved.ids[i][moved.mask[i] == 0] == 0).all()
        )
        assert torch.equal(moved.at[i], rows.at[i] + by) and moved.canvas[i] == rows.canvas[i] + by
    with pytest.raises(AssertionError, match="weights would change"):
        dataclasses.replace(rows, reach=torch.zeros(rows.ids.shape)).aligned(pad=0)


def single(rows: Rows) -> list[torch.Tensor]:
    """An index for each row alone."""
    return [torch.tensor([i]) for i in range(len(rows))]


def test_chunks(tiny):
    """Each row once, up to `most` a pass, the longest first; with the columns and slots that the pass
    needs.
    """
    rows = built(tiny("llada"))
    for by_rest in (False, True):
        seen = []
        for some, length, slots in rows.chunks(4, by_rest):
            assert len(some) <= 4 and length == int(rows.mask[some].sum(1).max())
            assert slots == max(1, int(((rows.weights[some] != 0) * torch.arange(1, 4)).max())), (
                "the last one that weighs, or an anchor's"
            )
            part = rows.take(some).cut(length, slots)
            assert part.ids.shape == part.mask.shape == (
                len(some),
                length,
            ) and part.at.shape == part.weights.shape == (len(some), slots)
            assert float(part.weights.sum()) == pytest.approx(float(rows.weights[some].sum()), abs=1e-7), (
                "nothing that weighs is cut off"
            )
            seen.append(some)
        measure = rows.mask.sum(1) - (rows.fact_at if by_rest else 0)
        assert sorted(torch.cat(seen).tolist()) == list(range(18))
        assert measure[torch.cat(seen)].tolist() == sorted(measure.tolist(), reverse=True)
    whole, rest = ([some.tolist() for some, _, _ in rows.chunks(4, by_rest)] for by_rest in (False, True))
    assert whole != rest
    (everything,) = rows.chunks(100)
    assert len(everything[0]) == 18 and everything[1:] == (7, 3)


@pytest.mark.parametrize(("device", "more"), [("cpu", 32), ("cuda", 256)])
def test_rows_are_put_together_at_the_least_cost(device, more):
    """Held against every way to cut rows in order of their length; `most` is kept, and nothing is lost."""
    generator = random.Random(0)
    for _ in range(40):
        lengths = [generator.randint(1, 9 * more // 4) for _ in range(generator.randint(1, 8))]
        found = list(similar(lengths, 8, device))
        order = sorted(lengths, reverse=True)
        costs = []
        for cut in itertools.product((False, True), repeat=len(order) - 1):
            starts = [0, *(i + 1 for i, here in enumerate(cut) if here), len(order)]
            costs.append(sum(more + (b - a) * order[a] for a, b in itertools.pairwise(starts)))
        assert sum(more + len(some) * max(lengths[i] for i in some) for some in found) == min(costs)
        few = list(similar(lengths, 3, device))
        assert max(map(len, few)) <= 3
        assert sorted(i for some in few for i in some) == list(range(len(lengths)))
    assert list(similar([], 4, device)) == []
    assert [len(some) for some in similar([5] * 7, 3, device)] == [3, 3, 1]


def test_take(tiny):
    """By number or by yes and no: every field, `reach` with the others."""
    rows = dataclasses.replace(built(tiny("llada")), reach=torch.rand(18, 7))
    some = rows.take(torch.tensor([4, 2]))
    assert all(torch.equal(value, getattr(rows, name)[[4, 2]]) for name, value in vars(some).items())
    assert torch.equal(rows.take(rows.anchor).fact, torch.tensor([3, 5])) and some.cut(5, 1).reach.shape == (
        2,
        5,
    )
