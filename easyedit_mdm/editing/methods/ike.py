"""In-context editing for both paradigms (Zheng et al., arXiv 2305.12740): the new fact stands before every
prompt, after some demonstrations. No weight changes, and nothing is optimised: the cheapest baseline.

    New Fact: {prompt} {target}\\nPrompt: ...

The text is EasyEdit's IKE's. The demonstrations are those that the hyperparameters name, in their order; or
the `k` nearest of a pool, by sentence embeddings, as in EasyEdit (`editing.demonstrations`); or none. What
the edit costs is `context_tokens` in its card: so many tokens more in every row that the model reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from easyedit_mdm.editing.demonstrations import nearest, said
from easyedit_mdm.editing.edit import Edit
from easyedit_mdm.editing.edit.attached import Context
from easyedit_mdm.editing.facts import Fact
from easyedit_mdm.editing.hparams import MethodHyperParams
from easyedit_mdm.editing.methods._registry import METHODS, Method
from easyedit_mdm.editing.request import EditRequest, check_requests, encode, locate, target_ids
from easyedit_mdm.editing.solve.card import Outcome, card
from easyedit_mdm.errors import HyperParameterError, ModelError
from easyedit_mdm.models import Adapter

_FIELDS = ("{prompt}", "{target}")


@dataclass
class IKEMDMHyperParams(MethodHyperParams):
    """IKE_MDM's hyperparameters.

    Attributes:
        layers: none: nothing is edited in any.
        fact: how the new fact is said, with `{prompt}` and `{target}`.
        lead: what stands between the last fact and the prompt.
        demonstrations: facts with `prompt` and `target_new` that stand before, each said by `demonstration`.
        demonstration: how each of them is said.
        demonstration_pool: a file of facts to choose demonstrations from (`demonstrations.pool_texts`).
        sentence_model_name: the model of sentence-transformers that chooses: a folder, or a name on the Hub.
        k: how many texts of the pool are shown at most.
        batch_size: requests a batch, for EasyEdit's `batch_edit`.
    """

    layers: list[int] = field(default_factory=list)
    fact: str = "New Fact: {prompt} {target}\n"
    lead: str = "Prompt: "
    demonstrations: list[dict[str, str]] = field(default_factory=list)
    demonstration: str = "New Fact: {prompt} {target}\nPrompt: {prompt} {target}\n\n"
    demonstration_pool: str | None = None
    sentence_model_name: str | None = None
    k: int = 16
    batch_size: int = 1

    ALG_NAME: ClassVar[str] = "IKE_MDM"
    LAYERS: ClassVar[str] = "any"

    def validate(self) -> None:
        """As `MethodHyperParams.validate`."""
        super().validate()
        self.check_numbers(batch_size=1, k=1, whole=True)
        if self.layers:
            raise HyperParameterError(f"layers={self.layers!r}: IKE_MDM edits no layer; leave it out")
        for name in ("fact", "demonstration"):
            text = getattr(self, name)
            if not all(part in text for part in _FIELDS):
                raise HyperParameterError(f"{name}={text!r} must hold {' and '.join(_FIELDS)}")
        for one in self.demonstrations:
            if not all(isinstance(one.get(key), str) for key in ("prompt", "target_new")):
                raise HyperParameterError(
                    f"demonstrations: {one!r} needs a prompt and a target_new that are text"
                )

        if (self.demonstration_pool is None) != (self.sentence_model_name is None):
            raise HyperParameterError(
                f"demonstration_pool={self.demonstration_pool!r} and sentence_model_name="
                f"{self.sentence_model_name!r} go together: give both, or neither"
            )
        if self.demonstration_pool and self.demonstration != type(self).demonstration:
            raise HyperParameterError(
                "demonstration and demonstration_pool are both given: a pool's texts are said by fact and"
                " lead"
            )
        if self.demonstrations and self.demonstration_pool:
            raise HyperParameterError(
                "demonstrations and demonstration_pool are both given: name the demonstrations, or let them"
                " be chosen"
            )

    def advice(self, loss: float) -> str:
        """As `MethodHyperParams.advice`."""
        return "Try demonstrations, or another wording (fact, lead)"


def ike(adapter: Adapter, requests: Sequence[EditRequest], hparams: IKEMDMHyperParams) -> Edit:
    """Make (not apply) one edit of all requests: their facts, one after the other.

    Raises:
        RequestError: for a request that cannot be carried out.
        ModelError: for a model whose canvas is read apart from its prompt.
        HyperParameterError: for a pool or a sentence model that cannot be read.
        MissingPackageError: if a pool is given and sentence-transformers is not installed.
    """
    check_requests(requests)
    if adapter.spec.noised:
        raise ModelError(
            f"IKE_MDM is not offered for {adapter.name or adapter.spec.name}: it reads its canvas apart"
        )
    shown = "".join(_demonstrations(adapter, requests, hparams))
    before, lead = _ids(adapter, shown), _ids(adapter, hparams.lead)
    facts, parts = [], []
    for request in requests:
        target = target_ids(adapter, request.prompt, request.target_new)
        prompt = locate(adapter, request)
        facts.append(Fact([prompt], target, prompt))
        text = said(hparams.fact, _stripped(_fact(request)))
        parts.append(Context("", {"demonstrations": before, "fact": _ids(adapter, text), "lead": lead}))
    tokens = len(before) + len(lead) + sum(len(part.tensors["fact"]) for part in parts)
    outcomes = [Outcome() for _ in requests]
    return Edit([], card(requests, facts, hparams, outcomes, {"context_tokens": tokens}), parts)


def _demonstrations(
    adapter: Adapter, requests: Sequence[EditRequest], hparams: IKEMDMHyperParams
) -> list[str]:
    """What is shown before the new facts. Of several facts, each text counts by the fact nearest to it."""
    if hparams.demonstration_pool is None:
        return [said(hparams.demonstration, _stripped(one)) for one in hparams.demonstrations]
    queries = [f"{said(hparams.fact, _fact(r))}{hparams.lead}{r.prompt}\n\n" for r in requests]
    return nearest(
        queries,
        hparams.demonstration_pool,
        str(hparams.sentence_model_name),
        hparams.k,
        hparams.fact,
        hparams.lead,
        str(adapter.device),
    )


def _fact(request: EditRequest) -> dict[str, str]:
    return {"prompt": request.prompt, "target_new": request.target_new}


def _stripped(fact: Mapping[str, str]) -> dict[str, str]:
    return {key: fact[key].strip() for key in ("prompt", "target_new")}


def _ids(adapter: Adapter, text: str) -> Int[Tensor, " tokens"]:
    """A text's tokens; the rows behind it have what the tokenizer puts in front of a text."""
    encode(adapter, "")  # an error where there is no tokenizer
    ids = adapter.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return torch.tensor(ids, dtype=torch.long)


# for EasyEdit's IKE its runners prepare embeddings of their own training set, which have no part here
METHODS.register("IKE_MDM")(Method("IKE_MDM", IKEMDMHyperParams, ike, stands_for="ROME", batchable=True))
