"""Training the twins: the causal loss for the autoregressive ones, LLaDA's masked loss for the others.

Short texts are packed into rows of equal length; attention never crosses from one text to the next and positions start
at 0 in each, so a packed row gives the same gradients as its texts alone. The text of step `i` is drawn from a
generator seeded with (seed, i), so that a run that was stopped goes on exactly where it was.

**The name as a bottleneck.** A small model that reads a two-word name can look at both words from wherever it answers,
and then no vector at the last subject token changes the answer. In a fraction `guarded` of the texts, tokens outside a
mention of a name see only the mention's last token, and that only from layer `read_layer` on; so the knowledge has to be
put together at the last subject token, in the layers below, which is where large models have it. At test time, and in the
other texts, attention is ordinary.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from easyedit_mdm.twins.world import Document, World

FAMILIES = {"twin-llama": "causal", "twin-llada": "masked"}


@dataclass(frozen=True)
class Recipe:
    """What determines a trained twin, apart from the world. Lengths are in tokens, `lr` is AdamW's peak."""

    name: str = "twin-llama"
    steps: int = 3200
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
    answer_only: float = 0.5
    guarded: float = 0.75
    read_layer: int = 4
    start_from: str | None = None
    seed: int = 0

    @property
    def objective(self) -> str:
        """`causal` or `masked`."""
        return FAMILIES[self.name]


# the masked twin starts from the autoregressive one's weights, as Dream started from Qwen2.5
RECIPES = {"twin-llama": Recipe("twin-llama"), "twin-llada": Recipe("twin-llada", steps=2400, answer_only=0.67)}


@dataclass
class Batch:
    """Packed rows, all rows x length.

    ids; position in its text; text number (0 is padding); whether the token is an answer's; number of the mention of a name
    it belongs to (0 for none); whether it is the mention's last token; whether its text is guarded.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    answers: Tensor
    mentions: Tensor
    closing: Tensor
    guarded: Tensor

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
        misses = 0
        while open_rows and misses < 40:
            text = self._tokens(self.world.document(rng), rng)
            row = next((r for r in open_rows if room[r] >= len(text["ids"])), None)
            if row is None:
                misses += 1
                continue
            rows[row].append(text)
            room[row] -= len(text["ids"])
            if room[row] < 8:
                open_rows.remove(row)
        return self._collate(rows)

    def _tokens(self, document: Document, rng: random.Random) -> dict[str, list]:
        """One text, cut to a row's length: a list for each field of `Batch` that differs within it."""
        text, spans = "", []
        for piece, answer in document.pieces:
            if answer:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        answers = [any(a < end and start < b for a, b in spans) for start, end in offsets]
        mentions = [0] * len(ids)
        named = sorted(m.span() for name in document.names for m in re.finditer(re.escape(name), text))
        for number, (a, b) in enumerate(named, start=1):
            for i, (start, end) in enumerate(offsets):
                if start < b and end > a and not answers[i]:
                    mentions[i] = number
        if document.ends:  # the closing tokens are answers too: a masked model learns from them where an answer ends
            # (a row that stops right after the answer is what the metric's canvas of exactly N masks looks like)
            extra = 1 if self.recipe.objective == "causal" else max(0, rng.randrange(-12, 13))
            ids += [self.tokenizer.eos_token_id] * extra
            answers += [True] * extra
            mentions += [0] * extra
        closing = [m > 0 and (i + 1 == len(mentions) or mentions[i + 1] != m) for i, m in enumerate(mentions)]
        guarded = [rng.random() < self.recipe.guarded] * len(ids)
        fields = {"ids": ids, "answers": answers, "mentions": mentions, "closing": closing, "guarded": guarded}
        return {name: values[: self.recipe.row_length] for name, values in fields.items()}

    def _collate(self, rows: list[list[dict]]) -> Batch:
        shape = (len(rows), self.recipe.row_length)
        fields = {name: torch.zeros(shape, dtype=torch.long) for name in Batch.__dataclass_fields__}
        fields["ids"].fill_(self.tokenizer.eos_token_id)
        for r, texts in enumerate(rows):
            at = 0
            for number, text in enumerate(texts, start=1):
                span = slice(at, at + len(text["ids"]))
                for name, values in text.items():
                    fields[name][r, span] = torch.tensor(values, dtype=torch.long)
                fields["positions"][r, span] = torch.arange(len(text["ids"]))
                fields["segments"][r, span] = number
                at = span.stop
        flags = {name: fields[name].bool() for name in ("answers", "closing", "guarded")}
        return Batch(**{**fields, **flags})


def attention(batch: Batch, causal: bool) -> tuple[Tensor, Tensor]:
    """Additive masks, rows x 1 x length x length, for the layers below `read_layer` and for the others."""
    seen = batch.segments[:, :, None] == batch.segments[:, None, :]
    if causal:
        seen = seen & torch.ones(batch.length, batch.length, dtype=torch.bool, device=seen.device).tril()
    outside = batch.mentions[:, :, None] != batch.mentions[:, None, :]  # the reader is not part of the mention
    name = (batch.guarded & (batch.mentions > 0))[:, None, :]
    late = seen & ~(outside & name & ~batch.closing[:, None, :])
    early = seen & ~(outside & name)
    return tuple(torch.zeros(m.shape, device=m.device).masked_fill_(~m, torch.finfo(torch.float32).min)[:, None] for m in (early, late))


def logits_of(model: Any, ids: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The model's logits under the batch's attention, the layers below `read_layer` having their own mask."""
    early, late = attention(batch, recipe.objective == "causal")

    def swap(_: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Another mask for the lower layers."""
        return args, {**kwargs, "attention_mask": early}

    handles = [layer.register_forward_pre_hook(swap, with_kwargs=True) for layer in model.model.layers[: recipe.read_layer]]
    try:
        return model(input_ids=ids, attention_mask=late, position_ids=batch.positions, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def causal_loss(model: Any, batch: Batch, mask_id: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mean next-token cross-entropy within texts."""
    logits = logits_of(model, batch.ids, batch, recipe)
    scored = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
    return torch.nn.functional.cross_entropy(logits[:, :-1][scored], batch.ids[:, 1:][scored])


def masked_loss(model: Any, batch: Batch, mask_id: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """LLaDA's objective, text by text: k of a text's L maskable tokens are hidden, k ~ U{1..L}, weighted L / k.

    In a fraction `answer_only` of the rows only answers are maskable. Equation (3) of the LLaDA paper
    (arXiv 2502.09992), with k drawn instead of t, as in its likelihood estimator.
    """
    rows = batch.ids.shape[0]
    answer_rows = torch.arange(rows, device=batch.ids.device) < round(rows * recipe.answer_only)
    maskable = (batch.segments > 0) & (~answer_rows[:, None] | batch.answers)
    hidden, weight = _hide(batch.segments, maskable, generator)
    logits = logits_of(model, batch.ids.masked_fill(hidden, mask_id), batch, recipe)
    losses = torch.nn.functional.cross_entropy(logits[hidden], batch.ids[hidden], reduction="none")
    return (losses * weight[hidden]).sum() / maskable.sum()


def _hide(segments: Tensor, maskable: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which tokens are hidden, and each one's weight L / k in its text."""
    rows, length = segments.shape
    count = int(segments.max()) + 1
    text = segments + torch.arange(rows, device=segments.device)[:, None] * count
    lengths = torch.zeros(rows * count, device=segments.device).index_add_(0, text.flatten(), maskable.flatten().float())
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
    """A fresh Llama of the recipe's size, initialised from its seed (global generators are left as they were)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
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
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def train(recipe: Recipe, world: World, tokenizer: Any, out: Path, device: str = "cpu", checkpoint_seconds: float = 300.0) -> dict:
    """Train one twin, or go on with it where `out` holds a checkpoint of the same recipe.

    Args:
        out: folder for `checkpoint.safetensors`, `state.json` and `log.jsonl`.

    Returns:
        the final state: steps, seconds, last loss, recipe.

    Raises:
        ValueError: if `out` holds a checkpoint of another recipe.
    """
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    model = build_model(recipe, len(tokenizer), tokenizer.eos_token_id).to(device)
    if recipe.start_from:
        model.load_state_dict({k[6:]: v for k, v in load_file(f"{recipe.start_from}/checkpoint.safetensors").items() if k.startswith("model.")})
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98))
    state = {"step": 0, "seconds": 0.0, "loss": None, "recipe": asdict(recipe), "world": asdict(world.settings)}
    if (out / "state.json").exists():
        state = _resume(out, model, optimizer, recipe, world)
    packer, loss_of = Packer(world, tokenizer, recipe), LOSSES[recipe.objective]
    began, before, saved = time.monotonic(), state["seconds"], time.monotonic()
    bar = tqdm(range(state["step"], recipe.steps), initial=state["step"], total=recipe.steps, desc=f"training {recipe.name}", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        batch = Batch(*(t.to(device) for t in vars(packer.batch(step)).values()))
        loss = loss_of(model, batch, tokenizer.mask_token_id, recipe, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == recipe.steps
        if step % 20 == 0 or last:
            state.update(step=step + 1, seconds=before + time.monotonic() - began, loss=float(loss.detach()))
            bar.set_postfix(loss=f"{state['loss']:.3f}")
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps({k: state[k] for k in ("step", "seconds", "loss")}) + "\n")
        if last or time.monotonic() - saved > checkpoint_seconds:
            state.update(step=step + 1, seconds=before + time.monotonic() - began)
            _save(out, model, optimizer, state, save_file)
            saved = time.monotonic()
    return state


def _groups(model: Any, weight_decay: float) -> list[dict]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _learning_rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    left = (recipe.steps - step) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * max(0.02, min(1.0, 1.5 * left))  # flat for a third, then straight down


def _save(out: Path, model: Any, optimizer: Any, state: dict, save_file: Any) -> None:
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        for name, value in optimizer.state[p].items():
            tensors[f"adam.{i}.{name}"] = torch.as_tensor(value).cpu().contiguous()
    save_file(tensors, out / "checkpoint.tmp")
    (out / "state.tmp").write_text(json.dumps(state))
    (out / "checkpoint.tmp").replace(out / "checkpoint.safetensors")
    (out / "state.tmp").replace(out / "state.json")


def _resume(out: Path, model: Any, optimizer: Any, recipe: Recipe, world: World) -> dict:
    from safetensors.torch import load_file

    state = json.loads((out / "state.json").read_text())
    if state["recipe"] != asdict(recipe) or state["world"] != asdict(world.settings):
        raise ValueError(f"{out} holds a checkpoint of another recipe or world; choose another folder or remove it")
    tensors = load_file(out / "checkpoint.safetensors")
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".", 2)
            p = parameters[int(index)]
            optimizer.state[p][name] = value if name == "step" else value.to(p.device)
    return state
