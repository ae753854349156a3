"""Many facts at once: one value optimisation for all, the residual spread over several layers, and a closed
form a layer.

MEMIT (Meng et al., arXiv 2210.07229, algorithm 1). With z the layer output that makes the model say the
target, and layers l_1 < ... < l_L, layer l_i gets its share of what is still missing at l_L:

    R_i = (z - h_{l_L}) / (L - i + 1),    dW_i = closed form(keys at l_i, R_i),

keys and h read again after each layer has been changed. The methods differ in the closed form alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from easyedit_mdm.editing.edit import Edit, LowRank, keeping, write
from easyedit_mdm.editing.facts import Fact, tokenise
from easyedit_mdm.editing.history import History
from easyedit_mdm.editing.hparams import ROMEMDMHyperParams
from easyedit_mdm.editing.request import EditRequest, check_requests
from easyedit_mdm.editing.solve.card import card
from easyedit_mdm.editing.solve.keys import Lower, SiteRows, key_columns, key_states, read_site
from easyedit_mdm.editing.solve.sites import check_modules, low_rank, settled, statistics
from easyedit_mdm.editing.solve.value import Optimised, optimise
from easyedit_mdm.errors import HyperParameterError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.statistics import SecondMoments


@dataclass
class BatchHyperParams(ROMEMDMHyperParams):
    """What the batched methods add to ROME_MDM's hyperparameters.

    Attributes:
        mom2_adjustment: must stay on: these methods are defined by their statistics.
        mom2_update_weight: lambda, the weight of what the layer knows already, C, against the new facts.
        key_average: `single`: mean over context prefixes; `easyedit`: mean of the bare prompt's key and the
            mean of the others.
        key_states: `full_mask`, `average` over the target's states, or `per_state`: a key for each state,
            which share delta, as least squares weighted like the states.
        clamp_reference: whose norm delta's clamp and decay are measured by: the `block`'s output (MEMIT) or
            the `mlp`'s (ROME).
        mom2_factor: with `optimise_through: weights`, weight in the loss of what the update adds to the
            outputs of C's text, E ||dW k||^2 / ||v_0||^2; 0 leaves it to the closed form alone.
        batch_size: requests a batch, for EasyEdit's `batch_edit`.
    """

    mom2_adjustment: bool = True
    mom2_update_weight: int | float = 15000
    # set below, MEMIT's own
    context_template_length_params: list[list[int]] = None  # type: ignore[assignment]
    clamp_reference: str = "block"
    mom2_factor: int | float = 0.0
    batch_size: int = 1

    ALG_NAME: ClassVar[str] = ""
    KEY_STATES: ClassVar[tuple[str, ...]] = ("full_mask", "average", "per_state")
    THROUGH: ClassVar[tuple[str, ...]] = ("activation", "weights")
    LAYERS: ClassVar[str] = "some"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The update of these methods is linear in the values, so that it can be optimised through."""
        if "THROUGH" not in vars(cls):
            cls.THROUGH = BatchHyperParams.THROUGH
        super().__init_subclass__(**kwargs)

    def __post_init__(self) -> None:
        if self.context_template_length_params is None:
            self.context_template_length_params = [[10, 5]]
        super().__post_init__()

    def validate(self) -> None:
        """Check every field that can be checked without the model.

        Raises:
            HyperParameterError, UnknownNameError: naming field and value.
        """
        super().validate()
        if not self.mom2_adjustment:
            raise HyperParameterError(
                f"mom2_adjustment is off, but {self.alg_name} is defined by its statistics: leave it on, or"
                " use ROME_MDM"
            )
        if self.clamp_reference not in ("block", "mlp"):
            raise HyperParameterError(f"clamp_reference={self.clamp_reference!r} is not one of block, mlp")
        if self.optimise_through == "weights" and len(self.layers) > 1:
            raise HyperParameterError(
                f"optimise_through: weights with layers={self.layers}: what an update of several layers does"
                " depends on the values in another way for each layer; name one layer"
            )
        if self.mom2_factor and self.optimise_through != "weights":
            raise HyperParameterError(
                f"mom2_factor={self.mom2_factor} needs optimise_through: weights: as an activation a value"
                " changes no other text"
            )
        self.check_numbers(mom2_update_weight=0, mom2_factor=0)
        self.check_numbers(batch_size=1, whole=True)


@dataclass(frozen=True)
class System:
    """What a closed form works with in one layer.

    Attributes:
        keys: columns, each scaled by the square root of its weight.
        residual: what is to be added to the output for each, scaled alike.
        moments: of the layer's keys.
        figures: what the closed form has to say of the system: `denominator`, the smallest over the largest
            pivot.
    """

    site: Site
    keys: Float[Tensor, "inner columns"]
    residual: Float[Tensor, "width columns"]
    moments: SecondMoments
    figures: dict[str, float] = field(default_factory=dict)


Finish = Callable[[list[Site], list[Fact]], None]
ClosedForm = Callable[[System], tuple[Float[Tensor, "width columns"], Float[Tensor, "columns inner"]]]


def edit_batch(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: BatchHyperParams,
    closed_form: ClosedForm,
    values: Sequence[Optimised] | None = None,
    finish: Finish | None = None,
) -> Edit:
    """Make (not apply) one edit of all requests.

    Args:
        closed_form: the factors (left, right) of one layer's update.
        values: of the requests, where they have been optimised already.
        finish: called with all layers changed, before they are put back.

    Raises:
        RequestError: for a request that cannot be carried out, or two that are the same or contradict each
            other.
        StatisticsError: if the statistics are missing, too few or those of another model.
        OptimisationError: if the optimisation or a closed form breaks down.
    """
    check_requests(requests)
    check_modules(adapter, hparams)
    facts = [tokenise(adapter, request, hparams) for request in requests]
    sites = [
        settled(adapter, adapter.site(layer, hparams.rewrite_module_tmp), facts) for layer in hparams.layers
    ]
    last = sites[-1]
    moments = statistics(adapter, sites, hparams)
    before = outputs(adapter, last, facts, hparams)
    outcomes = values or _made_together(adapter, last, facts, moments[-1], hparams, closed_form)
    target = before + torch.stack([o.delta for o in outcomes]).to(before.device)
    changes: list[LowRank] = []
    figures = {}
    lower = _kept_between(sites, facts, hparams)

    def spread() -> None:
        """Change layer after layer."""
        for i, site in enumerate(sites):
            now = before if i == 0 else outputs(adapter, last, facts, hparams)
            residual = (target - now).double() / (len(sites) - i)
            system = System(
                site, *weighted_columns(adapter, site, facts, residual, hparams, lower), moments[i]
            )
            left, right = closed_form(system)
            made = low_rank(adapter, site, left.float(), right.float())
            changes.extend(made)
            figures[str(site.layer)] = {
                "residual": float((target - now).norm(dim=1).mean()),
                **moments[i].cheap_figures(hparams.mom2_eps), **system.figures
            }  # fmt: skip
            write(adapter, Edit(made))
        if lower is not None:
            lower.clear()
        if finish is not None:
            finish(sites, facts)

    keeping(adapter, [name for site in sites for name in site.weights], spread)
    return Edit(changes, card(requests, facts, hparams, outcomes, {"layers": figures}))


def _kept_between(sites: Sequence[Site], facts: Sequence[Fact], hparams: BatchHyperParams) -> Lower | None:
    """Where hidden states are kept from layer to layer, if they are no more than the value optimisation has
    kept; otherwise None: they are read anew in each, so that memory is bounded.
    """
    few = len(facts) <= hparams.facts_per_batch
    return {} if len(sites) > 1 and few and hparams.key_states == "full_mask" else None


def _made_together(
    adapter: Adapter,
    site: Site,
    facts: list[Fact],
    moments: SecondMoments,
    hparams: BatchHyperParams,
    closed_form: ClosedForm,
) -> Sequence[Optimised]:
    """The values of one batch; jointly, where they are optimised through the one update that writes them."""
    if hparams.optimise_through != "weights":
        return values_of(adapter, site, facts, hparams)
    rights = _rights(adapter, site, facts, moments, hparams, closed_form)
    price = _price(rights, moments, hparams)
    return values_of(adapter, site, facts, hparams, rights, together=True, price=price)


def weighted_columns(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    residual: Float[Tensor, "facts width"],
    hparams: BatchHyperParams,
    lower: Lower | None = None,
) -> tuple[Float[Tensor, "inner columns"], Float[Tensor, "width columns"]]:
    """Keys and residuals of some facts as `System` has them.

    Args:
        residual: what is to be added to the output for each fact.
        lower: see `easyedit_mdm.editing.solve.keys.read_site`.
    """
    columns = key_columns(adapter, site, facts, hparams, lower)
    share = residual.T
    scale = columns.weights.double().sqrt().to(share.device)
    return columns.keys * scale.to(columns.keys.device), share[:, columns.fact.to(share.device)] * scale


def remembered(
    adapter: Adapter, hparams: BatchHyperParams, history: History | None
) -> tuple[dict[str, Tensor], Finish]:
    """Keys of the edits that the model carries, as columns, by site; and what adds a new edit's to the
    history.

    Args:
        history: it belongs to whoever edits in sequence; None: there is no sequence.

    Raises:
        HyperParameterError: for layers whose experts would be others for every fact.
    """
    history = History() if history is None else history
    sites = [adapter.site(layer, hparams.rewrite_module_tmp) for layer in hparams.layers]
    if any(site.routed for site in sites):
        raise HyperParameterError(
            f"{hparams.alg_name} is to remember the keys of earlier edits, and those of experts are others"
            " for every fact: name the shared expert or a dense layer, or use MEMIT_MDM without keep_edits"
        )
    names = [site.weight for site in sites]

    def finish(sites: list[Site], facts: list[Fact]) -> None:
        """Remember this batch's keys, read with all layers changed."""
        history.add(adapter, names, {site.name: _scaled(adapter, site, facts, hparams) for site in sites})

    return history.carried(adapter, names), finish


def _scaled(
    adapter: Adapter, site: Site, facts: list[Fact], hparams: BatchHyperParams
) -> Float[Tensor, "inner columns"]:
    columns = key_columns(adapter, site, facts, hparams)
    return columns.keys * columns.weights.double().sqrt().to(columns.keys.device)


def _rights(
    adapter: Adapter,
    site: Site,
    facts: Sequence[Fact],
    moments: SecondMoments,
    hparams: BatchHyperParams,
    closed_form: ClosedForm,
) -> Float[Tensor, "facts inner"]:
    """The r_f of dW = sum_f delta_f r_f^T, the closed form of one layer, where values are optimised through
    it.

    The residual of a fact's columns is delta_f times the square roots of their weights; what stands on its
    right depends on keys and statistics alone.
    """
    columns = key_columns(adapter, site, facts, hparams)
    scale = columns.weights.double().sqrt().to(columns.keys.device)
    nothing = columns.keys.new_zeros(1, len(scale))
    _, right = closed_form(System(site, columns.keys * scale, nothing, moments))
    rights = right.new_zeros(len(facts), right.shape[1])
    return rights.index_add(0, columns.fact.to(right.device), right * scale.to(right)[:, None]).float()


def _price(
    rights: Float[Tensor, "facts inner"], moments: SecondMoments, hparams: BatchHyperParams
) -> Float[Tensor, "facts facts"] | None:
    """r_f^T C r_g, weighted: E ||dW k||^2 is the sum over f and g of (r_f^T C r_g) (delta_f . delta_g)."""
    if not hparams.mom2_factor:
        return None
    double = rights.double().cpu()
    return (hparams.mom2_factor * double @ moments.moment @ double.T).to(rights)


def pivots(factor: Float[Tensor, "n n"]) -> float:
    """Smallest over largest pivot of a Cholesky factor: how near the closed form came to dividing by
    nothing.
    """
    diagonal = factor.diagonal() ** 2
    return float(diagonal.min() / diagonal.max())


def block_values(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: BatchHyperParams,
    closed_form: ClosedForm,
) -> list[Optimised]:
    """The optimised values of requests at the last edited layer, each as if it were alone."""
    facts = [tokenise(adapter, request, hparams) for request in requests]
    site = settled(adapter, check_modules(adapter, hparams), facts)
    if hparams.optimise_through != "weights":
        return values_of(adapter, site, facts, hparams)
    moments = statistics(adapter, [site], hparams)[0]
    rights = [_rights(adapter, site, [fact], moments, hparams, closed_form) for fact in facts]
    prices = [_price(right, moments, hparams) for right in rights]
    price = torch.block_diag(*(p for p in prices if p is not None)) if hparams.mom2_factor else None
    return values_of(adapter, site, facts, hparams, torch.cat(rights), price=price)


def values_of(
    adapter: Adapter,
    site: Site,
    facts: list[Fact],
    hparams: BatchHyperParams,
    rights: Float[Tensor, "facts inner"] | None = None,
    together: bool = False,
    price: Float[Tensor, "facts facts"] | None = None,
) -> list[Optimised]:
    """The values of facts at a layer, by `easyedit_mdm.editing.solve.value.optimise`."""
    return optimise(
        adapter,
        site,
        facts,
        outputs(adapter, site, facts, hparams, block=hparams.clamp_reference == "block"),
        hparams,
        rights,
        together,
        price,
    )


def outputs(
    adapter: Adapter, site: Site, facts: Sequence[Fact], hparams: ROMEMDMHyperParams, block: bool = True
) -> Float[Tensor, "facts width"]:
    """The block's (or the site's) output at the subject's token of each bare prompt, with no slot
    revealed.
    """
    rows = SiteRows.of(
        (fact.contexts[0], key_states(adapter, fact, hparams, hparams.key_states)[0].tails[0])
        for fact in facts
    )
    name = adapter.spec.paths.block.format(site.layer) if block else None
    return read_site(adapter, site, rows, hparams.max_rows, name)[1]
