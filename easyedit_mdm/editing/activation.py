"""Edits as activations: the optimised value added at the site while the model decodes, no weight changed.

What this reaches is the ceiling of every method that writes at the site: where it fails, no closed form can
help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.denoising import DecodeConfig, decode
from easyedit_mdm.editing.facts import Fact, tokenise
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.keys import read_keys
from easyedit_mdm.editing.solve.sites import check_modules, settled
from easyedit_mdm.editing.solve.value import optimise
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.hooks import adding_at


@dataclass(frozen=True)
class Activations:
    """Optimised values of some facts at one site.

    Attributes:
        deltas: what is added to the site's output, one a fact.
        ratio: ||delta|| over the norm of the site's own output.
    """

    site: Site
    facts: list[Fact]
    deltas: Float[Tensor, "facts width"]
    ratio: Float[Tensor, " facts"]


def optimise_at(
    adapter: Adapter, requests: Sequence[EditRequest], hparams: ROMEMDMHyperParams
) -> Activations:
    """Optimise a value for each request, all together, at the layer and with the settings of the
    hyperparameters, as an activation in any case.
    """
    facts = [tokenise(adapter, request, hparams) for request in requests]
    site = settled(adapter, check_modules(adapter, hparams), facts)
    initial = torch.stack([read_keys(adapter, site, fact, hparams).initial for fact in facts])
    deltas = torch.stack([outcome.delta for outcome in optimise(adapter, site, facts, initial, hparams)])
    return Activations(site, facts, deltas, deltas.norm(dim=1) / initial.norm(dim=1))


def success_as_activation(
    adapter: Adapter, values: Activations, config: DecodeConfig = DecodeConfig()
) -> list[bool]:
    """Exact match of each fact's target over N masks (or N greedy tokens) after the bare prompt, with its
    value added.
    """
    done = [False] * len(values.facts)
    for length in sorted(
        {len(f.target) for f in values.facts}
    ):  # rows of one length take the same steps, in the same order
        which = [i for i, f in enumerate(values.facts) if len(f.target) == length]
        at = torch.tensor([values.facts[i].contexts[0].fact_at for i in which])
        with adding_at(adapter.module(values.site.name), at, values.deltas[which]):
            paths = decode(
                adapter, [values.facts[i].contexts[0].ids for i in which], [length] * len(which), config
            )
        for i, path in zip(which, paths):
            done[i] = bool(torch.equal(path.tokens[:length], values.facts[i].target))
    return done
