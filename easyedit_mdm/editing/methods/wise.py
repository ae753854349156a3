"""WISE for both paradigms (Wang et al., arXiv 2405.14768): a side memory at one layer, no weight changes.

An edit is a knowledge shard: a change of the MLP's down-projection in a random part of its entries, trained
to say the targets (`easyedit_mdm.editing.solve.side`). Beside the model's own weight it answers only where it
was trained to: where what it adds is larger than a threshold
(`easyedit_mdm.editing.edit.side_memory.SideMemory`). Shards of several edits are merged by TIES, or kept
apart and retrieved.

The paper, and EasyEdit, decide for a whole prompt at once, by the mean over its tokens. Here each token
decides for itself: a mean would change with the length of the canvas, with padding, and with what a pass
leaves out since it is known already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.edit.side_memory import SideMemory
from easyedit_mdm.editing.facts import tokenise
from easyedit_mdm.editing.hparams import FACT_TOKENS
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest, check_requests
from easyedit_mdm.editing.solve.card import card
from easyedit_mdm.editing.solve.side import SideHyperParams, train_side
from easyedit_mdm.editing.solve.sites import one_map
from easyedit_mdm.errors import HyperParameterError, OptimisationError
from easyedit_mdm.models import Adapter


@dataclass
class WISEMDMHyperParams(SideHyperParams):
    """WISE_MDM's hyperparameters; EasyEdit's WISE has the first four under the same names.

    Attributes:
        act_ratio: the threshold, as a share of the smallest activation at a fact's token after training.
        merge_alg: how shards become one; `ties` is offered.
        densities: the share of a shard's entries that merging keeps.
        retrieve: keep the shards apart, and let the one with the largest activation answer.
        batch_size: requests a batch, for EasyEdit's `batch_edit`; a batch is one shard.
        fact_token: the token that the memory is to answer at (`subject_last`, or another of ROME's).
        context_template_length_params: as in EasyEdit, [[5, 5], [10, 5]].
        rewrite_module_tmp: the linear map, by default the MLP's down-projection.
    """

    act_ratio: float = 0.88
    merge_alg: str = "ties"
    densities: float = 0.53
    retrieve: bool = False
    batch_size: int = 1
    fact_token: str = "subject_last"
    context_template_length_params: list[list[int]] = field(default_factory=lambda: [[5, 5], [10, 5]])
    rewrite_module_tmp: str | None = None

    ALG_NAME: ClassVar[str] = "WISE_MDM"

    def validate(self) -> None:
        """As `StateHyperParams.validate`.

        Raises:
            HyperParameterError: naming field and value.
        """
        super().validate()
        self.check_numbers(n_iter=1, batch_size=1, whole=True)
        self.check_numbers(edit_lr=0, act_ratio=0)
        if self.act_ratio >= 1:
            raise HyperParameterError(
                f"act_ratio={self.act_ratio} must lie below 1: the memory would not answer at its own facts"
            )
        self.check_choices(merge_alg=("ties",), side_output=("fact", "everywhere"), fact_token=FACT_TOKENS)
        for name in ("mask_ratio", "densities"):
            if not 0 < getattr(self, name) <= 1:
                raise HyperParameterError(f"{name}={getattr(self, name)} must lie above 0, and at most at 1")
        if len(self.act_margin) != 3 or min(self.act_margin) < 0:
            raise HyperParameterError(
                f"act_margin={self.act_margin} must be three numbers, alpha, beta and gamma, none below 0"
            )
        most = self.norm_constraint
        if most is True or (most is not None and most is not False and not float(most) > 0):
            raise HyperParameterError(f"norm_constraint={most} must be a number above 0, or null for none")

    def advice(self, loss: float) -> str:
        """As `MethodHyperParams.advice`."""
        return (
            f"Try more steps (n_iter: {2 * self.n_iter}), another edit_lr than {self.edit_lr:g}, smaller"
            " margins (act_margin) or another layer"
        )


def wise(adapter: Adapter, requests: Sequence[EditRequest], hparams: WISEMDMHyperParams) -> Edit:
    """Make (not apply) one edit of all requests: one shard, trained on all of them.

    Raises:
        RequestError: for a request that cannot be carried out.
        HyperParameterError: at the experts of a mixture.
        OptimisationError: if the training breaks down, or leaves nothing that could answer.
    """
    check_requests(requests)
    site = one_map(adapter, hparams)
    facts = [tokenise(adapter, request, hparams) for request in requests]
    delta, least, outcomes = train_side(adapter, site, facts, hparams)
    if not least > 0:
        raise OptimisationError(
            f"after {outcomes[0].steps} steps the memory at layer {site.layer} adds nothing at a fact's token"
            f" (edit_lr={hparams.edit_lr}): it could never answer. Raise edit_lr, n_iter or mask_ratio"
        )
    settings = {
        "threshold": hparams.act_ratio * least,
        "density": float(hparams.densities),
        "merge": "retrieve" if hparams.retrieve else hparams.merge_alg,
    }
    return Edit(
        [], card(requests, facts, hparams, outcomes, {}), [SideMemory(site.name, {"delta": delta}, settings)]
    )


METHODS.register("WISE_MDM")(Method("WISE_MDM", WISEMDMHyperParams, wise, stands_for="WISE", batchable=True))
