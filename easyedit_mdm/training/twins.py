"""Training the twins: the causal loss for the autoregressive ones, LLaDA's masked loss for the others.

Short texts are packed into rows of equal length; attention never crosses from one text to the next and
positions start at 0 in each, so a packed row gives the same gradients as its texts alone. The text of step
`i` is drawn from a generator seeded with (seed, i), so that a run that was stopped goes on exactly where it
was.

**The name as a bottleneck.** A small model that reads a two-word name can look at both words from wherever it
answers, and then no vector at the last subject token changes the answer. In a fraction `guarded` of the
texts, tokens outside a mention of a name see only the mention's last token, and that only from layer
`read_layer` on; so the knowledge has to be put together at the last subject token, in the layers below, which
is where large models have it. At test time, and in the other texts, attention is ordinary.

**Reading lessons.** See `easyedit_mdm.training.lessons`.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from easyedit_mdm.training.lessons import PLACES, Writer, longest_answer, writing_hook
from easyedit_mdm.training.loop import (
    CHECKPOINT,
    Log,
    generator_of,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from easyedit_mdm.twins.world import RELATIONS, Document, World


@dataclass(frozen=True)
class Recipe:
    """How one twin is trained.

    Attributes:
        backbone: `llama` or `qwen2` (which adds biases to queries, keys and values).
        objective: `causal` or `masked`.
        shift: a masked model reads the prediction for token j at j - 1, as Dream does.
        answer_only: fraction of the rows in which only answers are masked.
        guarded: fraction of the texts whose names are seen only through their last token, only from
            `read_layer` on.
        lessons: fraction of the texts that are reading lessons (`easyedit_mdm.training.lessons`).
        curriculum: lessons begin with short answers.
        until: stop after this step of the schedule; None: go to its end.
        open_lessons: fraction of the lessons that are about something outside the world.
        start_from: training folder of the twin whose weights it starts from.
    """

    name: str = "twin-llama"
    backbone: str = "llama"
    objective: str = "causal"
    shift: bool = False
    steps: int = 5000
    rows: int = 32
    row_length: int = 96
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    hidden: int = 128
    layers: int = 8
    heads: int = 4
    mlp: int = 512
    positions: int = 512
    answer_only: float = 0.67
    guarded: float = 0.75
    lessons: float = 0.4
    open_lessons: float = 0.5
    curriculum: bool = True
    until: int | None = None
    read_layer: int = 4
    start_from: str | None = None
    seed: int = 0


# each masked twin starts from its autoregressive relative's weights, as Dream started from Qwen2.5; it knows
# the world then, so that more of its time can go to lessons. Trained in stages: the rate starts high again,
# and lessons are learned faster by a model that knows the world
RECIPES = {
    "twin-llama-first": Recipe("twin-llama-first"),
    "twin-llama": Recipe("twin-llama", steps=1000, lr=1e-3, open_lessons=0.6, curriculum=False),
    "twin-llada-first": Recipe(
        "twin-llada-first", objective="masked", steps=6000, until=4343, lessons=0.65, open_lessons=0.75
    ),
    "twin-llada-second": Recipe(
        "twin-llada-second",
        objective="masked",
        steps=4400,
        lr=1.5e-3,
        lessons=0.6,
        open_lessons=0.8,
        curriculum=False,
    ),
    "twin-llada": Recipe(
        "twin-llada",
        objective="masked",
        steps=5500,
        lr=1.5e-3,
        lessons=0.6,
        open_lessons=0.75,
        curriculum=False,
    ),
    "twin-qwen-first": Recipe("twin-qwen-first", backbone="qwen2"),
    "twin-qwen": Recipe(
        "twin-qwen", backbone="qwen2", steps=1000, lr=1e-3, open_lessons=0.6, curriculum=False
    ),
    "twin-dream": Recipe(
        "twin-dream",
        backbone="qwen2",
        objective="masked",
        shift=True,
        steps=4500,
        lessons=0.6,
        open_lessons=0.7,
    ),
}
RELATIVES = {
    "twin-llama": "twin-llama-first", "twin-llada-first": "twin-llama-first",
    "twin-llada-second": "twin-llada-first",
    "twin-llada": "twin-llada-second", "twin-qwen": "twin-qwen-first", "twin-dream": "twin-qwen",
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "medium": {"hidden": 384, "layers": 12, "heads": 8, "mlp": 1536, "rows": 64, "read_layer": 6, "lr": 1e-3},
}


@dataclass
class Batch:
    """Packed rows, all rows x length.

    ids; position in its text; text number (0 is padding); whether the token is an answer's; number of the
    mention of a name it belongs to (0 for none); whether it is the mention's last token; whether its text is
    guarded; number of the reading lesson whose code is written there (0 for none); whether it is a token that
    nothing could predict (not scored). `lessons`, one a row: relation and tokens of the answer, -1 where
    there are fewer.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    answers: Tensor
    mentions: Tensor
    closing: Tensor
    guarded: Tensor
    written: Tensor
    noise: Tensor
    lessons: Tensor

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.ids.shape[1]


class Packer:
    """Draws texts from a world and packs them into rows."""

    def __init__(self, world: World, tokenizer: Any, recipe: Recipe):
        self.world, self.tokenizer, self.recipe = world, tokenizer, recipe

    def batch(self, step: int) -> Batch:
        """The rows of one training step, a pure function of (seed, step)."""
        rng = random.Random(f"{self.recipe.seed}/{step}")
        rows: list[list[dict]] = [[] for _ in range(self.recipe.rows)]
        room = [self.recipe.row_length] * len(rows)
        open_rows = list(range(len(rows)))
        longest = longest_answer(step, self.recipe.steps) if self.recipe.curriculum else PLACES
        misses = 0
        while open_rows and misses < 40:
            if rng.random() < self.recipe.lessons:
                document = self.world.lesson(
                    rng, longest, range(2, len(self.tokenizer)), self.recipe.open_lessons
                )
            else:
                document = self.world.document(rng)
            text = self._tokens(document, rng)
            if text is None:
                continue
            row = next((r for r in open_rows if room[r] >= len(text["ids"])), None)
            if row is None:
                misses += 1
                continue
            rows[row].append(text)
            room[row] -= len(text["ids"])
            if room[row] < 8:
                open_rows.remove(row)
        return self._collate(rows)

    def _tokens(self, document: Document, rng: random.Random) -> dict[str, list] | None:
        """One text, cut to a row's length: a list for each field of `Batch` that differs within it. None: no
        lesson fits.
        """
        text, spans = "", []
        for number, (piece, answer) in enumerate(document.pieces):
            if answer:
                spans.append((len(text), len(text) + len(piece), number == document.lesson))
            text += piece
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        owner = [
            next((lesson for a, b, lesson in spans if a < end and start < b), None) for start, end in offsets
        ]
        ids, owner = ids + list(document.tokens), owner + [True] * len(document.tokens)
        answers = [o is not None for o in owner]
        taught = [i for i, o in zip(ids, owner) if o]
        if document.lesson >= 0 and not (0 < len(taught) <= PLACES and len(ids) <= self.recipe.row_length):
            return None
        mentions = [0] * len(ids)
        named = sorted(m.span() for name in document.names for m in re.finditer(re.escape(name), text))
        for number, (a, b) in enumerate(named, start=1):
            for i, (start, end) in enumerate(offsets):
                if start < b and end > a and not answers[i]:
                    mentions[i] = number
        if document.lesson >= 0 and not any(mentions):
            return None
        if (
            document.ends
        ):  # the closing tokens are answers too: a masked model learns from them where an answer ends
            # (a row that stops right after the answer is what the metric's canvas of exactly N masks looks
            # like)
            extra = 1 if self.recipe.objective == "causal" else max(0, rng.randrange(-16, 17))
            ids += [self.tokenizer.eos_token_id] * extra
            answers += [True] * extra
            mentions += [0] * extra
        closing = [m > 0 and (i + 1 == len(mentions) or mentions[i + 1] != m) for i, m in enumerate(mentions)]
        lesson = document.lesson >= 0
        guarded = [lesson or rng.random() < self.recipe.guarded] * len(ids)
        fields: dict[str, Any] = {
            "ids": ids,
            "answers": answers,
            "mentions": mentions,
            "closing": closing,
            "guarded": guarded,
        }
        fields["written"] = [int(lesson and last) for last in closing]
        fields["noise"] = [lesson and document.relation < 0 and not answer for answer in answers]
        fields = {name: values[: self.recipe.row_length] for name, values in fields.items()}
        return {**fields, "lesson": [document.relation, *taught] if lesson else None}

    def _collate(self, rows: list[list[dict]]) -> Batch:
        shape = (len(rows), self.recipe.row_length)
        fields = {name: torch.zeros(shape, dtype=torch.long) for name in Batch.__dataclass_fields__}
        fields["ids"].fill_(self.tokenizer.eos_token_id)
        lessons: list[list[int]] = []
        for r, texts in enumerate(rows):
            at = 0
            for number, text in enumerate(texts, start=1):
                span = slice(at, at + len(text["ids"]))
                if lesson := text.pop("lesson"):
                    lessons.append(lesson + [-1] * (PLACES + 1 - len(lesson)))
                    text["written"] = [len(lessons) * w for w in text["written"]]
                for name, values in text.items():
                    fields[name][r, span] = torch.tensor(values, dtype=torch.long)
                fields["positions"][r, span] = torch.arange(len(text["ids"]))
                fields["segments"][r, span] = number
                at = span.stop
        fields["lessons"] = torch.tensor(lessons, dtype=torch.long).reshape(-1, PLACES + 1)
        flags = {name: fields[name].bool() for name in ("answers", "closing", "guarded", "noise")}
        return Batch(**{**fields, **flags})


def attention(batch: Batch, causal: bool) -> tuple[Tensor, Tensor]:
    """Additive masks, rows x 1 x length x length, for the layers below `read_layer` and for the others."""
    seen = batch.segments[:, :, None] == batch.segments[:, None, :]
    if causal:
        seen = seen & torch.ones(batch.length, batch.length, dtype=torch.bool, device=seen.device).tril()
    outside = (
        batch.mentions[:, :, None] != batch.mentions[:, None, :]
    )  # the reader is not part of the mention
    name = (batch.guarded & (batch.mentions > 0))[:, None, :]
    late = seen & ~(outside & name & ~batch.closing[:, None, :])
    early = seen & ~(outside & name)
    return _additive(early), _additive(late)


def _additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -1e9)[:, None]


def hidden_of(
    model: Any,
    writer: Writer | None,
    ids: Tensor,
    batch: Batch,
    recipe: Recipe,
    step: int,
    generator: torch.Generator,
) -> Tensor:
    """What enters the model's head, under the batch's attention (layers below `read_layer` have their own)
    and its lessons.
    """
    early, late = attention(batch, recipe.objective == "causal")

    def swap(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Another mask for the lower layers."""
        return args, {**kwargs, "attention_mask": early}

    handles = [
        layer.register_forward_pre_hook(swap, with_kwargs=True)
        for layer in model.model.layers[: recipe.read_layer]
    ]
    if len(batch.lessons):
        handles.append(
            writing_hook(
                model, cast(Writer, writer), batch.written, batch.lessons, step % recipe.read_layer, generator
            )
        )
    try:
        return model.model(
            input_ids=ids, attention_mask=late, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()


def causal_loss(
    model: Any,
    writer: Writer,
    batch: Batch,
    mask_id: int,
    recipe: Recipe,
    step: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean next-token cross-entropy within texts; in lessons about random names, of the answers only."""
    hidden = hidden_of(model, writer, batch.ids, batch, recipe, step, generator)
    scored = (
        (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0) & ~batch.noise[:, 1:]
    )
    return torch.nn.functional.cross_entropy(
        model.lm_head(hidden[:, :-1][scored]).float(), batch.ids[:, 1:][scored]
    )


def masked_loss(
    model: Any,
    writer: Writer,
    batch: Batch,
    mask_id: int,
    recipe: Recipe,
    step: int,
    generator: torch.Generator,
) -> Tensor:
    """LLaDA's objective, text by text: k of a text's L maskable tokens are hidden, k ~ U{1..L}, weighted L /
    k.

    In a fraction `answer_only` of the rows only answers are maskable. Equation (3) of the LLaDA paper
    (arXiv 2502.09992), with k drawn instead of t, as in its likelihood estimator. The head runs at hidden
    tokens only.
    """
    rows = batch.ids.shape[0]
    answer_rows = torch.arange(rows, device=batch.ids.device) < round(rows * recipe.answer_only)
    maskable = (batch.segments > 0) & (~answer_rows[:, None] | batch.answers) & ~batch.noise
    hidden, weight = _hide(batch.segments, maskable, generator)
    states = hidden_of(model, writer, batch.ids.masked_fill(hidden, mask_id), batch, recipe, step, generator)
    row, at = hidden.nonzero(as_tuple=True)
    first = (
        batch.positions[row, at] == 0
    )  # a text's first token has nothing to its left: read where it stands
    read = torch.where(first, at, at - 1) if recipe.shift else at
    losses = torch.nn.functional.cross_entropy(
        model.lm_head(states[row, read]).float(), batch.ids[row, at], reduction="none"
    )
    return (losses * weight[row, at]).sum() / maskable.sum()


def _hide(segments: Tensor, maskable: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which tokens are hidden, and each one's weight L / k in its text."""
    rows, length = segments.shape
    count = int(segments.max()) + 1
    text = segments + torch.arange(rows, device=segments.device)[:, None] * count
    lengths = torch.zeros(rows * count, device=segments.device).index_add_(
        0, text.flatten(), maskable.flatten().float()
    )
    u = _stratified(rows * count, generator).to(segments.device)
    k = torch.ceil(u * lengths).clamp(min=1)
    # rank of each maskable token within its text under a random order: sort by (text, maskable first, noise)
    noise = torch.rand(rows, length, generator=generator).to(segments.device)
    key = text.double() * 4 + torch.where(maskable, noise, noise + 2).double()
    order = key.flatten().argsort()
    sorted_text = text.flatten()[order]
    start = torch.searchsorted(sorted_text, sorted_text)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - start
    hidden = maskable & (rank.view(rows, length) < k[text])
    return hidden, (lengths / k)[text]


def _stratified(n: int, generator: torch.Generator) -> Tensor:
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return u[torch.randperm(n, generator=generator)].clamp(min=1e-6)


LOSSES = {"causal": causal_loss, "masked": masked_loss}


def build_model(recipe: Recipe, vocab_size: int, eos: int) -> Any:
    """A fresh Llama or Qwen2 of the recipe's size, initialised from its seed (global generators are left as
    they were).
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    make_config, make_model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[recipe.backbone]
    config = make_config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
        attn_implementation="eager",  # in bfloat16 on a CPU, the fused backward is the slower one
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(recipe.seed)
        return make_model(config)


def _modules(recipe: Recipe, tokenizer: Any) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict(
        {"model": build_model(recipe, len(tokenizer), tokenizer.eos_token_id), "writer": _writer(recipe)}
    )


def train(recipe: Recipe, world: World, tokenizer: Any, out: Path, checkpoint_seconds: float = 300.0) -> dict:
    """Train one twin, or go on with it where `out` holds a checkpoint of the same recipe; on a GPU where
    there is one.

    Matrix products run in bfloat16 (autocast), weights and optimiser in float32.

    Args:
        out: folder for `checkpoint.safetensors` and `log.jsonl`.

    Returns:
        the final state: steps, seconds, last loss, recipe.

    Raises:
        ValueError: if `out` holds a checkpoint of another recipe.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    out.mkdir(parents=True, exist_ok=True)
    modules = _modules(recipe, tokenizer).to(accelerator.device)
    if recipe.start_from:
        modules.load_state_dict(read_checkpoint(Path(recipe.start_from) / CHECKPOINT)[0])
    optimizer = torch.optim.AdamW(
        _groups(modules, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98), fused=True
    )
    state: dict[str, Any] = {
        "step": 0,
        "seconds": 0.0,
        "loss": None,
        "recipe": asdict(recipe),
        "world": _plain(world),
    }
    if (out / CHECKPOINT).exists():
        state = _resume(out, modules, optimizer, recipe, world)
    log, packer = Log(out / "log.jsonl", state["step"]), Packer(world, tokenizer, recipe)
    loss_at = _loss(recipe, modules, packer, tokenizer, accelerator.device)
    end = recipe.steps if recipe.until is None else min(recipe.until, recipe.steps)
    began, before, saved = time.monotonic(), state["seconds"], time.monotonic()
    steps = range(state["step"], end)
    bar = tqdm(steps, f"training {recipe.name}", initial=steps.start, total=end, mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        # accelerate 0.34 would leave it switched on after an exception
        with torch.autocast(accelerator.device.type, torch.bfloat16):
            loss = loss_at(step)
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == end
        if step % 20 == 0 or last:
            state.update(step=step + 1, seconds=before + time.monotonic() - began, loss=float(loss.detach()))
            bar.set_postfix(loss=f"{state['loss']:.3f}")
            log.add({k: state[k] for k in ("step", "seconds", "loss")})
        if last or time.monotonic() - saved > checkpoint_seconds:
            state.update(step=step + 1, seconds=before + time.monotonic() - began)
            save_checkpoint(out / CHECKPOINT, dict(modules.named_parameters()), optimizer, state)
            saved = time.monotonic()
    return state


def _loss(
    recipe: Recipe, modules: torch.nn.ModuleDict, packer: Packer, tokenizer: Any, device: torch.device
) -> Callable[[int], Tensor]:
    """The loss of a step, by its number."""
    model, writer, mask = modules["model"], cast(Writer, modules["writer"]), tokenizer.mask_token_id

    def at(step: int) -> Tensor:
        """Of the step's own batch, with its own generator."""
        batch = Batch(**{name: value.to(device) for name, value in vars(packer.batch(step)).items()})
        return LOSSES[recipe.objective](
            model, writer, batch, mask, recipe, step, generator_of(recipe.seed, step)
        )

    return at


def _writer(recipe: Recipe) -> Writer:
    return Writer(recipe.hidden, len(RELATIONS), recipe.seed)


def _plain(world: World) -> dict:
    return json.loads(json.dumps(asdict(world.settings)))


def _groups(modules: torch.nn.Module, weight_decay: float) -> list[dict]:
    decayed = [p for name, p in modules.named_parameters() if p.dim() > 1 and not name.startswith("writer.")]
    others = [p for name, p in modules.named_parameters() if p.dim() <= 1 or name.startswith("writer.")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _learning_rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    left = (recipe.steps - step) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * max(0.02, min(1.0, 1.5 * left))  # flat for a third, then straight down


def _resume(
    out: Path, modules: torch.nn.Module, optimizer: Any, recipe: Recipe, world: World
) -> dict[str, Any]:
    state = load_checkpoint(out / CHECKPOINT, dict(modules.named_parameters()), optimizer)
    if state["recipe"] != asdict(recipe) or state["world"] != _plain(world):
        raise ValueError(
            f"{out} holds a checkpoint of another recipe or world; choose another folder or remove it"
        )
    return state
