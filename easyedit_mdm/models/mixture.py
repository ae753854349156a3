"""Mixtures of experts, by our own few lines: transformers keeps experts apart in one version and in one
tensor in the next.

What a mixture makes of a token is

    sum over its experts e of w_e D_e a_e  (+ the shared expert's),    a_e = act(G_e x) * U_e x,

with w from the router. Side by side, the D of some experts are one matrix, and the weighted a of these
experts one key: the output is linear in it, so that an edit of the experts that a token is routed to is an
edit of one linear map (`View`). What the router does with the token does not depend on that map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Experts:
    """A family's mixtures.

    Attributes:
        layers: the layers that have one; the others are dense.
        count, top: experts of a layer, and of them those that a token goes through.
        inner: width of an expert's activation.
        shared: width of the expert that every token goes through, 0 for none.
        score: `softmax` over all experts, or `sigmoid` of each.
        normalise: the weights of a token's experts are made to sum to 1.
        scale: a factor of the weights.
        bias: scores have an offset that only chooses.
        groups, top_groups: experts are chosen from this many of the groups, those whose two best scores sum
            highest.
    """

    layers: frozenset[int]
    count: int
    top: int
    inner: int
    shared: int = 0
    score: str = "softmax"
    normalise: bool = False
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    top_groups: int = 1


class Expert(nn.Module):
    """A gated MLP, under the names of Llama's."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def activation(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... inner"]:
        """What enters the down-projection."""
        return functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)

    def forward(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """The whole of it."""
        return self.down_proj(self.activation(hidden))


class Router(nn.Module):
    """Chooses a token's experts and weighs them, in float32."""

    def __init__(self, width: int, experts: Experts):
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts.count, width))
        self.expert_bias = (
            nn.Parameter(torch.empty(experts.count), requires_grad=False) if experts.bias else None
        )

    def forward(
        self, hidden: Float[Tensor, "tokens width"]
    ) -> tuple[Float[Tensor, "tokens top"], Int[Tensor, "tokens top"]]:
        """Weights and numbers of each token's experts."""
        settings = self.experts
        logits = functional.linear(hidden.float(), self.weight.float())
        scores = logits.softmax(-1) if settings.score == "softmax" else logits.sigmoid()
        ranked = scores if self.expert_bias is None else scores + self.expert_bias.float()
        chosen = self._in_groups(ranked).topk(settings.top, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if settings.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * settings.scale, chosen

    def _in_groups(self, ranked: Float[Tensor, "tokens count"]) -> Float[Tensor, "tokens count"]:
        """The scores, those outside of the best groups below all others."""
        settings = self.experts
        if settings.groups <= 1:
            return ranked
        grouped = ranked.unflatten(-1, (settings.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(settings.top_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


class View(nn.Module):
    """Some experts' down-projections as one linear map.

    It runs only while a hook listens: its first argument is then the key, its output the whole of the
    mixture's routed part.
    """

    def __init__(self, experts: Iterable[nn.Module], numbers: Sequence[int]):
        super().__init__()
        every = [cast(Expert, expert) for expert in experts]
        self.numbers = tuple(numbers)
        self._experts = tuple(
            every[n] for n in numbers
        )  # in a tuple they are not registered: they have names of their own

    @property
    def weight(self) -> Float[Tensor, "width inner"]:
        """The down-projections side by side."""
        return torch.cat([expert.down_proj.weight for expert in self._experts], dim=1)

    def forward(
        self, keys: Float[Tensor, "... inner"], rest: Float[Tensor, "... width"]
    ) -> Float[Tensor, "... width"]:
        """What the map makes of the keys, added to what the other experts make."""
        return rest + functional.linear(keys, self.weight)


class Mixture(nn.Module):
    """A router, its experts, and perhaps one that is shared, under the names that most families give them."""

    def __init__(self, width: int, experts: Experts):
        super().__init__()
        self.gate = Router(width, experts)
        self.experts = nn.ModuleList(Expert(width, experts.inner) for _ in range(experts.count))
        self.shared_experts = Expert(width, experts.shared) if experts.shared else None
        self.views = nn.ModuleDict()

    def view(self, numbers: Sequence[int]) -> str:
        """The name, below the mixture, of the map of some experts."""
        name = "-".join(map(str, numbers))
        if len(name) > 60:  # it goes into names of files
            name = f"{len(numbers)}-experts-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        if name not in self.views:
            self.views[name] = View(self.experts, numbers)
        return f"views.{name}"

    def forward(self, hidden: Float[Tensor, "rows length width"]) -> Float[Tensor, "rows length width"]:
        """The sum over each token's experts."""
        flat = hidden.flatten(0, -2)
        weights, chosen = self.gate(flat)
        weights = weights.to(flat.dtype)
        heard = next((cast(View, view) for view in self.views.values() if view._forward_hooks), None)
        watched = () if heard is None else heard.numbers
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            if number not in watched:
                token, place = (chosen == number).nonzero(as_tuple=True)
                made = self.experts[number](flat[token]) * weights[token, place, None]
                out = out.index_add(0, token, made)
        out = out.view_as(hidden)
        if heard is not None:
            keys = torch.cat([self._key(number, flat, weights, chosen) for number in watched], dim=-1)
            out = heard(keys.view(*hidden.shape[:-1], -1), out)
        return out if self.shared_experts is None else out + self.shared_experts(hidden)

    def _key(
        self,
        number: int,
        flat: Float[Tensor, "tokens width"],
        weights: Float[Tensor, "tokens top"],
        chosen: Int[Tensor, "tokens top"],
    ) -> Float[Tensor, "tokens inner"]:
        """The weighted activations of one expert, 0 for tokens that do not go through it."""
        token, place = (chosen == number).nonzero(as_tuple=True)
        expert = cast(Expert, self.experts[number])
        made = expert.activation(flat[token]) * weights[token, place, None]
        return flat.new_zeros(len(flat), made.shape[-1]).index_add(0, token, made)


def put_in(model: nn.Module, path: str, width: int, experts: Experts) -> None:
    """Replace the MLP of every layer that has a mixture.

    Args:
        path: of a layer's MLP, `{}` standing for its number.
    """
    for layer in sorted(experts.layers):
        parent, name = path.format(layer).rsplit(".", 1)
        setattr(model.get_submodule(parent), name, Mixture(width, experts))
