"""`easyedit-mdm adapt`: an autoregressive model becomes a masked one.

OUT holds, while and after it runs:

    adapter/              LoRA layers and the mask token's row, in peft's format
    checkpoint.safetensors   the same in float32, with the optimiser's state: what a killed run goes on from
    curve.jsonl           loss on held-out text by mask ratio
    log.jsonl             loss of the training steps
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from easyedit_mdm.errors import CheckpointError
from easyedit_mdm.training.blocks import Rows
from easyedit_mdm.training.corpus import Corpus
from easyedit_mdm.training.feeding import Drawn, fed
from easyedit_mdm.training.heldout import HeldOut
from easyedit_mdm.training.loop import (
    CHECKPOINT,
    Log,
    cosine,
    generator_of,
    load_checkpoint,
    save_checkpoint,
)
from easyedit_mdm.training.lora import write_adapter
from easyedit_mdm.training.objective import Losses, Student, losses, next_token
from easyedit_mdm.training.recipe import Recipe

WARM, MEASURED = 4, 12  # the steps between them say how many tokens fit into --minutes


@dataclass(frozen=True)
class Run:
    """One call of `adapt`: where it writes, and how long it goes on.

    Attributes:
        tokens: text tokens of the whole training, earlier calls included; the rate falls towards them.
        minutes: instead, minutes of the whole training: the first steps' speed says how many tokens that is.
        save_seconds, measure_seconds: time between checkpoints, and between points of the curve.
        save_steps, measure_steps: instead, steps between them.
        workers: processes that draw the rows of the coming steps; 0: none. The rows are the same.
    """

    out: Path
    tokens: int | None = None
    minutes: float | None = None
    save_seconds: float = 300.0
    measure_seconds: float = 900.0
    save_steps: int | None = None
    measure_steps: int | None = None
    workers: int = 0


def train(
    student: Student,
    tensors: dict[str, Tensor],
    corpus: Corpus,
    held_out: HeldOut,
    recipe: Recipe,
    run: Run,
    card: Mapping[str, Any],
) -> dict[str, Any]:
    """Train the student's LoRA layers and mask row; goes on where `run.out` holds a checkpoint of the same
    recipe.

    Args:
        tensors: what is trained, by name.
        card: what the adapter's configuration says about it.

    Returns:
        the final state: step, tokens, columns, slots, seconds, planned (tokens), recipe.

    Raises:
        CheckpointError: for a checkpoint of another recipe.
    """
    return _Training(student, tensors, corpus, held_out, recipe, run, dict(card)).go()


class _Clock:
    """Strikes every so many steps, or seconds."""

    def __init__(self, seconds: float, steps: int | None):
        self.seconds, self.steps, self.last = seconds, steps, time.monotonic()

    def strikes(self, step: int) -> bool:
        """Whether it is time, after this step."""
        now = time.monotonic()
        due = step % self.steps == 0 if self.steps else now - self.last > self.seconds
        self.last = now if due else self.last
        return due


class _Training:
    def __init__(self, student, tensors, corpus, held_out, recipe: Recipe, run: Run, card: dict[str, Any]):
        self.student, self.tensors, self.corpus, self.held_out = student, tensors, corpus, held_out
        self.recipe, self.run, self.card = recipe, run, card
        self.device = student.mask_row.device
        self.optimizer = torch.optim.AdamW(
            list(tensors.values()), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.state: dict[str, Any] = {
            "step": 0,
            "tokens": 0,
            "columns": 0,
            "slots": 0,
            "seconds": 0.0,
            "planned": run.tokens,
        }
        self.state["recipe"] = asdict(recipe)
        self._warm: tuple[int, float] | None = None

    def go(self) -> dict[str, Any]:
        """All steps."""
        self.run.out.mkdir(parents=True, exist_ok=True)
        kept = self.state["step"] if self._resume() else -1
        self.log, self.curve = (Log(self.run.out / f"{name}.jsonl", kept) for name in ("log", "curve"))
        saving = _Clock(self.run.save_seconds, self.run.save_steps)
        measuring = _Clock(self.run.measure_seconds, self.run.measure_steps)
        if kept < 0:
            self._measure()
        done = self.state["tokens"]
        bar = tqdm(total=self.state["planned"], initial=done, desc="adapting", unit="tok", mininterval=2)
        for loss in self._steps():
            bar.total = self.state["planned"]
            bar.update(self.state["tokens"] - bar.n)
            bar.set_postfix(loss=f"{float(loss.masked):.2f}", kl=f"{float(loss.kl):.3f}")
            if measuring.strikes(self.state["step"]) or self._done():
                self._measure()
            if saving.strikes(self.state["step"]) or self._done():
                self._save()
        bar.close()
        return self.state

    def _done(self) -> bool:
        return self.state["planned"] is not None and self.state["tokens"] >= self.state["planned"]

    def _steps(self) -> Iterator[Losses]:
        feed, planned = None, -1
        while not self._done():
            began, step = time.monotonic(), self.state["step"]
            if feed is None or planned != self.state["planned"]:  # the plan says how far attention is open
                planned = self.state["planned"]
                feed = fed(
                    Drawn(self.corpus, self.recipe, self.student.mask_id, planned), step, self.run.workers
                )
            rows = next(feed)
            loss = self._step(rows.to(self.device), step)
            clean = int(((rows.texts > 0) & (rows.blocks == 0)).sum())
            counts = {
                "step": 1,
                "tokens": clean,
                "columns": int((rows.texts > 0).sum()),
                "slots": int((rows.targets >= 0).sum()),
            }
            for name, count in counts.items():
                self.state[name] += count
            self.state["seconds"] += time.monotonic() - began
            self._plan()
            self.log.add(
                {
                    **{k: self.state[k] for k in ("step", "tokens", "seconds")},
                    "masked": float(loss.masked),
                    "kl": float(loss.kl),
                }
            )
            yield loss

    def _share(self) -> float:
        return self.state["tokens"] / self.state["planned"] if self.state["planned"] else 0.0

    def _step(self, rows: Rows, step: int) -> Losses:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * (
                cosine(self._share()) if self.state["planned"] else min(1.0, (step + 1) / 100)
            )
        generator = generator_of(self.recipe.seed, step)
        with self._autocast():
            loss = (
                next_token(self.student, rows)
                if self.recipe.attention == "causal"
                else losses(self.student, rows, generator, self.recipe.kl_weight, self.recipe.taught)
            )
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _autocast(self) -> AbstractContextManager:
        half = self.recipe.precision or ("bfloat16" if self.device.type == "cuda" else "float32")
        return torch.autocast(self.device.type, torch.bfloat16) if half == "bfloat16" else nullcontext()

    def _plan(self) -> None:
        """How many tokens the minutes allow, once the first steps have shown the speed."""
        if self.state["planned"] is not None or self.run.minutes is None:
            return
        tokens, seconds = self.state["tokens"], self.state["seconds"]
        if self._warm is None and self.state["step"] >= WARM:  # a GPU's first steps are slow
            self._warm = tokens, seconds
        elif self._warm is not None and self.state["step"] >= MEASURED:
            speed = (tokens - self._warm[0]) / (seconds - self._warm[1])
            self.state["planned"] = tokens + round(max(0.0, self.run.minutes * 60 - seconds) * speed)

    def _measure(self) -> None:
        with self._autocast():
            figures = self.held_out.measure(self.student)
        self.curve.add({**{k: self.state[k] for k in ("step", "tokens", "slots", "seconds")}, **figures})

    def _save(self) -> None:
        save_checkpoint(self.run.out / CHECKPOINT, self.tensors, self.optimizer, self.state)
        write_adapter(
            self.run.out / "adapter", self.student, self.tensors, {**self.card, "training": self.state}
        )

    def _resume(self) -> bool:
        """Go back to the checkpoint, if there is one."""
        file = self.run.out / CHECKPOINT
        if not file.exists():
            return False
        state = load_checkpoint(file, self.tensors, self.optimizer)
        state["recipe"] = {**asdict(Recipe()), **state["recipe"]}  # what has come since counts as its default
        if state["recipe"] != self.state["recipe"]:
            raise CheckpointError(
                f"{file} belongs to another recipe ({state['recipe']}): choose another folder, or remove it"
            )
        self.state = state
        if self.run.tokens is not None:
            self.state["planned"] = self.run.tokens
        return True
