"""Hyperparameters: EasyEdit's fields under EasyEdit's names, and what denoising adds to them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from easyedit_mdm.common.kinds import misfit
from easyedit_mdm.common.registry import did_you_mean
from easyedit_mdm.denoising import SCHEDULES, DecodeConfig
from easyedit_mdm.editing.guard import GuardConfig
from easyedit_mdm.errors import HyperParameterError

FACT_TOKENS = ("subject_last", "subject_first", "subject_first_after_last", "last")
_MOST_ENTRIES = 10_000
KL_POSITIONS = ("slot", "subject_last")


@dataclass
class ROMEMDMHyperParams:
    """ROME_MDM's hyperparameters; a YAML file holds them under these names.

    The first group is EasyEdit's `ROMEHyperParams`, with the same meaning (`v_num_grad_steps: 25` makes 24 steps, as there).
    Module templates are optional: the model's adapter knows its own, and what a file says is checked against the model.

    Attributes:
        state_schedule: states the value is optimised over (`easyedit_mdm.denoising.SCHEDULES`); `full_mask` is plain ROME.
        max_states: the most states a step may hold.
        key_average: `single`: one k*, the mean over context prefixes, in u and in the denominator alike; `easyedit`: the
            mean in u and the bare prompt's key in the denominator, as EasyEdit's ROME has it (the r-ROME bug,
            arXiv 2403.07175), for comparisons.
        kl_position: where the KL anchor "{subject} is a" is read: `slot`, the token after it, or `subject_last`, the token
            after the subject, as EasyEdit's ROME has it.
        early_stop_loss: the optimisation ends when the total loss, averaged over a cycle of states, falls below this.
        early_stop_on: `cycle`, or `drawn`: the loss of the states of one step alone, which may be easy ones; for comparison.
        optimise_through: `activation`: delta is put in at the subject's token alone while it is optimised, as ROME does; `weights`: as
            the finished rank-one update will put it in, at every token (ROME_MDM only; `easyedit_mdm.editing.rome`).
        v_lr_schedule: `constant`, or `cosine`: v_lr falls to 0 over v_num_grad_steps, which calms long optimisations.
        context_templates: context prefixes to use, each with one `{}`; None lets the model write them.
        mom2_dataset: the text of the second moments, if `mom2_adjustment` is on: a file, JSON lines, `datasets:NAME:CONFIG:SPLIT`,
            or `twins` (`easyedit_mdm.statistics.text_source`).
        mom2_n_tokens: tokens of it that are used; None means 10 times the key's dimension.
        mom2_mask_ratio: 0: plain text; a number or `uniform`: masked text, keys at unmasked positions (masked models only).
        mom2_settled: collect no further once even and odd batches differ by less than this, relatively; None: all tokens.
        mom2_eps: ridge, as a fraction of the mean eigenvalue, added to the second moments.
        key_states: states of the target under which k* is read in a masked model: `full_mask`, or `average` over all of them.
        max_rows: rows of one forward pass; more are split, with the same result.
        facts_per_batch: facts whose values are optimised together; halved where memory runs out.
        guard: thresholds of the collapse guard (`easyedit_mdm.editing.guard.GuardConfig`), or {} for its own; None: no edit is refused.
        decode: settings of the multi-step metric (`easyedit_mdm.denoising.DecodeConfig`).
        dtype: dtype to load the model in; None keeps the checkpoint's.
        mask_id: the mask token, where the checkpoint does not say.
        block: tokens of a block of a block-causal model, where the checkpoint does not say (dLLM's `bd3lm` releases).
        device, model_parallel, max_length: read by EasyEdit's editor and its own metrics only.
        stats_dir: where statistics are kept; None means the user's cache folder.
        seed: of every random draw of an edit.
    """

    alg_name: str
    model_name: str
    layers: list[int]
    fact_token: str = "subject_last"
    v_num_grad_steps: int = 25
    v_lr: float = 0.1
    v_loss_layer: int | None = None
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    mom2_adjustment: bool = False
    context_template_length_params: list[list[int]] = field(default_factory=lambda: [[5, 10], [10, 10]])
    rewrite_module_tmp: str | None = None
    layer_module_tmp: str | None = None
    mlp_module_tmp: str | None = None
    attn_module_tmp: str | None = None
    ln_f_module: str | None = None
    lm_head_module: str | None = None
    mom2_dataset: str | None = None
    mom2_n_tokens: int | None = None
    mom2_mask_ratio: int | float | str = 0
    mom2_settled: float | None = None
    mom2_eps: float = 1e-6
    stats_dir: str | None = None
    device: Any = None
    max_length: int = 40
    model_parallel: bool = False
    fp16: bool = False
    dtype: str | None = None

    state_schedule: str = "enumerate"
    max_states: int = 31
    key_average: str = "single"
    kl_position: str = "slot"
    early_stop_loss: float = 0.05
    early_stop_on: str = "cycle"
    optimise_through: str = "activation"
    v_lr_schedule: str = "constant"
    context_templates: list[str] | None = None
    key_states: str = "full_mask"
    max_rows: int = 256
    facts_per_batch: int = 64
    guard: dict[str, Any] | None = None
    decode: dict[str, Any] = field(default_factory=dict)
    mask_id: int | None = None
    block: int | None = None
    seed: int = 0

    ALG_NAME: ClassVar[str] = "ROME_MDM"
    KEY_AVERAGES: ClassVar[tuple[str, ...]] = ("single", "easyedit")
    KEY_STATES: ClassVar[tuple[str, ...]] = ("full_mask", "average")
    THROUGH: ClassVar[tuple[str, ...]] = ("activation", "weights")
    ONE_LAYER: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A method with another update than ROME's must say itself that values can be optimised through it."""
        super().__init_subclass__(**kwargs)
        if "THROUGH" not in vars(cls):
            cls.THROUGH = ("activation",)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field that can be checked without the model.

        Raises:
            HyperParameterError, UnknownNameError: naming field and value.
        """
        if self.alg_name != self.ALG_NAME:
            raise HyperParameterError(f"alg_name is {self.alg_name!r}, but this is {self.ALG_NAME}: is it the right file?")
        self._check_layers()
        SCHEDULES[self.state_schedule]
        choices = {"fact_token": FACT_TOKENS, "kl_position": KL_POSITIONS, "key_average": self.KEY_AVERAGES, "key_states": self.KEY_STATES}
        choices |= {"early_stop_on": ("cycle", "drawn"), "optimise_through": self.THROUGH, "v_lr_schedule": ("constant", "cosine")}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise HyperParameterError(f"{name}={value!r} is not one of {', '.join(allowed)} for {self.ALG_NAME}{did_you_mean(value, allowed)}")
        self.check_numbers(v_num_grad_steps=1, max_states=1, max_rows=1, facts_per_batch=1, seed=0, whole=True)
        self.check_numbers(v_lr=0, v_weight_decay=0, clamp_norm_factor=0, kl_factor=0, mom2_eps=0)
        for template in self.context_templates or []:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise HyperParameterError(f"context template {template!r} must hold one {{}} where the prompt goes")
        if self.mom2_adjustment and not self.mom2_dataset:
            raise HyperParameterError("mom2_adjustment is on, but mom2_dataset names no text file: give one, or turn it off")
        self.decode_config()
        self.guard_config()

    def _check_layers(self) -> None:
        layers = self.layers
        if not isinstance(layers, list) or not layers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in layers):
            raise HyperParameterError(f"layers={layers!r}: {self.ALG_NAME} needs a list of layer numbers such as [5]")
        if self.ONE_LAYER and len(layers) != 1:
            raise HyperParameterError(f"layers={layers!r}: {self.ALG_NAME} edits one layer, given as a list such as [5]")
        if sorted(set(layers)) != layers:
            raise HyperParameterError(f"layers={layers!r} must be in ascending order, each once: the residual is spread upwards")

    def check_numbers(self, whole: bool = False, **least: int) -> None:
        """Check that fields are finite numbers (whole ones if asked) of at least what is given.

        Raises:
            HyperParameterError: naming field and value.
        """
        kind = "whole number" if whole else "finite number"
        for name, low in least.items():
            value = getattr(self, name)
            right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not right or not math.isfinite(value) or value < low:
                raise HyperParameterError(f"{name}={value!r} must be a {kind}, at least {low}")

    def decode_config(self) -> DecodeConfig:
        """The decode settings of the metric.

        Raises:
            HyperParameterError: for a setting that does not exist.
        """
        known = [f.name for f in dataclasses.fields(DecodeConfig)]
        if not isinstance(self.decode, dict):
            raise HyperParameterError(f"decode={self.decode!r} must be a mapping of decode settings (or left out)")
        for key in self.decode:
            if key not in known:
                raise HyperParameterError(f"decode setting {key!r} is not known{did_you_mean(key, known)} Known: {', '.join(known)}")
        wrong = misfit(DecodeConfig, self.decode)
        if wrong is not None:
            raise HyperParameterError(f"decode setting {wrong[0]}={self.decode[wrong[0]]!r} is not of the kind {wrong[1]}")
        return DecodeConfig(**self.decode)

    def guard_config(self) -> GuardConfig | None:
        """The thresholds of the collapse guard, or None where it is off.

        Raises:
            HyperParameterError: for a setting that does not exist, or is no number.
        """
        return None if self.guard is None else GuardConfig.of(self.guard)

    @classmethod
    def from_hparams(cls, path: str | Path) -> ROMEMDMHyperParams:
        """Read a YAML file; `.yaml` may be left out, and a file that ships with the package may be named `ROME_MDM/twin-llada`.

        Raises:
            HyperParameterError: if the file is missing, not a mapping, or holds a key that is no field.
        """
        return cls.from_dict(read_yaml(find_hparams(path)), source=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "") -> ROMEMDMHyperParams:
        """Build from a mapping.

        Raises:
            HyperParameterError: for a key that is no field, or a field without a value.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        where = f" in {source}" if source else ""
        for key in values:
            if key not in names:
                raise HyperParameterError(f"unknown hyperparameter {key!r}{where}{did_you_mean(str(key), names)}")
        needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        absent = [name for name in needed if name not in values]
        if absent:
            raise HyperParameterError(f"hyperparameter {', '.join(absent)} is missing{where}")
        wrong = misfit(cls, values)
        if wrong is not None:
            raise HyperParameterError(f"{wrong[0]}={values[wrong[0]]!r}{where} is not of the kind {wrong[1]}")
        floats = {f.name for f in dataclasses.fields(cls) if f.type == "float"}
        fields: dict[str, Any] = {key: _float(key, value) if key in floats else value for key, value in values.items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as EasyEdit's hyperparameters give them."""
        return dataclasses.asdict(self)


def find_hparams(path: str | Path) -> Path:
    """The file meant by `path`: as given, with `.yaml`, or among the files that ship with the package.

    Raises:
        HyperParameterError: if there is none.
    """
    shipped = packaged_hparams()
    text = str(path)
    names = [part + end for part in (text, text.removeprefix("hparams/")) for end in ("", ".yaml")]
    for candidate in (Path(text), Path(text + ".yaml"), *(shipped / name for name in names)):
        if candidate.is_file():
            return candidate
    raise HyperParameterError(f"no hyperparameter file {text!r}. Shipped: {', '.join(sorted(_shipped_names(shipped))) or 'none'}")


def packaged_hparams() -> Path:
    """The folder of YAML files that ships with the package: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).resolve().parent.parent / "hparams"
    return inside if inside.is_dir() else inside.parent.parent / "hparams"


def _shipped_names(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.glob("*/*.yaml")]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; numbers in scientific notation without a dot (`5e-1`) are numbers, as EasyEdit reads them.

    Raises:
        HyperParameterError: if the file is not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise HyperParameterError(f"{path} cannot be read ({error.strerror}): give a YAML file of hyperparameters") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, AttributeError, LookupError) as error:
        # PyYAML lets out what its constructors raise: a 13th month, a number of thousands of digits, thousands of brackets
        raise HyperParameterError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise HyperParameterError(f"{path} must hold a mapping of hyperparameters, not {type(values).__name__}")
    if _entries(values) > _MOST_ENTRIES:
        raise HyperParameterError(f"{path} holds more than {_MOST_ENTRIES} entries (aliases count each time): no file of hyperparameters does")
    return {key: _number(key, value) for key, value in values.items()}


def _entries(value: Any, most: int | None = None) -> int:
    """Number of entries in nested lists and mappings, counted no further than necessary: YAML's aliases can make few lines endless."""
    most = _MOST_ENTRIES + 1 if most is None else most
    count, waiting = 0, [value]
    while waiting and count < most:
        item = waiting.pop()
        count += 1
        if isinstance(item, (dict, list, tuple, set)):
            waiting += [*item.values()] if isinstance(item, dict) else [*item]
    return count


def _float(key: str, value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise HyperParameterError(f"{key}={str(value)[:20]}... is too large a number") from None


def _number(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _number(k, v) for k, v in value.items()}
    if isinstance(value, str) and key not in ("model_name", "device", "alg_name", "order", "mom2_dataset"):
        try:
            return float(value)
        except ValueError:
            return value
    return value
