"""One fact, one layer, rank one: key, value and closed form, which ROME and r-ROME share.

With key k*, delta and second moments C,

    u = C^-1 k* / ||C^-1 k*||,    dW = delta u^T / (k . u),

where k is k* (`key_average: single`) or the bare prompt's key (`easyedit`). With statistics off, C is the
identity, as in EasyEdit's ROME.

u and k do not depend on delta, so the update's effect at every token of every row is known before delta is:
(u . k_t) / (k . u) delta at token t. `optimise_through: weights` optimises delta with all of it, instead of
with delta at the subject's token alone: what the update does to the other tokens, much for text unlike what C
was made of, is then part of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.facts import Fact, tokenise
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.request import EditRequest
from easyedit_mdm.editing.solve.card import card
from easyedit_mdm.editing.solve.keys import Keys, read_keys
from easyedit_mdm.editing.solve.sites import check_modules, low_rank, settled, statistics
from easyedit_mdm.editing.solve.value import Optimised, optimise
from easyedit_mdm.errors import OptimisationError, RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site


def site_values(
    adapter: Adapter, requests: Sequence[EditRequest], hparams: ROMEMDMHyperParams
) -> list[Optimised]:
    """The optimised values of requests at the site, clamped by the norm of its own output there."""
    site = check_modules(adapter, hparams)
    if site.routed and len(requests) > 1:  # each fact has experts of its own
        return [outcome for request in requests for outcome in site_values(adapter, [request], hparams)]
    facts = [tokenise(adapter, request, hparams) for request in requests]
    site = settled(adapter, site, facts)
    keys = [read_keys(adapter, site, fact, hparams) for fact in facts]
    return _optimised(adapter, site, facts, keys, hparams)


def _optimised(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    keys: Sequence[Keys],
    hparams: ROMEMDMHyperParams,
    direction: Direction | None = None,
) -> list[Optimised]:
    """The values, through the weights where the hyperparameters say so; `direction`: the only fact's."""
    rights = None
    if hparams.optimise_through == "weights":
        rights = torch.stack(
            [(d := direction or closed_form(adapter, site, k, hparams)).u / d.denominator for k in keys]
        )
    return optimise(adapter, site, facts, torch.stack([k.initial for k in keys]), hparams, rights)


def rank_one(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: ROMEMDMHyperParams,
    residual: Callable[[Keys, Tensor], Tensor],
    values: Sequence[Optimised] | None = None,
) -> Edit:
    """Key, value and closed form of one fact.

    Args:
        residual: what dW is to add to the site's output at k*, from the keys and the optimised delta.
        values: the fact's, where it has been optimised already.
    """
    if len(requests) != 1:
        raise RequestError(
            f"{hparams.alg_name} writes one fact at a time, got {len(requests)} requests: edit them one "
            "after another"
        )
    fact = tokenise(adapter, requests[0], hparams)
    site = settled(adapter, check_modules(adapter, hparams), [fact])
    keys = read_keys(adapter, site, fact, hparams)
    direction = closed_form(adapter, site, keys, hparams)
    outcome = (values or _optimised(adapter, site, [fact], [keys], hparams, direction))[0]
    added = residual(keys, outcome.delta)
    left = (added.to(direction.u.device) / direction.denominator)[:, None]
    return Edit(
        low_rank(adapter, site, left, direction.u[None]),
        card(requests, [fact], hparams, [outcome], {**direction.figures, "delta_norm": float(added.norm())}),
    )


@dataclass(frozen=True)
class Direction:
    """All of dW = delta u^T / denominator that does not depend on delta.

    Attributes:
        figures: what tells whether the update is sound.
    """

    u: Float[Tensor, " inner"]
    denominator: Float[Tensor, ""]
    figures: dict[str, int | float]


def closed_form(adapter: Adapter, site: Site, keys: Keys, hparams: ROMEMDMHyperParams) -> Direction:
    """Where the update reads, from the keys and the statistics.

    Raises:
        OptimisationError: if the denominator vanishes.
    """
    solved, bare = (keys.keys[0] if hparams.key_average == "prompt" else keys.mean), keys.keys[0]
    u = solved
    figures: dict[str, int | float] = {}
    if hparams.mom2_adjustment:
        moments = statistics(adapter, [site], hparams)[0]
        u = moments.solve(u, hparams.mom2_eps)
        figures |= moments.cheap_figures(hparams.mom2_eps)
    u = u / u.norm()
    key = bare if hparams.key_average == "easyedit" else solved
    denominator = torch.dot(key, u)
    if not denominator.isfinite() or denominator.abs() < 1e-8 * key.norm():
        raise OptimisationError(
            f"the denominator k . u of the update is {float(denominator):.3g}: the key vanishes at layer "
            f"{site.layer}"
        )
    return Direction(
        u, denominator, {**figures, "denominator": float(denominator), "key_norm": float(key.norm())}
    )
