"""The adapter: one face for autoregressive and masked diffusion language models.

Above it nobody knows of logit shifts, attention masks or families. It *is* an `nn.Module` that owns the
native model's children under their own names, so `model.layers.3.mlp.down_proj.weight` means the same thing
here and there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.errors import ModelError
from easyedit_mdm.models import geometry
from easyedit_mdm.models.attention import Attention
from easyedit_mdm.models.context import behind_context, context_of
from easyedit_mdm.models.families import FAMILIES
from easyedit_mdm.models.hidden import Hidden
from easyedit_mdm.models.hooks import changing_output, frozen, reading_all, reading_output
from easyedit_mdm.models.mixture import Mixture
from easyedit_mdm.models.native import Stack, check_attention, class_names, put_last
from easyedit_mdm.models.recognise import family_of
from easyedit_mdm.models.spec import FamilySpec

Mask = Int[Tensor, "rows length"] | Bool[Tensor, "rows length"]


@dataclass(frozen=True)
class Ids:
    """The special token ids of a loaded model; `mask` is None for models without masks."""

    mask: int | None
    eos: int | None
    pad: int


@dataclass(frozen=True)
class Site:
    """Where a fact is read and written: a linear map inside the MLP.

    Attributes:
        layer: the layer's number.
        name: dotted path of the module; its input is the key, its output the value.
        weight: dotted path of its weight.
        transposed: the weight is stored inputs x outputs (GPT-2's Conv1D) instead of outputs x inputs.
        parts: the linear maps whose weights, side by side, are the site's; empty where it is one map with a
            weight of its own.
        routed: the parts are all experts of a mixture, and which of them a fact goes through is still to be
            found (`Adapter.through`): the module itself is no linear map.
    """

    layer: int
    name: str
    transposed: bool
    parts: tuple[str, ...] = ()
    routed: bool = False

    @property
    def weight(self) -> str:
        """Name of the weight as a parameter."""
        return f"{self.name}.weight"

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of all parameters that an edit at the site may change."""
        return tuple(f"{part}.weight" for part in self.parts) or (self.weight,)


class Adapter(nn.Module):
    """A language model as an editor sees it.

    Args:
        native: a transformers model with a language-model head.
        spec: its family.
        ids: its special tokens.
        tokenizer: its tokenizer, or None.
        name: what to call it in records.
        attention, shift: who sees whom, and whether logits predict the next token; by default what the family
            and the native model's configuration say.

    Attributes:
        attention, shift: as given.
    """

    def __init__(
        self,
        native: nn.Module,
        spec: FamilySpec,
        ids: Ids,
        tokenizer: Any = None,
        name: str = "",
        attention: Attention | None = None,
        shift: bool | None = None,
    ):
        super().__init__()
        if spec.paths.shares:
            put_last(native, spec.paths.shares)
        for child_name, child in native.named_children():
            self.add_module(child_name, child)
        # kept out of the module tree (a tuple is not registered): the children must not be counted twice
        self._native = (native,)
        self.spec, self.ids, self.tokenizer, self.name = spec, ids, tokenizer, name
        self.config: Any = text_config(native.config)
        settings = vars(self.config) if native.config else {}
        self.attention = spec.attention_of(settings) if attention is None else attention
        self.shift = spec.shift_of(settings) if shift is None else shift
        self.denoise: Callable[..., Tensor] | None = None
        self.source: Path | None = None  # the folder that it was loaded from
        self._ending: dict[str, bool] = {}
        check_attention(native)
        self._check_paths()
        self.train(native.training)

    # ---- what it is ----------------------------------------------------------------------------------------
    @property
    def native(self) -> Any:
        """The transformers model underneath, sharing all its weights with the adapter."""
        return self._native[0]

    @property
    def masked(self) -> bool:
        """Whether what a hidden slot shows is a mask."""
        return self.spec.masked

    @property
    def denoises(self) -> bool:
        """Whether it writes by denoising, so that slots can be hidden in any order; an autoregressive model's
        slots each see those on their left.
        """
        return self.spec.denoises

    @property
    def hidden(self) -> Hidden:
        """What a slot shows that is still to be written."""
        if self.spec.noised:
            return Hidden(None, self.weight_of(self.spec.paths.embedding).shape[0])
        return Hidden(self.ids.pad if self.ids.mask is None else self.ids.mask)

    def behind(
        self, target: Int[Tensor, " slots"], shown: Bool[Tensor, " slots"], draw: int = 0
    ) -> Int[Tensor, " columns"]:
        """What stands behind a prompt while a target is predicted.

        Args:
            shown: which slots show their token; an autoregressive model's all do, but for the last, which
                nothing is predicted from.
            draw: number of the draw of noise (`Hidden.slots`).
        """
        return self.hidden.around(target, shown, draw) if self.denoises else target[:-1]

    def blocks(self, prompt: int, slots: int) -> tuple[int, ...]:
        """Sizes of the parts of a target that are predicted one after the other, after a prompt of so many
        tokens; one row of an autoregressive model predicts all slots.
        """
        return self.attention.blocks(self.before + prompt, slots) if self.denoises else (slots,)

    @property
    def before(self) -> int:
        """How many tokens an in-context edit puts before every row; blocks may be counted from the first."""
        context = context_of(self.native)
        return 0 if context is None else len(context)

    @property
    def stack(self) -> Stack:
        """Its layers, to be run in parts."""
        return Stack(self.module, self.spec, self.config)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding, or the one that accelerate brings it to."""
        weight = self.weight_of(self.spec.paths.embedding)
        if weight.is_meta:
            hook = getattr(self.module(self.spec.paths.embedding), "_hf_hook", None)
            return torch.device(getattr(hook, "execution_device", None) or "meta")
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's dtype."""
        return self.weight_of(self.spec.paths.embedding).dtype

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._blocks())

    @property
    def max_positions(self) -> int:
        """Longest row, in tokens, that the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", None) or self.config.n_positions)

    @property
    def vocabulary(self) -> int:
        """Ids below this one stand for a token; larger heads are padding (Dream's ids above its tokenizer's
        last).
        """
        head = self.weight_of(self.spec.paths.head).shape[0]
        return head if self.tokenizer is None else min(head, len(self.tokenizer))

    def weight_of(self, path: str) -> Tensor:
        """The weight of the submodule at a dotted path.

        Raises:
            ModelError: if there is no such submodule.
        """
        return cast(Tensor, self.module(path).weight)

    def module(self, path: str) -> nn.Module:
        """The submodule at a dotted path.

        Raises:
            ModelError: if there is none, naming the nearest path that exists.
        """
        try:
            return self.get_submodule(path)
        except AttributeError:
            names = [name for name, _ in self.named_modules()]
            raise ModelError(
                f"{self.name or self.spec.name} has no module {path!r}{did_you_mean(path, names)} "
                f"Check the module templates in the hyperparameters against the family {self.spec.name!r}."
            ) from None

    def site(self, layer: int, template: str | None = None) -> Site:
        """The edit site of a layer: the MLP's down-projection, or the module that `template` names.

        Of a mixture of experts it is the shared expert's, or, where there is none, the experts that a fact
        goes through; name the list of experts for these where there is both.

        Raises:
            ModelError: for a layer that does not exist, a wrong template, or a module without a 2-D weight.
        """
        if not 0 <= layer < self.layers:
            raise ModelError(
                f"layer {layer} does not exist: {self.name or self.spec.name} has layers 0 to"
                f" {self.layers - 1}"
            )
        name = (template or self._default_site(layer)).format(layer)
        module, experts = self.module(name), self._experts(layer)
        if experts is not None and module is self.module(experts):
            parts = tuple(
                f"{experts}.{number}.down_proj" for number in range(len(cast(nn.ModuleList, module)))
            )
            return Site(layer, name, transposed=False, parts=parts, routed=True)
        if experts is not None and name.startswith(f"{experts}."):
            raise ModelError(
                f"{name!r} is one expert of several that a token goes through: name {experts!r}, or another"
                " module"
            )
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ModelError(
                f"{name!r} has no matrix to edit; the rewrite module must be a linear map such as"
                f" {self.spec.paths.down!r}"
            )
        return Site(layer, name, transposed=type(module).__name__ == "Conv1D")

    def _mixture(self, layer: int) -> Mixture | None:
        mlp = self.module(self.spec.paths.mlp.format(layer))
        return mlp if isinstance(mlp, Mixture) else None

    def _experts(self, layer: int) -> str | None:
        """The path of a layer's list of experts, if it is a mixture."""
        return None if self._mixture(layer) is None else f"{self.spec.paths.mlp.format(layer)}.experts"

    def _default_site(self, layer: int) -> str:
        mixture = self._mixture(layer)
        if mixture is None:
            return self.spec.paths.down
        inner = "experts" if mixture.shared_experts is None else "shared_experts.down_proj"
        return f"{self.spec.paths.mlp}.{inner}"

    def through(self, site: Site, numbers: Sequence[int]) -> Site:
        """A routed site with the experts that a fact goes through: one linear map, their down-projections
        side by side.
        """
        mixture = self._mixture(site.layer)
        assert mixture is not None and site.routed, site
        parts = tuple(site.parts[number] for number in numbers)
        return Site(
            site.layer, f"{self.spec.paths.mlp.format(site.layer)}.{mixture.view(numbers)}", False, parts
        )

    @property
    def mixtures(self) -> list[int]:
        """The layers that are mixtures of experts whose routes can be told (`routes`)."""
        return [layer for layer in range(self.layers) if self._mixture(layer) is not None]

    @torch.no_grad()
    def routes(
        self,
        layer: int,
        input_ids: Int[Tensor, "rows length"],
        attention_mask: Mask | None = None,
        canvas: Int[Tensor, " rows"] | None = None,
    ) -> tuple[Float[Tensor, "rows length top"], Int[Tensor, "rows length top"]]:
        """Through which experts of a layer each token goes, and with which weights.

        Raises:
            ModelError: if the layer is no mixture of experts.
        """
        mixture = self._mixture(layer)
        if mixture is None:
            raise ModelError(f"layer {layer} of {self.name or self.spec.name} is no mixture of experts")
        with reading_all(mixture.gate) as seen:
            self.hidden_before(layer + 1, input_ids, attention_mask, canvas=canvas)
        weights, chosen = (part.unflatten(0, tuple(input_ids.shape)) for part in seen[0])
        return weights, chosen

    # ---- what it computes ----------------------------------------------------------------------------------
    def token_logits(
        self,
        input_ids: Int[Tensor, "rows length"],
        attention_mask: Mask | None = None,
        at: Int[Tensor, "rows slots"] | None = None,
        *,
        layer: int = 0,
        hidden: Float[Tensor, "rows length width"] | None = None,
        canvas: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows slots vocab"]:
        """Logits aligned with tokens: `[r, j]` predicts the token at position j of row r, for every family.

        Args:
            input_ids: token ids, padded on either side.
            attention_mask: 1 for tokens, 0 for padding; padding changes no result.
            at: positions whose logits are wanted (the head runs only there); all of them by default.
            layer: go on from this layer, given its input `hidden` as `hidden_before` returned it.
            hidden: the input of layer `layer`.
            canvas: the first column of each row's canvas, which only some kinds of `attention` ask for; by
                default that of its first mask, or the end of a row that has none.

        A token that a shifted model cannot predict (the first of a row) gets the logits of that row's first
        position, as Dream's own decoding does. What stands before the canvas is not predicted by a model
        whose hidden slots show noise: its logits there mean nothing.

        Raises:
            ModelError: without `canvas`, where noise does not show where it begins.
        """
        if canvas is None and self.spec.noised:
            raise ModelError(
                f"{self.name or self.spec.name} denoises random tokens, which do not show where the canvas"
                " begins: give canvas, the first column of each row's"
            )
        mask = geometry.visible(input_ids, attention_mask)
        if at is None:
            at = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape[0], -1)
        context = context_of(self.native)
        if context is not None:
            self._no_context(layer > 0)
            self._check_length(len(context), mask)
            input_ids, mask = behind_context(context, input_ids, mask)
            at, canvas = at + len(context), None if canvas is None else canvas + len(context)
        states = self._run(input_ids, mask, layer, self.layers, hidden, canvas)
        where = geometry.sources(at, mask) if self.shift else at
        normed = self.stack.normed(geometry.gather_rows(states, where))
        return self.stack.logits(normed).to(input_ids.device)

    def hidden_before(
        self,
        layer: int,
        input_ids: Int[Tensor, "rows length"],
        attention_mask: Mask | None = None,
        *,
        start: int = 0,
        hidden: Float[Tensor, "rows length width"] | None = None,
        canvas: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows length width"]:
        """The input of layer `layer` (the residual stream), for use as `hidden` in `token_logits`.

        Args:
            start: go on from this layer, given its input `hidden`.
            canvas: as in `token_logits`.

        Raises:
            ModelError: if an in-context edit is in the model, whose tokens would stand before the rows.
        """
        self._no_context(context_of(self.native) is not None)
        mask = geometry.visible(input_ids, attention_mask)
        return self._run(input_ids, mask, start, layer, hidden, canvas)

    def _no_context(self, wrong: bool) -> None:
        if wrong:
            raise ModelError(
                f"{self.name or self.spec.name} carries an in-context edit, whose tokens stand before every"
                " row: take it back before the model is run layer by layer (editing, tracing, statistics)"
            )

    def _check_length(self, context: int, mask: Tensor) -> None:
        longest = context + int(mask.sum(1).max())
        if longest > self.max_positions:
            raise ModelError(
                f"a row takes {longest} tokens with the {context} of the in-context edit before it;"
                f" {self.name or self.spec.name} has {self.max_positions} positions"
            )

    def ends_block(self, site: Site) -> bool:
        """Whether a site's output goes into the residual stream as it is, as the down-projection's does in
        every family here.

        Tried once a site: the gradient of the block's output is then the site's own, bit for bit; a norm
            after the MLP or a
        site inside the block changes it.
        """
        if site.parts:
            return False  # of a mixture: the experts' shares are put together behind the site
        if site.name not in self._ending:
            outputs: list[Tensor] = []

            def leaf(out: Tensor) -> Tensor:
                """The output, as what the gradient is asked for."""
                outputs.append(out.detach().requires_grad_())
                return outputs[-1]

            block = self.module(self.spec.paths.block.format(site.layer))
            with (
                frozen(self),
                changing_output(self.module(site.name), leaf),
                reading_output(block) as leaving,
            ):
                self.hidden_before(site.layer + 1, torch.zeros(1, 2, dtype=torch.long, device=self.device))
            gradient = torch.randn(leaving[0].shape, generator=torch.Generator().manual_seed(0)).to(
                leaving[0]
            )
            (arriving,) = torch.autograd.grad(leaving[0], outputs[0], gradient, allow_unused=True)
            self._ending[site.name] = arriving is not None and torch.equal(
                arriving.to(gradient.device), gradient
            )
        return self._ending[site.name]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        canvas: Int[Tensor, " rows"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the native model's forward, with this family's attention; `.logits` are raw, not aligned.
        `canvas`: as in `token_logits`. A model whose hidden slots show noise takes the native arguments
        (`decoder_input_ids` for the canvas).

        Raises:
            ModelError: if labels are passed to a model that denoises, whose loss is not the native class's,
                or `canvas` to one that takes `decoder_input_ids`.
        """
        if not self.denoises:
            return self.native(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        self._no_context(context_of(self.native) is not None)
        if kwargs.get("labels") is not None:
            raise ModelError(
                "a model that denoises has no next-token loss: use denoising states for a loss instead of"
                " labels="
            )
        if self.spec.noised:
            if canvas is not None or "decoder_input_ids" not in kwargs:
                raise ModelError(
                    f"{self.name or self.spec.name} reads its canvas apart: give input_ids and"
                    " decoder_input_ids, or use token_logits, which takes whole rows and canvas"
                )
            return self.native(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        mask = geometry.visible(input_ids, attention_mask)
        kwargs.setdefault("position_ids", geometry.positions(mask))
        if self.spec.bidirectional and self.attention.full:
            return self.native(input_ids=input_ids, attention_mask=mask, **kwargs)
        kwargs["use_cache"] = False
        return self.native(input_ids=input_ids, attention_mask=self.sight(mask, canvas, input_ids), **kwargs)

    def generate(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Continue each row, with transformers' signature: returns the prompt columns followed by the new
        tokens.

        Masked models take `max_new_tokens` (or `max_length`), `steps`, `block_length`, `order`,
        `temperature`, `do_sample`, `generator`, `eos_token_id` and `pad_token_id`; see
        `easyedit_mdm.denoising.generate`. Others pass everything on to transformers. A model that writes
        whole canvases (DiffusionGemma) writes the last to its end; what goes beyond `max_new_tokens` is cut
        off.

        Raises:
            ModelError: if a masked model was built without a decoder (load it with
                `easyedit_mdm.load_model`).
        """
        if not self.masked:
            return self._generate_natively(input_ids, attention_mask, **kwargs)
        if self.denoise is None:
            raise ModelError(
                "this adapter cannot write: load the model with easyedit_mdm.load_model, or set"
                " adapter.denoise"
            )
        return self.denoise(self, input_ids, attention_mask=attention_mask, **kwargs)

    def _generate_natively(self, ids: Tensor | None, mask: Tensor | None, **kwargs: Any) -> Any:
        if not self.spec.noised:
            return self.native.generate(input_ids=ids, attention_mask=mask, **kwargs)
        if ids is None:
            raise ModelError("give input_ids: this model writes after a prompt")
        more = {} if mask is None else {"attention_mask": mask}  # it takes no attention_mask=None
        made = self.native.generate(input_ids=ids, return_dict_in_generate=False, **more, **kwargs)
        most = kwargs.get("max_new_tokens")
        return made if most is None else made[:, : ids.shape[1] + most]

    # ---- how -----------------------------------------------------------------------------------------------
    def _blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.module(self.spec.paths.block.rsplit(".", 1)[0]))

    def _run(
        self, ids: Tensor, mask: Tensor, low: int, high: int, hidden: Tensor | None, canvas: Tensor | None
    ) -> Tensor:
        """The residual stream after layers low..high-1."""
        positions, stack = geometry.positions(mask), self.stack
        inside = None
        if canvas is not None and self.attention.asks_for_canvas:
            inside = geometry.in_canvas(mask, canvas)
        if hidden is None:
            hidden = stack.embedded(ids, positions, inside)
        sight = self.sight(mask, canvas, ids)
        return stack.run(hidden, range(low, high), sight, positions, canvas=inside)

    def sight(
        self,
        mask: Int[Tensor, "rows length"],
        canvas: Int[Tensor, " rows"] | None = None,
        ids: Int[Tensor, "rows length"] | None = None,
    ) -> Float[Tensor, "rows 1 length length"]:
        """The additive mask of who sees whom in rows with this attention mask.

        Args:
            canvas: as in `token_logits`.
            ids: the rows' tokens, in which hidden slots, and the canvas where it is not given, are looked
                for.
        """
        if self.attention.full:
            return geometry.see_all(mask, self.dtype)
        if self.attention.causal:
            return geometry.see_left(mask, self.dtype)
        token = self.hidden.token
        if canvas is None and ids is not None and self.attention.asks_for_canvas and token is not None:
            canvas = geometry.canvas_of(ids, mask, token)
        hidden = None
        if ids is not None and token is not None and self.attention.asks_for_hidden:
            hidden = ids == token
        return geometry.see_ranked(mask, geometry.ranks(mask, self.attention, canvas, hidden), self.dtype)

    def _check_paths(self) -> None:
        for path in (
            self.spec.paths.backbone,
            self.spec.paths.embedding,
            *self.spec.paths.norm,
            self.spec.paths.head,
        ):
            self.module(path)
        self.site(0)

    def extra_repr(self) -> str:
        """Family, paradigm and attention, for `print(model)`."""
        return f"family={self.spec.name}, paradigm={self.spec.paradigm}, attention={self.attention}"


def adapt(
    native: Any,
    tokenizer: Any = None,
    family: str | None = None,
    name: str = "",
    mask_id: int | None = None,
    attention: Attention | None = None,
    shift: bool | None = None,
) -> Adapter:
    """Wrap a transformers model that is already in memory.

    Args:
        native: the model; an `Adapter` is returned as it is.
        tokenizer: its tokenizer (needed where it is to name the special ids).
        family: the family's name; by default told from the model's class and `config.model_type`.
        name: what to call it in records.
        mask_id: the mask token's id, for masked models.
        attention, shift: see `Adapter`.

    Raises:
        ModelError: if the family cannot be told or the special ids are unusable.
    """
    if isinstance(native, Adapter):
        return native
    spec = FAMILIES[family] if family else family_of(native)
    ids = special_ids(
        spec,
        vars(text_config(native.config)) if native.config else {},
        tokenizer,
        native.get_input_embeddings().weight.shape[0],
        mask_id,
    )
    return Adapter(
        native,
        spec,
        ids,
        tokenizer,
        name or getattr(native.config, "_name_or_path", "") or spec.name,
        attention,
        shift,
    )


def text_config(config: Any) -> Any:
    """The part of a native configuration that is the language model's: the whole, but where there are
    several.
    """
    return getattr(config, "text_config", None) or config


def is_known(native: nn.Module) -> bool:
    """Whether `adapt` can wrap this model: an adapter, or a transformers class that a family computes
    with.
    """
    kinds = set().union(*(class_names(FAMILIES[name]) for name in FAMILIES))
    return isinstance(native, Adapter) or type(native).__name__ in kinds


def special_ids(
    spec: FamilySpec, config: dict[str, Any], tokenizer: Any, embeddings: int, mask_id: int | None = None
) -> Ids:
    """Mask, eos and pad ids: what the user says, then config, tokenizer, the family's default.

    Raises:
        ModelError: if a masked model has no mask id, or it equals pad or eos, or lies outside the embedding;
            if another one is given a mask id.
    """

    def first(*values: Any) -> Any:
        """The first that is a number, of single values and of lists."""
        for value in values:
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
        return None

    eos = first(config.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None))
    pad = first(config.get("pad_token_id"), getattr(tokenizer, "pad_token_id", None), eos, 0)
    if not spec.masked:
        if mask_id is not None:
            raise ModelError(
                f"mask_id={mask_id!r} was given, but a {spec.name} model has no mask token: leave it out"
            )
        return Ids(None, eos, pad)
    mask = first(
        mask_id, config.get("mask_token_id"), getattr(tokenizer, "mask_token_id", None), spec.mask_id
    )
    if mask is None:
        raise ModelError(
            f"no mask token for a {spec.name} model: give mask_id, or set mask_token_id in config.json or the"
            " tokenizer"
        )
    if not 0 <= mask < embeddings:
        raise ModelError(
            f"mask id {mask} lies outside the embedding (0 to {embeddings - 1}): give the right mask_id"
        )
    if mask in (pad, eos):
        raise ModelError(
            f"mask id {mask} is also the pad or eos id: a masked position could not be told from padding;"
            " give mask_id"
        )
    return Ids(mask, eos, pad)
