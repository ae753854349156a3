"""Hyperparameters: EasyEdit's fields under EasyEdit's names, and what denoising adds to them.

The fields stand in groups, a class each, and a YAML file holds all of them side by side. `MethodHyperParams`
are those of every method, `StateHyperParams` those of the methods that read a loss over states of the target,
and `ROMEMDMHyperParams` those of the methods that optimise a value. A method's class derives from the one
that has what it uses and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from easyedit_mdm.common.kinds import checked
from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.common.yaml_files import YamlFile, find_hparams, packaged_hparams, read_yaml, read_yaml_file
from easyedit_mdm.denoising import SCHEDULES, DecodeConfig, schedule
from easyedit_mdm.editing.guard import GuardConfig
from easyedit_mdm.errors import HyperParameterError, UnknownNameError

__all__ = [
    "MethodHyperParams",
    "ROMEMDMHyperParams",
    "StateHyperParams",
    "find_hparams",
    "packaged_hparams",
    "read_yaml",
]

FACT_TOKENS = ("subject_last", "subject_first", "subject_first_after_last", "last")
KL_POSITIONS = ("slot", "subject_last")
Own = TypeVar("Own", bound="MethodHyperParams")


@dataclass
class MainHyperParams:
    """What every method is told: which method, which model, where, and how it is watched.

    Attributes:
        alg_name: the method.
        model_name: a twin, a folder, or a hub id.
        layers: layers that are edited, in ascending order; the rank-one methods take one.
        guard: thresholds of the collapse guard (`easyedit_mdm.editing.guard.GuardConfig`), or {} for its own;
            None: no edit is refused.
        seed: of every random draw of an edit.
        decode: settings of the multi-step metric (`easyedit_mdm.denoising.DecodeConfig`).
    """

    alg_name: str
    model_name: str
    layers: list[int]
    guard: dict[str, Any] | None = None
    seed: int = 0
    decode: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoadingHyperParams:
    """How the model is loaded.

    Attributes:
        dtype: dtype to load it in, such as `bfloat16`; None: `fp16` decides, and without it the checkpoint.
        fp16: EasyEdit's field: true is the same as `dtype: float16`.
        device: cpu, cuda, cuda:1, or EasyEdit's number of a GPU; None: CUDA where there is one.
        mask_id: the mask token, where the checkpoint does not say.
        block: tokens a block of a block-causal model, where the checkpoint does not say (dLLM's `bd3lm`
            releases).
        model_parallel, max_length: read by EasyEdit's editor and its own metrics only.
    """

    dtype: str | None = None
    fp16: bool = False
    device: Any = None
    mask_id: int | None = None
    block: int | None = None
    model_parallel: bool = False
    max_length: int = 40


@dataclass
class StatisticsHyperParams:
    """The second moments C of the keys.

    Attributes:
        mom2_dataset: the text of the second moments: a file, JSON lines, `datasets:NAME:CONFIG:SPLIT`, or
            `twins` (`easyedit_mdm.statistics.text_source`).
        mom2_adjustment: whether they are used; without them C is the identity. None becomes false, but not
            beside a text, which would then be ignored.
        mom2_n_tokens: tokens of the text that are used; None means 10 times the key's dimension.
        mom2_mask_ratio: 0: plain text; a number or `uniform`: masked text, keys at unmasked positions (masked
            models).
        mom2_settled: collect no further once even and odd batches differ by less than this, relatively; None:
            all.
        mom2_eps: ridge, as a fraction of the mean eigenvalue, added to the second moments.
        stats_dir: where they are kept; None means the user's cache folder.
    """

    mom2_dataset: str | None = None
    mom2_adjustment: bool | None = None
    mom2_n_tokens: int | None = None
    mom2_mask_ratio: int | float | str = 0
    mom2_settled: float | None = None
    mom2_eps: float = 1e-6
    stats_dir: str | None = None


@dataclass
class ValueHyperParams:
    """How a value is optimised.

    Attributes:
        v_num_grad_steps: Adam's steps, one more than are made, as in EasyEdit (25 makes 24).
        v_lr: Adam's learning rate.
        clamp_norm_factor: ||delta|| is kept within this times ||v_0||.
        v_weight_decay: weight of ||delta|| / ||v_0||^2 in the loss.
        kl_factor: weight of the KL anchor "{subject} is a".
        early_stop_loss: the optimisation ends when the total loss, averaged over a cycle of states, falls
            below this.
        facts_per_batch: facts whose values are optimised together; halved where memory runs out.
    """

    v_num_grad_steps: int = 25
    v_lr: float = 0.1
    clamp_norm_factor: float = 0.75
    v_weight_decay: float = 0.5
    kl_factor: float = 0.0625
    early_stop_loss: float = 0.05
    facts_per_batch: int = 64


@dataclass
class ComparisonHyperParams:
    """Switches for comparisons with EasyEdit and for ablations; docs/methods.md tells what they were tried
    for.

    Attributes:
        fact_token: where the fact is read and written.
        key_average: `single`: one k*, the mean over context prefixes, in u and in the denominator alike;
            `easyedit`: the mean in u and the bare prompt's key in the denominator, as EasyEdit's ROME has it
            (the r-ROME bug, arXiv 2403.07175).
        key_states: states of the target under which k* is read in a masked model: `full_mask`, or `average`
            over all.
        kl_position: where the KL anchor "{subject} is a" is read: `slot`, the token after it, or
            `subject_last`, the token after the subject, as EasyEdit's ROME has it.
        early_stop_on: `cycle`, or `drawn`: the loss of the states of one step alone, which may be easy ones.
        optimise_through: `activation`: delta is put in at the subject's token alone while it is optimised, as
            ROME does; `weights`: as the finished update will put it in, at every token (ROME_MDM, and the
            batched methods in one layer; `easyedit_mdm.editing.solve.value`).
        v_lr_schedule: `constant`, or `cosine`: v_lr falls to 0 over v_num_grad_steps, which calms long
            optimisations.
    """

    fact_token: str = "subject_last"
    key_average: str = "single"
    key_states: str = "full_mask"
    kl_position: str = "slot"
    early_stop_on: str = "cycle"
    optimise_through: str = "activation"
    v_lr_schedule: str = "constant"


@dataclass
class ModuleHyperParams:
    """EasyEdit's module templates; optional: the adapter knows its own, and what a file says is checked
    against it.
    """

    v_loss_layer: int | None = None
    rewrite_module_tmp: str | None = None
    layer_module_tmp: str | None = None
    mlp_module_tmp: str | None = None
    attn_module_tmp: str | None = None
    ln_f_module: str | None = None
    lm_head_module: str | None = None


# the last base's fields come first, and those without a default must
@dataclass
class MethodHyperParams(LoadingHyperParams, MainHyperParams):
    """What every method's hyperparameters have in common; a YAML file holds them by these names.

    A method's class sets `ALG_NAME`, and says by `LAYERS` how many layers it takes: `one`, `some`, or `any`
    (an empty list too).
    """

    ALG_NAME: ClassVar[str] = ""
    LAYERS: ClassVar[str] = "one"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field that can be checked without the model.

        Raises:
            HyperParameterError, UnknownNameError: naming field and value.
        """
        if self.alg_name != self.ALG_NAME:
            raise HyperParameterError(
                f"{type(self).__name__} is {self.ALG_NAME}'s, but {whose(self.alg_name)}"
            )
        for name, value in checked(
            type(self), {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        ).items():
            if isinstance(value, float):  # a whole number was given
                setattr(self, name, value)
        self._check_layers()
        self.check_numbers(seed=0, whole=True)
        if self.fp16 and self.load_dtype != "float16":
            raise HyperParameterError(f"fp16 is on, but dtype={self.dtype!r}: give one of the two")
        self.decode_config()
        self.guard_config()

    @property
    def load_dtype(self) -> str | None:
        """The dtype to load the model in, from `dtype` and EasyEdit's `fp16`; None: the checkpoint's."""
        return self.dtype or ("float16" if self.fp16 else None)

    def _check_layers(self) -> None:
        layers = self.layers
        if not layers and self.LAYERS == "any":
            return
        if not layers or min(layers) < 0:
            raise HyperParameterError(
                f"layers={layers!r}: {self.ALG_NAME} needs a list of layer numbers such as [5]"
            )
        if self.LAYERS == "one" and len(layers) != 1:
            raise HyperParameterError(
                f"layers={layers!r}: {self.ALG_NAME} edits one layer, given as a list such as [5]"
            )
        if sorted(set(layers)) != layers:
            raise HyperParameterError(f"layers={layers!r} must be in ascending order, each once")

    def check_choices(self, **allowed: Sequence[str]) -> None:
        """Check that fields have one of the values that are given for each.

        Raises:
            HyperParameterError: naming field and value.
        """
        for name, known in allowed.items():
            value = getattr(self, name)
            if value not in known:
                choices = f"{', '.join(known)} for {self.ALG_NAME}{did_you_mean(value, known)}"
                raise HyperParameterError(f"{name}={value!r} is not one of {choices}")

    def check_numbers(self, whole: bool = False, **least: int) -> None:
        """Check that fields are finite numbers (whole ones if asked) of at least what is given.

        Raises:
            HyperParameterError: naming field and value.
        """
        kind = "whole number" if whole else "finite number"
        for name, low in least.items():
            value = getattr(self, name)
            if value < low or (isinstance(value, float) and not math.isfinite(value)):
                raise HyperParameterError(f"{name}={value!r} must be a {kind}, at least {low}")

    def advice(self, loss: float) -> str:
        """What to try for a fact that is not written, whose optimisation ended at `loss`; empty where there
        is nothing to say.
        """
        return ""

    def decode_config(self) -> DecodeConfig:
        """The decode settings of the metric.

        Raises:
            HyperParameterError: for a setting that does not exist.
        """
        return DecodeConfig(**checked(DecodeConfig, self.decode, "decode setting"))

    def guard_config(self) -> GuardConfig | None:
        """The thresholds of the collapse guard, or None where it is off.

        Raises:
            HyperParameterError: for a setting that does not exist, or is no number.
        """
        return None if self.guard is None else GuardConfig.of(self.guard)

    @classmethod
    def from_hparams(cls: type[Own], path: str | Path) -> Own:
        """Read a YAML file; `.yaml` may be left out, and one that ships may be named `ROME_MDM/twin-llada`.

        Raises:
            HyperParameterError, UnknownNameError: if the file is missing, not a mapping, another method's, or
                a field is unknown, missing or wrong: with file and line.
        """
        return cls.from_dict(read_yaml_file(find_hparams(path)))

    @classmethod
    def from_dict(cls: type[Own], values: dict[str, Any] | YamlFile, source: str = "") -> Own:
        """Build from a mapping.

        Raises:
            HyperParameterError, UnknownNameError: see `from_hparams`.
        """
        given = values.values if isinstance(values, YamlFile) else values
        try:
            if given.get("alg_name", cls.ALG_NAME) != cls.ALG_NAME:
                raise HyperParameterError(
                    f"{cls.__name__} is {cls.ALG_NAME}'s, but {whose(given['alg_name'])}"
                )
            return cls(**checked(cls, given))
        except (HyperParameterError, UnknownNameError) as error:
            where = values.where(str(error)) if isinstance(values, YamlFile) else source
            raise type(error)(f"{where}: {error}" if where else str(error)) from error

    @classmethod
    def as_now(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that an earlier version wrote down, with the fields that have come since at their
        defaults: what they meant.
        """
        since: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            if f.default is not dataclasses.MISSING:
                since[f.name] = f.default
            elif f.default_factory is not dataclasses.MISSING:
                since[f.name] = f.default_factory()
        since = json.loads(json.dumps(since, default=str))
        return {**since, **settings}

    def to_dict(self) -> dict[str, Any]:
        """All fields, as EasyEdit's hyperparameters give them."""
        return dataclasses.asdict(self)


@dataclass
class StateHyperParams(MethodHyperParams):
    """What the methods add that read a loss over states of the target.

    Attributes:
        state_schedule: states the loss is read in (`easyedit_mdm.denoising.SCHEDULES`); `full_mask` is the
            plain edit.
        max_states: the most states a step may hold.
        open_canvas: slots of a longer canvas that half of the loss is read on: the target, and behind it the
            end of the text. The rest of the canvas is not read. An autoregressive model is asked for the
            token that ends the text. 0: the target's own slots alone.
        max_rows: rows of one forward pass; more are split, with the same result.
        context_template_length_params: [tokens, prefixes] of each kind of context prefix, which the model
            writes.
        context_templates: context prefixes to use instead, each with one `{}`.
    """

    state_schedule: str = "enumerate"
    max_states: int = 31
    open_canvas: int = 0
    max_rows: int = 256
    context_template_length_params: list[list[int]] = field(default_factory=lambda: [[5, 10], [10, 10]])
    context_templates: list[str] | None = None

    def validate(self) -> None:
        """As `MethodHyperParams.validate`."""
        super().validate()
        if self.state_schedule not in SCHEDULES:
            known = f"{', '.join(SCHEDULES)}{did_you_mean(self.state_schedule, SCHEDULES)}"
            raise UnknownNameError(f"state_schedule={self.state_schedule!r} is not one of {known}")
        self.check_numbers(max_states=1, max_rows=1, open_canvas=0, whole=True)
        if self.open_canvas and schedule(self.state_schedule, 2).rolled:
            raise HyperParameterError(
                f"open_canvas={self.open_canvas} with state_schedule: {self.state_schedule}: the states that"
                " a model decodes through are those of the target's own slots; name another schedule"
            )
        for template in self.context_templates or []:
            if template.count("{}") != 1:
                raise HyperParameterError(
                    f"context template {template!r} must hold one {{}} where the prompt goes"
                )


@dataclass
class ROMEMDMHyperParams(
    ModuleHyperParams, ComparisonHyperParams, StatisticsHyperParams, ValueHyperParams, StateHyperParams
):
    """ROME_MDM's hyperparameters, and those of the other methods that optimise a value and write it in closed
    form.

    Fields that EasyEdit's `ROMEHyperParams` has as well mean the same.
    """

    ALG_NAME: ClassVar[str] = "ROME_MDM"
    KEY_AVERAGES: ClassVar[tuple[str, ...]] = ("single", "easyedit")
    KEY_STATES: ClassVar[tuple[str, ...]] = ("full_mask", "average")
    THROUGH: ClassVar[tuple[str, ...]] = ("activation", "weights")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A method with another update than ROME's must say itself that values can be optimised through
        it.
        """
        super().__init_subclass__(**kwargs)
        if "THROUGH" not in vars(cls):
            cls.THROUGH = ("activation",)

    def validate(self) -> None:
        """As `MethodHyperParams.validate`."""
        super().validate()
        self.check_choices(
            fact_token=FACT_TOKENS, kl_position=KL_POSITIONS, key_average=self.KEY_AVERAGES,
            key_states=self.KEY_STATES, early_stop_on=("cycle", "drawn"), optimise_through=self.THROUGH,
            v_lr_schedule=("constant", "cosine"),
        )  # fmt: skip
        self.check_numbers(v_num_grad_steps=1, facts_per_batch=1, whole=True)
        self.check_numbers(v_lr=0, v_weight_decay=0, clamp_norm_factor=0, kl_factor=0, mom2_eps=0)
        if self.mom2_adjustment is None and self.mom2_dataset:  # EasyEdit's files say false beside a text
            raise HyperParameterError(
                f"mom2_dataset={self.mom2_dataset!r}, but mom2_adjustment is not given, and without it no"
                " second moments are used: say true (where the method has any), or false to leave them out"
            )
        self.mom2_adjustment = bool(self.mom2_adjustment)
        if self.mom2_adjustment and not self.mom2_dataset:
            raise HyperParameterError(
                "mom2_adjustment is on, but mom2_dataset names no text file: give one, or turn it off"
            )

    def advice(self, loss: float) -> str:
        """As `MethodHyperParams.advice`."""
        if not loss <= self.early_stop_loss:
            return (
                f"The value did not reach {self.early_stop_loss:g} (early_stop_loss): try more steps "
                f"(v_num_grad_steps: {2 * self.v_num_grad_steps}), a wider clamp (clamp_norm_factor: "
                f"{2 * self.clamp_norm_factor:g}) or another layer (easyedit-mdm sweep)"
            )
        through = "weights" in self.THROUGH and self.optimise_through != "weights"
        return (
            "The value was found, but the update does not carry it: try another layer (easyedit-mdm sweep)"
            f"{', optimise_through: weights' if through else ''} or a lower early_stop_loss"
        )


def whose(alg_name: object) -> str:
    """Which class, or whose method, an `alg_name` belongs to, in words."""
    ours = {cls.ALG_NAME: cls.__name__ for cls in _with_subclasses(MethodHyperParams) if cls.ALG_NAME}
    if isinstance(alg_name, str) and alg_name in ours:
        return f"alg_name is {alg_name!r}: use {ours[str(alg_name)]}, or load_hparams, which takes any file"
    if f"{alg_name}_MDM" in ours:
        return (
            f"alg_name is {alg_name!r}, EasyEdit's own method: `easyedit-mdm bench --alg {alg_name}` and"
            f" EasyEdit's BaseEditor take its files; ours is {alg_name}_MDM"
        )
    return f"alg_name is {alg_name!r}{did_you_mean(str(alg_name), ours)} Known: {', '.join(ours)}"


def _with_subclasses(cls: type[MethodHyperParams]) -> Iterator[type[MethodHyperParams]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)
