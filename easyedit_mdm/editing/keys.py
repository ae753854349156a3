"""Keys: what enters the edited linear map at the subject's token, and what the layer makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from easyedit_mdm.denoising import schedule
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.rows import Fact
from easyedit_mdm.editing.value import fact_generator
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.geometry import right_padded, similar
from easyedit_mdm.models.hooks import reading_input, reading_output


@dataclass(frozen=True)
class Keys:
    """Keys and values of one fact at the site, in float32.

    Attributes:
        keys: one a context prefix; the first is the bare prompt's.
        values: the site's output for each, with nothing revealed.
    """

    keys: Float[Tensor, "contexts inner"]
    values: Float[Tensor, "contexts width"]

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


# The residual stream of some rows (by the number of their pass) on its way up, as (layer, its input): for an edit of several layers from
# the lowest upwards, which changes nothing below the layer that it has come to.
Lower = dict[int, tuple[int, Tensor]]


def key_states(adapter: Adapter, fact: Fact, hparams: ROMEMDMHyperParams) -> tuple[list[Tensor], Float[Tensor, " states"]]:
    """The target's slots, as tokens, in every state under which the key is read, and each state's weight."""
    if not adapter.masked:
        return [fact.target], torch.ones(1)
    name = "full_mask" if hparams.key_states == "full_mask" else "enumerate"
    states = schedule(name, len(fact.target), hparams.max_states).draw(0, fact_generator(fact, hparams.seed))
    return [torch.where(revealed, fact.target, adapter.ids.slot) for revealed in states.revealed], states.weights


@torch.no_grad()
def read_site(
    adapter: Adapter,
    site: Site,
    rows: Sequence[Tensor],
    at: Sequence[int],
    max_rows: int,
    output_of: str | None = None,
    lower: Lower | None = None,
) -> tuple[Float[Tensor, "rows inner"], Float[Tensor, "rows width"]]:
    """Input of the site and output of a module of the same layer (the site by default) at one position of each row, in float32.

    Args:
        lower: what earlier calls with the same rows have computed, and this one leaves to later ones.
    """
    module, watched = adapter.module(site.name), adapter.module(output_of or site.name)
    if not adapter.masked:  # what comes later changes nothing at that position
        rows = [row[: place + 1] for row, place in zip(rows, at)]
    passes = list(similar([len(row) for row in rows], max_rows))
    keys: list[Tensor] = []
    outputs: list[Tensor] = []
    for number, some in enumerate(passes):
        ids, mask = right_padded([rows[i] for i in some], adapter.ids.pad, adapter.device)
        start, hidden = (0, None) if lower is None else lower.get(number, (0, None))
        if lower is not None and start < site.layer:
            hidden = adapter.hidden_before(site.layer, ids, mask, start=start, hidden=hidden)
            start, _ = lower[number] = site.layer, hidden
        with reading_input(module) as entering, reading_output(watched) as leaving:
            adapter.hidden_before(site.layer + 1, ids, mask, start=start, hidden=hidden)
        index, places = torch.arange(len(some)), torch.tensor([at[i] for i in some])
        for values, into in ((entering[0], keys), (leaving[0], outputs)):
            into.append(values[index.to(values.device), places.to(values.device)].float())
    back = torch.tensor([i for some in passes for i in some]).argsort()
    return torch.cat(keys)[back.to(keys[0].device)], torch.cat(outputs)[back.to(outputs[0].device)]


def read_keys(adapter: Adapter, site: Site, fact: Fact, hparams: ROMEMDMHyperParams) -> Keys:
    """Keys under the prompt followed by the target's slots, in the states of `key_states`, and the values with nothing revealed."""
    tails, weights = key_states(adapter, fact, hparams)
    rows = [torch.cat([p.ids, tail]) for tail in tails for p in fact.contexts]
    keys, values = read_site(adapter, site, rows, [p.site for p in fact.contexts] * len(tails), hparams.max_rows)
    n = len(fact.contexts)  # the first state of every schedule is the one with nothing revealed
    by_state = keys.view(len(tails), n, -1)
    return Keys(torch.einsum("s,sci->ci", weights.to(keys.device), by_state), values[:n])


def key_columns(adapter: Adapter, site: Site, facts: Sequence[Fact], hparams: ROMEMDMHyperParams, lower: Lower | None = None) -> KeyColumns:
    """One key a fact, or one a state (`key_states: per_state`), each averaged over the context prefixes.

    `key_average: single` is the plain mean over prefixes; `easyedit` takes the mean of the bare prompt's key and of the
    mean of the others, as EasyEdit's MEMIT, which averages by kind of context, comes to. `lower`: see `read_site`.
    """
    rows, at, weights = [], [], []
    for fact in facts:
        tails, shares = key_states(adapter, fact, hparams)
        weights.append(shares)
        rows += [torch.cat([p.ids, tail]) for tail in tails for p in fact.contexts]
        at += [p.site for _ in tails for p in fact.contexts]
    keys, _ = read_site(adapter, site, rows, at, hparams.max_rows, lower=lower)
    columns, owner, column_weights, start = [], [], [], 0
    for i, (fact, shares) in enumerate(zip(facts, weights)):
        n = len(shares) * len(fact.contexts)
        each = _mean_over_contexts(keys[start : start + n].double().view(len(shares), len(fact.contexts), -1), hparams.key_average)
        start += n
        if hparams.key_states != "per_state":
            each, shares = (shares.to(each)[:, None] * each).sum(0, keepdim=True), torch.ones(1)
        columns.append(each)
        owner += [i] * len(each)
        column_weights.append(shares)
    return KeyColumns(torch.cat(columns).T, torch.tensor(owner), torch.cat(column_weights))


def _mean_over_contexts(keys: Float[Tensor, "states contexts inner"], average: str) -> Float[Tensor, "states inner"]:
    if average == "single" or keys.shape[1] == 1:
        return keys.mean(1)
    return (keys[:, 0] + keys[:, 1:].mean(1)) / 2
