"""The rows of every step, drawn here or ahead of time in other processes: the same rows either way."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator

import torch

from easyedit_mdm.training.blocks import Noised, Rows, noise_opened, opening, pack
from easyedit_mdm.training.corpus import Corpus
from easyedit_mdm.training.loop import random_of
from easyedit_mdm.training.recipe import Recipe

AHEAD = 4  # steps that each process draws ahead


class Drawn(torch.utils.data.Dataset):
    """Rows by step. They depend on the recipe, the plan and the step alone.

    How far attention is open follows from the share of the training that is done; a step's share is reckoned
    from the first step's tokens, so that it is known ahead of time.

    Args:
        planned: tokens of the whole training; None: not known yet, nothing counts as done.
    """

    def __init__(self, corpus: Corpus, recipe: Recipe, mask_id: int, planned: int | None):
        self.corpus, self.recipe, self.mask_id = corpus, recipe, mask_id
        self.share = 0.0  # of the training, a step
        if planned:
            first = self[0]
            self.share = int(((first.texts > 0) & (first.blocks == 0)).sum()) / planned

    def __getitem__(self, step: int) -> Rows:
        rng, recipe = random_of(self.recipe.seed, step), self.recipe
        if recipe.attention == "causal":
            return pack(
                lambda: Noised(self.corpus.draw(rng).ids, []), recipe.rows, recipe.length, self.mask_id
            )
        opened = opening(min(1.0, step * self.share), recipe.attention, recipe.block_size)
        return pack(
            lambda: noise_opened(self.corpus.draw(rng), opened, rng), recipe.rows, recipe.length, self.mask_id
        )


def fed(drawn: Drawn, first: int, workers: int = 0) -> Iterator[Rows]:
    """The rows of step `first`, and of all that follow.

    Args:
        workers: processes that draw them ahead; 0: each is drawn when it is asked for.
    """
    if not workers:
        return (drawn[step] for step in itertools.count(first))
    # a fork shares the corpus, which another start would copy to every process
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return iter(
        torch.utils.data.DataLoader(
            drawn,
            batch_size=None,
            sampler=itertools.count(first),
            num_workers=workers,
            prefetch_factor=AHEAD,
            multiprocessing_context=start,
        )
    )
