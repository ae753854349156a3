"""The states that a model, as edited so far, comes through while it decodes a target after the bare
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.denoising.sampler import writable
from easyedit_mdm.denoising.states import Schedule, Slots, States
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.hooks import adding_at, writing_all_through, writing_through

# what is in the model while rows run, given the facts that they are of, by number, and each row's column of
# the fact
Inserted = Callable[[Sequence[int], Int[Tensor, " rows"]], AbstractContextManager[None]]


def _nothing(facts: Sequence[int], at: Int[Tensor, " rows"]) -> AbstractContextManager[None]:
    """The model as it is."""
    return nullcontext()


def states_met(
    adapter: Adapter,
    site: Site | None,
    facts: Sequence[Fact],
    plans: Sequence[Plan],
    some: Sequence[int],
    deltas: Sequence[Tensor] = (),
    rights: Float[Tensor, "facts inner"] | None = None,
    together: bool = False,
    inserted: Inserted = _nothing,
) -> dict[int, list[tuple[tuple[int, ...], States]]]:
    """For some facts (by number) the states that the model comes through after the first prefix of each
    group of their prefixes, beside the numbers of the group's prefixes. See `rolled_out`.
    """
    met: dict[int, list[tuple[tuple[int, ...], States]]] = {i: [] for i in some}
    for number in range(max((len(plans[i].groups) for i in some), default=0)):
        groups = {i: plans[i].groups[number] for i in some if number < len(plans[i].groups)}
        asked = {
            i: replace(facts[i], contexts=[facts[i].contexts[group.contexts[0]]])
            for i, group in groups.items()
        }
        schedules = {i: plans[i].schedules[number] for i in groups}
        rolled = rolled_out(adapter, site, asked, deltas, schedules, rights, together, inserted)
        for i, states in rolled.items():
            met[i].append((groups[i].contexts, states))
    return met


@torch.no_grad()
def rolled_out(
    adapter: Adapter,
    site: Site | None,
    facts: dict[int, Fact],
    deltas: Sequence[Tensor],
    plans: Sequence[Schedule] | Mapping[int, Schedule],
    rights: Float[Tensor, "facts inner"] | None = None,
    together: bool = False,
    inserted: Inserted = _nothing,
) -> dict[int, States]:
    """For each fact (by number) its N states, from nothing revealed to one slot left; at most `plans[i].most`
    of them, spread evenly.

    A step commits the slot whose best token has the highest probability (LLaDA's `low_confidence`) among
    those of the open block: its right token, or the model's own. The best token is the best of those that the
    sampler may write. All facts go through the model together: as many passes as the longest target has
    tokens. `rights`, `together`: see `easyedit_mdm.editing.solve.value.optimise`; `deltas` and `rights` are
    those of all facts. `site` None: no deltas, but what `inserted` puts into the model.
    """
    shared = (rights, torch.stack(list(deltas))) if together and rights is not None else None
    revealed = {i: torch.zeros(len(f.target), dtype=torch.bool) for i, f in facts.items()}
    shown = {i: f.target.clone() for i, f in facts.items()}
    blocks = {
        i: Slots(adapter.attention.blocks(len(f.contexts[0].ids), len(f.target))) for i, f in facts.items()
    }
    met: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {i: [] for i in facts}
    for step in range(max((len(f.target) for f in facts.values()), default=0)):
        going = [i for i in facts if step < len(facts[i].target)]
        some = [facts[i] for i in going]
        at = torch.tensor([fact.contexts[0].fact_at for fact in some])
        if site is None:
            edited = inserted(going, at)
        else:
            through = None if rights is None or together else rights[going]
            edited = _written(adapter, site, at, [deltas[i] for i in going], through, shared)
        with edited:
            slots = _slots(adapter, some, [revealed[i] for i in going], [shown[i] for i in going], step)
        for i, logits in zip(going, slots):
            scored = ~revealed[i] & torch.tensor(blocks[i].inside(step))
            met[i].append((revealed[i].clone(), scored, shown[i].clone()))
            token = writable(adapter, logits).argmax(-1)
            best = logits.softmax(-1).gather(-1, token[:, None])[:, 0]
            slot = int(best.masked_fill(~scored, -1).argmax())
            revealed[i][slot] = True
            if plans[i].rolled == "own":
                shown[i][slot] = token[slot]
    return {i: _spread(met[i], plans[i].most) for i in facts}


def _spread(met: list[tuple[Tensor, Tensor, Tensor]], most: int) -> States:
    """Some of the states met, each as heavy as any other."""
    kept = [met[k] for k in torch.linspace(0, len(met) - 1, min(len(met), most)).round().int().tolist()]
    revealed, scored, shown = (torch.stack(column) for column in zip(*kept))
    return States(revealed, scored, torch.full((len(kept),), 1 / len(kept)), shown)


def _written(
    adapter: Adapter,
    site: Site,
    at: Int[Tensor, " going"],
    deltas: Sequence[Float[Tensor, " width"]],
    rights: Float[Tensor, "going inner"] | None,
    shared: tuple[Float[Tensor, "facts inner"], Float[Tensor, "facts width"]] | None,
) -> AbstractContextManager[None]:
    """Each row's delta in the model: at its fact's column, or in the weights. `shared`: the changes (rights,
    deltas) of all facts in the weights.
    """
    module = adapter.module(site.name)
    if shared is not None:
        return writing_all_through(module, *shared)
    added = torch.stack(list(deltas))
    if rights is not None:
        return writing_through(module, rights, added)
    return adding_at(module, at, added)


def _slots(
    adapter: Adapter,
    facts: Sequence[Fact],
    revealed: Sequence[Bool[Tensor, " _"]],
    shown: Sequence[Int[Tensor, " _"]],
    draw: int,
) -> list[Float[Tensor, "_ vocab"]]:
    """Logits at each fact's slots, a row a fact. `draw`: number of the draw of noise, where hidden slots show
    it.
    """
    tails = [adapter.behind(s, r, draw) for r, s in zip(revealed, shown)]
    ids, mask = right_padded(
        [torch.cat([f.contexts[0].ids, tail]) for f, tail in zip(facts, tails)],
        adapter.ids.pad,
        adapter.device,
    )
    most = max(map(len, tails))
    start = torch.tensor([len(f.contexts[0].ids) for f in facts])
    at = (start[:, None] + torch.arange(most)).clamp(max=ids.shape[1] - 1).to(ids.device)
    logits = adapter.token_logits(ids, mask, at=at, canvas=start.to(ids.device)).float().cpu()
    return [row[: len(tail)] for row, tail in zip(logits, tails)]
