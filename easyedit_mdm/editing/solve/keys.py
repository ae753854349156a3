"""Keys: what enters the edited linear map at the subject's token, and what the layer makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.editing.facts import Fact, fact_generator
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams, StateHyperParams
from easyedit_mdm.editing.request import Prompt
from easyedit_mdm.editing.solve.plans import Plan
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.geometry import right_padded, similar
from easyedit_mdm.models.hooks import reading_input, reading_output


@dataclass(frozen=True)
class Keys:
    """Keys and values of one fact at the site, in float32.

    Attributes:
        keys: one a context prefix; the first is the bare prompt's. With `key_states: average` each is a mean
            over states.
        values: what the site gives for each key: means over the same states.
        initial: v_0, the site's output for the bare prompt with nothing revealed.
    """

    keys: Float[Tensor, "contexts inner"]
    values: Float[Tensor, "contexts width"]
    initial: Float[Tensor, " width"]

    @property
    def mean(self) -> Float[Tensor, " inner"]:
        """k*: the mean over context prefixes."""
        return self.keys.mean(0)


@dataclass(frozen=True)
class KeyColumns:
    """Keys of several facts as columns, for a closed form.

    Attributes:
        keys: the columns, float64.
        fact: which fact each belongs to.
        weights: weight of each; those of a fact sum to 1.
    """

    keys: Float[Tensor, "inner columns"]
    fact: Int[Tensor, " columns"]
    weights: Float[Tensor, " columns"]


# The residual stream of some rows (by the number of their pass) on its way up, as (layer, its input): for an
# edit of several layers from the lowest upwards, which changes nothing below the layer that it has come to.
Lower = dict[int, tuple[int, Tensor]]


@dataclass(frozen=True)
class KeyStates:
    """The states under which a fact's key is read after some of its context prefixes.

    Attributes:
        contexts: the prefixes, by number.
        tails: the slots of every state, as tokens; nothing is revealed in the first. On an open canvas there
            are more than the target has.
        weights: weight of each state.
    """

    contexts: tuple[int, ...]
    tails: list[Int[Tensor, " _"]]
    weights: Float[Tensor, " states"]


def key_states(adapter: Adapter, fact: Fact, hparams: StateHyperParams, which: str) -> list[KeyStates]:
    """The states under which the key is read, `which` being the hyperparameter `key_states`; the first holds
    those of the bare prompt.
    """
    if which == "full_mask":
        plan = Plan.of(adapter, fact, "full_mask")
    else:
        plan = Plan.of(adapter, fact, "enumerate", hparams.max_states, hparams.open_canvas)
    found: dict[tuple[int, ...], KeyStates] = {}
    for contexts, states in plan.draw(0, fact_generator(fact, hparams.seed)):
        right = fact.target if states.tokens is None else states.tokens
        known = found.get(contexts, KeyStates(contexts, [], states.weights[:0]))
        first = len(known.tails)
        tails = [adapter.behind(right, shown, first + draw) for draw, shown in enumerate(states.revealed)]
        found[contexts] = KeyStates(contexts, known.tails + tails, torch.cat([known.weights, states.weights]))
    return list(found.values())


@dataclass
class SiteRows:
    """Rows that are read at one position each.

    Attributes:
        rows: prompts with the target's slots behind them.
        at: where each is read.
        canvas: where its slots begin.
    """

    rows: list[Tensor]
    at: list[int]
    canvas: list[int]

    @classmethod
    def of(cls, prompts: Iterable[tuple[Prompt, Tensor]]) -> SiteRows:
        """A row for each prompt and the slots behind it, read at the subject's token."""
        pairs = list(prompts)
        rows = [torch.cat([prompt.ids, tail]) for prompt, tail in pairs]
        return cls(rows, [prompt.fact_at for prompt, _ in pairs], [len(prompt.ids) for prompt, _ in pairs])


def _key_rows(fact: Fact, states: Sequence[KeyStates]) -> Iterator[tuple[Prompt, Tensor]]:
    for some in states:
        yield from ((fact.contexts[c], tail) for tail in some.tails for c in some.contexts)


@torch.no_grad()
def read_site(
    adapter: Adapter,
    site: Site,
    read: SiteRows,
    max_rows: int,
    output_of: str | None = None,
    lower: Lower | None = None,
) -> tuple[Float[Tensor, "rows inner"], Float[Tensor, "rows width"]]:
    """Input of the site and output of a module of the same layer (the site by default) at one position of
    each row, in float32.

    Args:
        read: the rows.
        lower: what earlier calls with the same rows have computed, and this one leaves to later ones.
    """
    module, watched = adapter.module(site.name), adapter.module(output_of or site.name)
    rows, at = read.rows, read.at
    if adapter.attention.causal:  # what comes later changes nothing at that position
        rows = [row[: place + 1] for row, place in zip(rows, at)]
    passes = list(similar([len(row) for row in rows], max_rows, adapter.device))
    keys: list[Tensor] = []
    outputs: list[Tensor] = []
    for number, some in enumerate(passes):
        ids, mask = right_padded([rows[i] for i in some], adapter.ids.pad, adapter.device)
        canvas = torch.tensor([read.canvas[i] for i in some], device=ids.device)
        start, hidden = (0, None) if lower is None else lower.get(number, (0, None))
        if lower is not None and start < site.layer:
            hidden = adapter.hidden_before(site.layer, ids, mask, start=start, hidden=hidden, canvas=canvas)
            start, _ = lower[number] = site.layer, hidden
        with reading_input(module) as entering, reading_output(watched) as leaving:
            adapter.hidden_before(site.layer + 1, ids, mask, start=start, hidden=hidden, canvas=canvas)
        index, places = torch.arange(len(some)), torch.tensor([at[i] for i in some])
        for values, into in ((entering[0], keys), (leaving[0], outputs)):
            into.append(values[index.to(values.device), places.to(values.device)].float())
    back = torch.tensor([i for some in passes for i in some]).argsort()
    return torch.cat(keys)[back.to(keys[0].device)], torch.cat(outputs)[back.to(outputs[0].device)]


def _by_group(
    values: Float[Tensor, "rows width"], states: Sequence[KeyStates]
) -> list[Float[Tensor, "states some width"]]:
    """What was read in the rows of `_key_rows`, apart again."""
    sizes = [len(some.tails) * len(some.contexts) for some in states]
    parts = values.split(sizes)
    return [part.view(len(some.tails), len(some.contexts), -1) for part, some in zip(parts, states)]


def read_keys(adapter: Adapter, site: Site, fact: Fact, hparams: ROMEMDMHyperParams) -> Keys:
    """Keys in the states of `key_states`, and what the site makes of them, both averaged over the states."""
    states = key_states(adapter, fact, hparams, hparams.key_states)
    keys, values = read_site(adapter, site, SiteRows.of(_key_rows(fact, states)), hparams.max_rows)
    order = torch.tensor([c for some in states for c in some.contexts]).argsort()

    def averaged(read: Tensor) -> Tensor:
        """A mean over states for each context prefix, in the order of the prefixes."""
        groups = zip(states, _by_group(read, states))
        means = [torch.einsum("s,sci->ci", some.weights.to(each.device), each) for some, each in groups]
        return torch.cat(means)[order.to(read.device)]

    return Keys(averaged(keys), averaged(values), values[0])


def key_columns(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    hparams: ROMEMDMHyperParams,
    lower: Lower | None = None,
) -> KeyColumns:
    """One key a fact, or one a state (`key_states: per_state`), each averaged over the context prefixes.

    `key_average: single` is the plain mean over prefixes; `easyedit` takes the mean of the bare prompt's key
    and of the mean of the others, as EasyEdit's MEMIT, which averages by kind of context, comes to. `lower`:
    see `read_site`.
    """
    states = [key_states(adapter, fact, hparams, hparams.key_states) for fact in facts]
    rows = SiteRows.of(pair for fact, some in zip(facts, states) for pair in _key_rows(fact, some))
    keys, _ = read_site(adapter, site, rows, hparams.max_rows, lower=lower)
    read = iter(_by_group(keys, [group for some in states for group in some]))
    columns, owner, weights = [], [], []
    for i, some in enumerate(states):
        means = [_over_contexts(next(read).double(), group, facts[i], hparams.key_average) for group in some]
        each, heavy = torch.cat([mean for mean, _ in means]), torch.cat([weight for _, weight in means])
        if hparams.key_states != "per_state":
            each, heavy = (heavy.to(each)[:, None] * each).sum(0, keepdim=True), torch.ones(1)
        columns.append(each)
        owner += [i] * len(each)
        weights.append(heavy)
    return KeyColumns(torch.cat(columns).T, torch.tensor(owner), torch.cat(weights))


def _over_contexts(
    keys: Float[Tensor, "states some inner"], group: KeyStates, fact: Fact, average: str
) -> tuple[Float[Tensor, "states inner"], Float[Tensor, " states"]]:
    """Each state's key, averaged over the prefixes that the state stands after, and what it weighs among the
    fact's keys.
    """
    apart = average != "single" and len(fact.contexts) > 1  # the bare prompt by itself
    others = len(fact.contexts) - apart
    bare = apart and 0 in group.contexts
    if bare and len(group.contexts) == len(fact.contexts):
        return (keys[:, 0] + keys[:, 1:].mean(1)) / 2, group.weights
    if not bare:
        share = len(group.contexts) / others * (0.5 if apart else 1.0)
        return keys.mean(1), group.weights * share
    rest = (len(group.contexts) - 1) / others / 2
    mean = (keys[:, 0] / 2 + keys[:, 1:].sum(1) / others / 2) / (0.5 + rest)
    return mean, group.weights * (0.5 + rest)
