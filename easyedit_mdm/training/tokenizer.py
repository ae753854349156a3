"""The twins' tokenizer: byte-level BPE, trained so that every word of the world is one token in context."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from easyedit_mdm.twins.text import COMMON, KINDS, NAMES, open_vocabulary
from easyedit_mdm.twins.world import OCCUPATIONS, RELATIONS, World

EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"


def train_tokenizer(world: World, vocab_size: int = 2048) -> Any:
    """Train the tokenizer on a world's words and on open text.

    Returns:
        a `transformers.PreTrainedTokenizerFast` whose eos and pad token is `EOS` and whose mask token is
        `MASK`.

    Raises:
        ValueError: if a word of the world is not one token with a space before it (raise `vocab_size`).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(world), trainer)
    split = [w for w in world.words if len(tokenizer.encode(" " + w).ids) != 1]
    if split:
        raise ValueError(
            f"vocab_size {vocab_size} splits {len(split)} of the world's words, such as {split[0]!r};"
            " raise it"
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK)
    fast.model_input_names = ["input_ids", "attention_mask"]
    return fast


def _corpus(world: World) -> Iterator[str]:
    rng = random.Random(world.settings.seed + 1)
    for word in world.words:  # a word on its own, and often: it must end up whole, with the space and without
        yield from [" " + word] * 400
        yield from [word] * 120
    for relation in RELATIONS:
        yield from [p.format(s="x") for p in relation.phrasings + relation.held_out] * 60
    for word in (*OCCUPATIONS, *KINDS, *COMMON):
        yield from [" " + word] * 60
        yield from [" " + word.capitalize()] * 20
    for word in NAMES:
        yield from [" " + word] * 60
    for _ in range(6000):
        yield "".join(piece for piece, _ in open_vocabulary(rng)[0])
