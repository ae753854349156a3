"""Collecting second moments: several layers in one pass, resumable, until enough tokens are seen or the
estimate has settled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm

from easyedit_mdm.common.files import check_size, opened_tensors, write_tensors
from easyedit_mdm.common.locks import PAUSE
from easyedit_mdm.common.ranks import ALONE, Ranks
from easyedit_mdm.errors import StatisticsError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.hooks import reading_input
from easyedit_mdm.statistics.moments import SecondMoments
from easyedit_mdm.statistics.texts import TextSource

CONTEXT_LENGTH = 128
TOKENS_PER_DIMENSION = 10
BATCH_ROWS = 8


@dataclass(frozen=True)
class CollectConfig:
    """How second moments are collected.

    Attributes:
        tokens: keys to collect, of each site.
        context_length: tokens a row.
        mask_ratio: 0: the text as it is. A number in (0, 1): each token is masked with that probability.
            `uniform`: with a probability t ~ U(0, 1) drawn for each row, as in the models' training. Keys are
            taken at unmasked positions only.
        settled: stop before `tokens` once the moments of the even and of the odd batches differ, in every
            site, by less than this fraction: ||C_even - C_odd||_F / ||C_even + C_odd||_F. None: collect all
            tokens.
        seed: of the masks.
    """

    tokens: int
    context_length: int = CONTEXT_LENGTH
    mask_ratio: int | float | str = 0
    settled: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ratio = self.mask_ratio
        if not (
            ratio == "uniform"
            or (isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 <= ratio < 1)
        ):
            raise StatisticsError(f"mom2_mask_ratio={ratio!r} must be 0, 'uniform', or a number below 1")
        if self.tokens < 1 or self.context_length < 1:
            raise StatisticsError(
                f"{self.tokens} tokens in rows of {self.context_length}: both must be at least 1"
            )
        if self.settled is not None and not 0 < self.settled < 1:
            raise StatisticsError(f"settled={self.settled} must lie between 0 and 1")


@dataclass
class _Sums:
    """What has been added up so far: two sums a site (even and odd batches), rows read and keys seen."""

    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: int = 0
    keys: int = 0
    batches: int = 0

    def add(self, site: str, keys: Tensor) -> None:
        """Add k k^T of some keys to the sum of this batch's parity."""
        if site not in self.sums:
            self.sums[site] = [
                torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64, device=keys.device)
                for _ in range(2)
            ]
        halves = self.sums[site] = [
            half.to(keys.device) for half in self.sums[site]
        ]  # a checkpoint's come from the disk
        halves[self.batches % 2].addmm_(keys.T, keys)

    def join(self, other: _Sums) -> None:
        """Add another process's sums; it has counted the same rows and keys."""
        for name, halves in other.sums.items():
            self.sums[name] = [a.cpu() + b for a, b in zip(self.sums[name], halves)]

    def difference(self) -> float:
        """The largest relative difference between the two halves, over sites."""
        if self.batches < 2:
            return float("inf")
        even = (
            (self.batches + 1) // 2 / self.batches
        )  # shares of the batches, for halves that are one batch apart
        return max(
            float((a / even - b / (1 - even)).norm() / (a / even + b / (1 - even)).norm())
            for a, b in self.sums.values()
        )


def token_rows(adapter: Adapter, source: TextSource, length: int) -> Iterator[Int[Tensor, " length"]]:
    """The documents' tokens one after another, cut into rows; the last row may be shorter."""
    held: list[int] = []
    for document in source.documents():
        held += adapter.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        while len(held) >= length:
            yield torch.tensor(held[:length])
            held = held[length:]
    if held:
        yield torch.tensor(held)


@torch.no_grad()
def collect(
    adapter: Adapter,
    sites: Sequence[Site],
    source: TextSource,
    config: CollectConfig,
    checkpoint: Path | None = None,
    every: float = 60.0,
    ranks: Ranks = ALONE,
) -> dict[str, SecondMoments]:
    """Second moments of the keys at `sites`, by module name, in one pass over the text.

    Args:
        checkpoint: file that holds the sums of an unfinished run: a run that finds it goes on there; written
            every `every` seconds and removed by whoever stores the result.
        ranks: with several processes each adds up every `world`-th batch, and leaves its sums in a file
            beside `checkpoint` (`part_of`). The first waits for them and adds them together; the others
            return nothing. The sums are float64: the result differs from one process's by rounding alone.

    Raises:
        StatisticsError: if the text is shorter than `config.tokens`, or text is to be masked for a model
            without masks; if several processes are to stop where the estimate has settled.
    """
    if config.mask_ratio != 0 and not adapter.masked:
        raise StatisticsError(
            f"mom2_mask_ratio={config.mask_ratio!r}: {adapter.name} ({adapter.spec.paradigm}) has no mask to"
            " put into a text; use 0"
        )
    if ranks.world > 1 and (config.settled is not None or checkpoint is None):
        raise StatisticsError(
            f"settled={config.settled}: it is judged on all batches, and each of {ranks.world} processes sees"
            " a part of them: leave it out, or run one process"
        )
    part = None if checkpoint is None else part_of(checkpoint, ranks)
    sums = _load(part, sites) if part is not None and part.exists() else _Sums()
    rows = token_rows(adapter, source, min(config.context_length, adapter.max_positions))
    next(itertools.islice(rows, sums.rows, sums.rows), None)  # what was read before the interruption
    saved = time.monotonic()
    with tqdm(
        total=config.tokens, initial=sums.keys, desc=f"statistics, {len(sites)} layers", unit="tok", delay=2
    ) as bar:
        while sums.keys < config.tokens and (batch := list(itertools.islice(rows, BATCH_ROWS))):
            before = sums.keys
            _add_batch(adapter, sites, batch, config, sums, sums.batches % ranks.world == ranks.rank)
            bar.update(sums.keys - before)
            if config.settled is not None and sums.difference() < config.settled:
                break
            if part is not None and time.monotonic() - saved > every:
                _save(part, sums)
                saved = time.monotonic()
    if sums.keys < config.tokens and not (config.settled is not None and sums.difference() < config.settled):
        raise StatisticsError(
            f"{source.name} gives {sums.keys} tokens, {config.tokens} are wanted: give a longer text or lower"
            " mom2_n_tokens"
        )
    if ranks.world > 1 and checkpoint is not None:
        for site in sites:  # a process may have had no batch at all
            sums.sums.setdefault(site.name, _nothing(adapter, site))
        _save(part_of(checkpoint, ranks), sums, done=True)
        if not ranks.first:
            return {}
        for rank in range(1, ranks.world):
            sums.join(_finished(part_of(checkpoint, Ranks(rank, ranks.world)), sites))
    return {site: SecondMoments(((a + b) / sums.keys).cpu(), sums.keys) for site, (a, b) in sums.sums.items()}


def part_of(checkpoint: Path, ranks: Ranks) -> Path:
    """The file of one process's sums; with one process, `checkpoint` itself."""
    if ranks.world == 1:
        return checkpoint
    return checkpoint.with_name(f"{checkpoint.stem}-{ranks.rank}of{ranks.world}{checkpoint.suffix}")


def _nothing(adapter: Adapter, site: Site) -> list[Tensor]:
    inner = key_width(adapter, site)
    return [torch.zeros(inner, inner, dtype=torch.float64) for _ in range(2)]


def key_width(adapter: Adapter, site: Site) -> int:
    """The number of dimensions of a site's keys."""
    weight = adapter.weight_of(site.name)
    return weight.shape[0] if site.transposed else weight.shape[1]


def _finished(file: Path, sites: Sequence[Site]) -> _Sums:
    """Another process's sums, once it has all of them."""
    announced = False
    while not (file.exists() and _is_done(file)):
        if not announced:
            logging.getLogger(__name__).warning("waiting for the process that writes %s", file)
        announced = True
        time.sleep(PAUSE)
    return _load(file, sites)


def _is_done(file: Path) -> bool:
    with opened_tensors(file, StatisticsError, "the checkpoint of an unfinished collection") as stored:
        return bool(json.loads(stored.metadata()["progress"]).get("done"))


def _add_batch(
    adapter: Adapter,
    sites: Sequence[Site],
    batch: list[Tensor],
    config: CollectConfig,
    sums: _Sums,
    mine: bool,
) -> None:
    """Count a batch, and add up its keys if it is this process's."""
    masked = [_masked(row, sums.rows + i, config) for i, row in enumerate(batch)]
    keys = min(sum(int((~hidden).sum()) for hidden in masked), config.tokens - sums.keys)
    if mine:
        _add_keys(adapter, sites, batch, masked, keys, sums)
    sums.rows, sums.keys, sums.batches = sums.rows + len(batch), sums.keys + keys, sums.batches + 1


def _add_keys(
    adapter: Adapter,
    sites: Sequence[Site],
    batch: list[Tensor],
    masked: list[Tensor],
    count: int,
    sums: _Sums,
) -> None:
    shown = [adapter.hidden.around(row, ~hidden) for row, hidden in zip(batch, masked)]
    ids, mask = right_padded(shown, adapter.ids.pad, adapter.device)
    keep, _ = right_padded([(~hidden).long() for hidden in masked], 0, adapter.device)
    index = keep.flatten().nonzero()[:count, 0]
    stack = _reading(adapter, sites)
    with stack as seen:
        adapter.hidden_before(max(site.layer for site in sites) + 1, ids, mask)
    for site in sites:
        flat = seen[site.name][0].flatten(0, 1)
        sums.add(site.name, flat[index.to(flat.device)].double())


class _reading:
    """The inputs of several modules at once."""

    def __init__(self, adapter: Adapter, sites: Sequence[Site]):
        self.readers = {site.name: reading_input(adapter.module(site.name)) for site in sites}

    def __enter__(self) -> dict[str, list[Tensor]]:
        return {name: reader.__enter__() for name, reader in self.readers.items()}

    def __exit__(self, *error: object) -> None:
        for reader in self.readers.values():
            reader.__exit__(None, None, None)


def _masked(row: Int[Tensor, " length"], number: int, config: CollectConfig) -> Bool[Tensor, " length"]:
    """Which tokens of a row are masked: a function of seed and row number, so that a resumed run draws the
    same.
    """
    if config.mask_ratio == 0:
        return torch.zeros(len(row), dtype=torch.bool)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
    ratio = (
        torch.rand((), generator=generator)
        if config.mask_ratio == "uniform"
        else torch.tensor(config.mask_ratio)
    )
    return torch.rand(len(row), generator=generator) < ratio


def _save(file: Path, sums: _Sums, done: bool = False) -> None:
    tensors = {
        f"{name}|{half}": value.cpu()
        for name, halves in sums.sums.items()
        for half, value in enumerate(halves)
    }
    write_tensors(
        file,
        tensors,
        {
            "progress": json.dumps(
                {"rows": sums.rows, "keys": sums.keys, "batches": sums.batches, "done": done}
            )
        },
    )


def _load(file: Path, sites: Sequence[Site]) -> _Sums:
    check_size(file, StatisticsError, "the checkpoint of an unfinished collection")
    with opened_tensors(file, StatisticsError, "the checkpoint of an unfinished collection") as stored:
        progress = json.loads(stored.metadata()["progress"])
        rows, keys, batches = (progress[name] for name in ("rows", "keys", "batches"))
        # copied into memory of torch's own: sums in a mapped file may be rounded otherwise, as their
        # alignment differs
        sums = {
            site.name: [stored.get_tensor(f"{site.name}|{half}").clone() for half in range(2)]
            for site in sites
        }
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in (rows, keys, batches)):
        raise StatisticsError(
            f"{file} is not the checkpoint of an unfinished collection (progress {progress!r}): remove it"
        )
    for name, halves in sums.items():
        if any(
            h.dtype != torch.float64 or h.dim() != 2 or h.shape[0] != h.shape[1] or not h.isfinite().all()
            for h in halves
        ):
            raise StatisticsError(
                f"{file} holds sums of {name} that are no finite square matrices in float64: remove it"
            )
    return _Sums(sums, rows, keys, batches)


def run_name(settings: dict, sites: Sequence[Site]) -> str:
    """A short name for one collection of some sites under some settings."""
    text = json.dumps([settings, sorted(site.name for site in sites)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
