"""The one file that touches what moves between versions of transformers.

Layers are run one by one, through their public `forward`, with an explicit 4-D additive mask; the model's own
`forward` is never given fewer layers than it expects. What this file asks of transformers:

- classes by name (`LlamaConfig`, `LlamaForCausalLM`, ...), and `attn_implementation=` as an argument of a
  configuration;
- a backbone's `rotary_emb(hidden, position_ids)`, or GPT-2's `wpe` and `drop`;
- a layer's `forward`, whose arguments are looked up by name, since the cache's has had four;
- of a cache, that a layer calls its `update(keys, values, layer_idx, ...)` and goes on with what it returns.

`tests/test_native.py` holds each against the model's own forward. Where one of them is gone,
`IncompatibleVersionError` says so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from easyedit_mdm.common.versions import advice
from easyedit_mdm.errors import IncompatibleVersionError, ModelError
from easyedit_mdm.models.spec import FamilySpec

_CACHE_NAMES = ("cache", "past_key_values", "past_key_value")  # from transformers 5.24, 4.56, 4.46 on
_HEADS = ("ForCausalLM", "LMHeadModel")
_SLIDING = "sliding_attention"
_MASKS_4D = ("sdpa", "eager")

KeysAndValues = tuple[Float[Tensor, "rows heads columns size"], Float[Tensor, "rows heads columns size"]]


# ---- tokens before every row -------------------------------------------------------------------------------
class PutBefore:
    """A forward pre-hook and a forward hook by which an autoregressive model's own `forward`, and so its
    `generate`, sees `ids` before every row and returns the logits of the row alone.

    Without a cache, or with an empty one, the tokens are run with the row; a filled one holds them already.
    """

    def __init__(self, ids: Int[Tensor, " tokens"]):
        self.ids = ids
        self._cut = 0  # columns of the running call that are not the caller's

    def before(self, _: nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The call as the model is to see it.

        Raises:
            ModelError: for a call that has no token ids, or a 4-D mask.
        """
        rows = given.pop("input_ids", None) if not args else args[0]
        mask = given.get("attention_mask")
        if len(args) > 1 or rows is None or (mask is not None and mask.dim() != 2):
            raise ModelError(
                "this model carries an in-context edit, whose tokens stand before every row: call it with"
                " input_ids and a 2-D attention_mask by name, or take the edit back"
            )
        number, count = len(rows), len(self.ids)
        kept = _tokens_kept(next((given[name] for name in _CACHE_NAMES if name in given), None))
        if mask is None:
            mask = rows.new_ones(number, max(0, kept - count) + rows.shape[1])
        before = self.ids.to(rows).expand(number, -1)
        mask = torch.cat([torch.ones_like(before).to(mask), mask], dim=1)
        self._cut = 0 if kept else count
        if not kept:
            rows = torch.cat([before, rows], dim=1)
            if given.get("labels") is not None:
                labels = given["labels"]
                given["labels"] = torch.cat([torch.full_like(before, -100).to(labels), labels], dim=1)
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -rows.shape[1] :]
        if given.get("cache_position") is not None:
            given["cache_position"] = torch.arange(kept, kept + rows.shape[1], device=rows.device)
        return (), {**given, "input_ids": rows, "attention_mask": mask, "position_ids": places}

    def after(self, _: nn.Module, args: tuple, given: dict[str, Any], out: Any) -> Any:
        """What the caller gets: without the logits of what stands before the row."""
        logits = getattr(out, "logits", None)
        if self._cut and logits is not None and logits.shape[1] == given["input_ids"].shape[1]:
            out.logits = logits[:, self._cut :]
        return out


def _tokens_kept(cache: Any) -> int:
    """How many tokens a cache holds; 0 for none."""
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else int(cache[0][0].shape[-2])


# ---- classes -----------------------------------------------------------------------------------------------
def native_classes(name: str, since: str = "", ending: str = "") -> tuple[type, type]:
    """The configuration class and the language-model class that transformers names after `name` ("Llama").

    Args:
        since: the first version that has them, for the message.
        ending: of the language-model class, where it is not a causal one.

    Raises:
        IncompatibleVersionError: if the installed version has no such model.
    """
    import transformers

    config = getattr(transformers, f"{name}Config", None)
    models = [getattr(transformers, f"{name}{head}", None) for head in ([ending] if ending else _HEADS)]
    model = next((m for m in models if m is not None), None)
    if config is None or model is None:
        if since:
            raise IncompatibleVersionError(
                f"in transformers {transformers.__version__} there is no {name} language model: it came with"
                f" transformers {since}, install that or a later one"
            )
        raise _incompatible(f"there is no {name} language model")
    return config, model


def class_names(spec: FamilySpec) -> set[str]:
    """The names that a family's language-model class may have."""
    return {f"{spec.native}{head}" for head in ([spec.ending] if spec.ending else _HEADS)}


def build(name: str, settings: Mapping[str, Any], since: str = "", ending: str = "") -> Any:
    """A model of class `name` from the keyword arguments of its configuration, with attention that takes
    additive masks.

    `since`, `ending`: see `native_classes`.
    """
    config_class, model_class = native_classes(name, since, ending)
    return model_class(config_class(**settings, attn_implementation="sdpa"))


def turn(backbone: nn.Module, frequencies: Float[Tensor, " half"]) -> None:
    """Give a backbone's rotation other frequencies, one for each pair of a head's dimensions."""
    rotary = _part(backbone, "rotary_emb")
    for name in ("inv_freq", "original_inv_freq"):  # the second in versions that change the first as they run
        if hasattr(rotary, name):
            setattr(rotary, name, frequencies.clone())


def put_last(model: nn.Module, path: str) -> None:
    """Let a module come after those beside it, so that parameters that it shares go by their names."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = getattr(parent, name)
    delattr(parent, name)
    setattr(parent, name, module)


def tokenizer_classes(names: Iterable[str | None]) -> list[Any]:
    """Those of these tokenizer classes that transformers has, and its generic fast one, in this order, each
    once.
    """
    import transformers

    candidates = [getattr(transformers, name, None) for name in names if name]
    kinds = [
        c for c in candidates if isinstance(c, type) and issubclass(c, transformers.PreTrainedTokenizerBase)
    ]
    return list(dict.fromkeys([*kinds, transformers.PreTrainedTokenizerFast]))


def check_attention(native: nn.Module) -> None:
    """Refuse a model whose attention takes no 4-D additive mask (flash attention).

    Raises:
        ModelError: naming the attention that it was loaded with.
    """
    kind = getattr(native.config, "_attn_implementation", None)
    if kind is not None and kind not in _MASKS_4D:
        raise ModelError(
            f"this model was loaded with attn_implementation={kind!r}, which takes no mask of who sees whom: "
            "load it with 'sdpa' or 'eager'"
        )


def continued(model: nn.Module, ids: Int[Tensor, "rows new"], cache: Any = None) -> tuple[Tensor, Any]:
    """Raw logits of a causal model for some more columns, and its cache, to be handed in with the next
    ones.
    """
    names, _ = _parameters(cast(type, type(model)))
    name = next((n for n in _CACHE_NAMES if n in names), None)
    if name is None:
        raise _incompatible(f"{type(model).__name__}.forward takes no cache by a known name")
    out = model(input_ids=ids, use_cache=True, **{name: cache})
    return out.logits, getattr(out, name)


# ---- layers ------------------------------------------------------------------------------------------------
class _Kept:
    """What a layer takes for a cache: it notes the keys and values of the columns that run, and puts earlier
    ones before them.
    """

    def __init__(self, earlier: Mapping[int, KeysAndValues] | None = None):
        self.earlier = dict(earlier or {})
        self.noted: dict[int, KeysAndValues] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values that the layer's attention goes on with."""
        self.noted[layer_idx] = (keys, values)
        if layer_idx not in self.earlier:
            return keys, values
        before = self.earlier[layer_idx]
        return torch.cat([before[0].to(keys.device), keys], dim=2), torch.cat(
            [before[1].to(values.device), values], dim=2
        )

    def get_seq_length(self, layer_idx: int = 0, *_: Any) -> int:
        """How many columns are kept from earlier, which older layers ask for."""
        return self.earlier[layer_idx][0].shape[2] if layer_idx in self.earlier else 0


class Stack:
    """The layers of a model, to be run in parts.

    Args:
        module: gives the submodule at a dotted path.
        spec: the family.
        config: the native configuration.
    """

    def __init__(self, module: Callable[[str], nn.Module], spec: FamilySpec, config: Any):
        self._module, self._spec, self._config = module, spec, config
        self._paths = spec.paths
        self._backbone = module(self._paths.backbone)

    def embedded(
        self,
        ids: Int[Tensor, "rows length"],
        positions: Int[Tensor, "rows length"],
        canvas: Bool[Tensor, "rows length"] | None = None,
    ) -> Float[Tensor, "rows length width"]:
        """The input of layer 0. `canvas`: see `run`."""
        if self._paths.entry:
            return self._module(self._paths.entry)(input_ids=ids, **self._absolute(positions))
        hidden = self._module(self._paths.embedding)(ids)
        if self._paths.canvas_entry and canvas is not None:
            entered = self._module(self._paths.canvas_entry)(hidden, torch.zeros_like(hidden))
            return torch.where(canvas.to(hidden.device)[..., None], entered, hidden)
        if not self._spec.absolute_positions:
            return hidden
        where = _part(self._backbone, "wpe")(positions)
        return _part(self._backbone, "drop")(hidden + where.to(hidden.device))

    def _absolute(self, positions: Int[Tensor, "rows length"]) -> dict[str, Tensor]:
        return {"position_ids": positions} if self._spec.absolute_positions else {}

    def run(
        self,
        hidden: Float[Tensor, "rows length width"],
        layers: range,
        attention: Float[Tensor, "rows 1 length columns"],
        positions: Int[Tensor, "rows length"],
        cache: _Kept | None = None,
        canvas: Bool[Tensor, "rows length"] | None = None,
    ) -> Float[Tensor, "rows length width"]:
        """The residual stream after these layers, given what enters the first of them.

        Args:
            attention: additive mask; its columns are those of `cache`, if there is one, and then these.
                Sliding layers see of it what lies in their window.
            positions: of the columns that run.
            canvas: which columns are the canvas's; read where there is a `context_block`.
        """
        near = self._near(attention, positions, canvas)
        turned = self._rotations(hidden, positions)
        for number in layers:
            layer = self._module(self._paths.block.format(number))
            sliding = _kind(layer) == _SLIDING and near is not None
            extra: dict[str, Any] = {
                "attention_mask": near if sliding else attention,
                "sliding_window_mask": near,  # older versions give both to every layer
                "use_cache": cache is not None,
                **({} if self._spec.absolute_positions else {"position_ids": positions}),
                **turned(layer),
            }
            given = _understood(type(layer), extra, cache)
            through = _forgetting if _offloaded(layer) and torch.is_grad_enabled() else _calling
            out = through(self._through(layer, number, canvas), hidden, given)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def _through(
        self, layer: nn.Module, number: int, canvas: Bool[Tensor, "rows length"] | None
    ) -> Callable[..., Any]:
        """A layer; where the columns before the canvas have one of their own, the layer with each column's
        own buffers. The parameters of the two are the same.
        """
        if not self._paths.context_block:
            return layer
        before = dict(self._module(self._paths.context_block.format(number)).named_buffers(recurse=False))
        if canvas is None:
            return functools.partial(_called, layer, before)
        own = dict(layer.named_buffers(recurse=False))
        where = {name: canvas.to(value.device)[..., None] for name, value in own.items()}
        return functools.partial(
            _called, layer, {name: torch.where(where[name], own[name], before[name]) for name in own}
        )

    def _near(
        self,
        attention: Tensor,
        positions: Int[Tensor, "rows length"],
        canvas: Bool[Tensor, "rows length"] | None,
    ) -> Tensor | None:
        """The mask of sliding layers, where the family has any."""
        if self._spec.window is None:
            return None
        most, seeing = self._spec.window(self._config), positions
        left_out = torch.zeros_like(positions[:, :1]).bool()
        if canvas is not None and self._paths.context_block:
            left_out = canvas
            first = positions.masked_fill(~canvas, positions.shape[1]).amin(-1, keepdim=True)
            seeing = torch.where(canvas, first, positions)
        distance = seeing[:, :, None] - positions[:, None, :]
        far = (distance > most) | ((distance < -most) & ~left_out[:, :, None])
        return attention.masked_fill(far[:, None].to(attention.device), torch.finfo(attention.dtype).min)

    def _rotations(
        self, hidden: Tensor, positions: Int[Tensor, "rows length"]
    ) -> Callable[[nn.Module], dict[str, Any]]:
        """What a layer is given for the rotation of its positions: one for all, or one for each kind of
        layer.
        """
        rotary = getattr(self._backbone, "rotary_emb", None)
        if self._spec.absolute_positions or (rotary is None and self._spec.window is not None):
            return lambda layer: {}  # learned positions, or layers that turn by themselves
        return functools.partial(_turned, _part(self._backbone, "rotary_emb"), hidden, positions, {})

    def normed(self, hidden: Float[Tensor, "rows length width"]) -> Float[Tensor, "rows length width"]:
        """What the head is given: after the final norm, and whatever else stands there."""
        for path in self._paths.norm:
            hidden = self._module(path)(hidden)
        return hidden

    def logits(self, normed: Float[Tensor, "rows slots width"]) -> Float[Tensor, "rows slots vocab"]:
        """What the head makes of what `normed` gives."""
        logits = self._module(self._paths.head)(normed)
        if not self._spec.softcap:
            return logits
        most = getattr(self._config, self._spec.softcap)
        return most * torch.tanh(logits.float() / most)

    def keys_and_values(
        self,
        hidden: Float[Tensor, "rows length width"],
        layers: range,
        attention: Float[Tensor, "rows 1 length length"],
        positions: Int[Tensor, "rows length"],
    ) -> dict[int, KeysAndValues]:
        """What each of these layers' attention makes of the columns, by layer."""
        cache = _Kept()
        self.run(hidden, layers, attention, positions, cache)
        _check_noted(cache.noted, layers)
        return cache.noted

    def run_after(
        self,
        earlier: Mapping[int, KeysAndValues],
        hidden: Float[Tensor, "rows rest width"],
        layers: range,
        attention: Float[Tensor, "rows 1 rest length"],
        positions: Int[Tensor, "rows rest"],
    ) -> Float[Tensor, "rows rest width"]:
        """`run` on the columns that follow those whose keys and values are given."""
        cache = _Kept(earlier)
        out = self.run(hidden, layers, attention, positions, cache)
        _check_noted(cache.noted, layers)
        return out


def _offloaded(layer: nn.Module) -> bool:
    """Whether its weights are read anew at every call."""
    return any(value.is_meta for value in layer.parameters())


def _calling(layer: Callable[..., Any], hidden: Tensor, given: Mapping[str, Any]) -> Any:
    return layer(hidden, **given)


def _forgetting(layer: Callable[..., Any], hidden: Tensor, given: Mapping[str, Any]) -> Any:
    """As `_calling`, but weights that were read are not kept for the backward pass, which runs the layer
    again: one layer's at a time are in memory.
    """
    return checkpoint(
        functools.partial(_calling, layer), hidden, given, use_reentrant=False, preserve_rng_state=False
    )


def _kind(layer: nn.Module) -> str:
    """What a layer's attention is called, where a model has several kinds."""
    own = getattr(layer, "attention_type", "")
    return own or getattr(getattr(layer, "self_attn", None), "layer_type", "") or ""


def _turned(
    rotary: nn.Module,
    hidden: Tensor,
    positions: Int[Tensor, "rows length"],
    kinds: dict[str, Any],
    layer: nn.Module,
) -> dict[str, Any]:
    """A layer's rotations, made once a kind of layer."""
    names, _ = _parameters(cast(type, type(rotary)))
    kind = _kind(layer) if "layer_type" in names else ""
    if kind not in kinds:
        kinds[kind] = rotary(hidden, positions, kind) if kind else rotary(hidden, positions)
    return {"position_embeddings": kinds[kind]}


def _called(layer: nn.Module, buffers: dict[str, Tensor], *args: Any, **more: Any) -> Any:
    """A layer with other buffers, for one call."""
    return functional_call(layer, buffers, args, more)


def _incompatible(what: str) -> IncompatibleVersionError:
    import transformers

    return IncompatibleVersionError(
        f"in transformers {transformers.__version__} {what}. {advice('transformers')}"
    )


def _part(backbone: nn.Module, name: str) -> nn.Module:
    part = getattr(backbone, name, None)
    if part is None:
        raise _incompatible(f"{type(backbone).__name__} has no {name!r}, which its positions are read from")
    return part


def _check_noted(noted: Mapping[int, Any], layers: range) -> None:
    if sorted(noted) != list(layers):
        raise _incompatible("the attention does not call a cache's update() in every layer")


def _understood(layer: type, extra: Mapping[str, Any], cache: _Kept | None) -> dict[str, Any]:
    """The arguments by the names that this layer's forward has."""
    names, open_ended = _parameters(layer)
    needed = {"attention_mask", "position_embeddings"} & set(extra)
    if not needed <= names and not open_ended:
        raise _incompatible(f"{layer.__name__}.forward lacks {', '.join(sorted(needed - names))}")
    known = {name: value for name, value in extra.items() if name in names or name in needed}
    if cache is None:
        return known
    name = next((n for n in _CACHE_NAMES if n in names), None)
    if name is None:
        raise _incompatible(f"{layer.__name__}.forward takes no cache by a known name")
    return {**known, name: cache}


@functools.cache
def _parameters(layer: type) -> tuple[frozenset[str], bool]:
    """The names of a layer's arguments, and whether it takes any other."""
    # `forward` is an nn.Module's
    parameters = inspect.signature(layer.forward).parameters.values()  # type: ignore[attr-defined]
    return frozenset(p.name for p in parameters), any(p.kind is p.VAR_KEYWORD for p in parameters)
