"""From facts to the rows of one forward pass: contexts x states, padded, with what is read where and how it weighs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from easyedit_mdm.denoising import States
from easyedit_mdm.editing.request import Prompt
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.geometry import right_padded


@dataclass(frozen=True)
class Fact:
    """A request, tokenised.

    Attributes:
        contexts: the prompt in each context prefix; the first is bare.
        target: the target's tokens.
        anchor: the KL anchor.
    """

    contexts: list[Prompt]
    target: Int[Tensor, " slots"]
    anchor: Prompt


@dataclass
class Rows:
    """Rows of one forward pass. Slots beyond a row's target weigh nothing.

    Attributes:
        ids, mask: the padded rows.
        site: where delta is added, for each row.
        at: positions that are read.
        tokens: the right token at each of them.
        weights: weight of each in its fact's loss; the weights of a fact sum to 1.
        fact: which fact a row belongs to.
        anchor: whether the row is its fact's KL anchor (read at its first slot).
    """

    ids: Int[Tensor, "rows length"]
    mask: Int[Tensor, "rows length"]
    site: Int[Tensor, " rows"]
    at: Int[Tensor, "rows slots"]
    tokens: Int[Tensor, "rows slots"]
    weights: Float[Tensor, "rows slots"]
    fact: Int[Tensor, " rows"]
    anchor: Bool[Tensor, " rows"]

    def __len__(self) -> int:
        return self.ids.shape[0]

    def take(self, index: Int[Tensor, " some"] | Bool[Tensor, " rows"]) -> "Rows":
        """Some of the rows."""
        return Rows(**{name: value[index] for name, value in vars(self).items()})


def build_rows(adapter: Adapter, facts: dict[int, Fact], states: dict[int, States], kl_position: str) -> Rows:
    """Rows for some facts (by number), each in its states: contexts x states, and one anchor row a fact."""
    ids, site, at, tokens, weights, number, is_anchor = [], [], [], [], [], [], []
    slots = max(len(f.target) for f in facts.values())

    def add(fact: int, prompt: Prompt, tail: Tensor, read: list[int], right: Tensor, weight: Tensor, anchor: bool) -> None:
        """One row; slots it does not have are read at its first and weigh nothing."""
        ids.append(torch.cat([prompt.ids, tail]))
        site.append(prompt.site)
        fill = slots - len(read)
        at.append(read + [read[0]] * fill)
        tokens.append(torch.nn.functional.pad(right, (0, fill)))
        weights.append(torch.nn.functional.pad(weight, (0, fill)))
        number.append(fact)
        is_anchor.append(anchor)

    for i, fact in facts.items():
        n = len(fact.target)
        for revealed, scored, weight in zip(states[i].revealed, states[i].scored, states[i].weights):
            tail = torch.where(revealed, fact.target, adapter.ids.mask) if adapter.masked else fact.target
            share = scored.float() * (weight / scored.sum() / len(fact.contexts))
            for prompt in fact.contexts:
                start = len(prompt.ids)
                add(i, prompt, tail, list(range(start, start + n)), fact.target, share, False)
        filler = torch.tensor([adapter.ids.slot])
        read = len(fact.anchor.ids) if kl_position == "slot" else fact.anchor.site + 1
        add(i, fact.anchor, filler, [read], filler, torch.zeros(1), True)
    batch, mask = right_padded(ids, adapter.ids.pad, adapter.device)
    tensors = (torch.tensor(site), torch.tensor(at), torch.stack(tokens), torch.stack(weights), torch.tensor(number), torch.tensor(is_anchor))
    return Rows(batch, mask, *(t.to(adapter.device) for t in tensors))
