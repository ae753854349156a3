"""Second moments on disk: found where they were made before with the same model, text and settings, made
where not.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from easyedit_mdm.common.files import check_size, explained, opened_tensors, write_tensors
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.common.locks import PAUSE, only_writer
from easyedit_mdm.common.ranks import ALONE, Ranks
from easyedit_mdm.errors import StatisticsError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.statistics.collecting import (
    CONTEXT_LENGTH,
    TOKENS_PER_DIMENSION,
    CollectConfig,
    collect,
    key_width,
    part_of,
    run_name,
)
from easyedit_mdm.statistics.moments import SecondMoments
from easyedit_mdm.statistics.texts import TextSource, text_source

_IN_MEMORY: weakref.WeakKeyDictionary[nn.Module, dict[tuple, SecondMoments]] = weakref.WeakKeyDictionary()
_FIRST_SEEN: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def cache_folder() -> Path:
    """Where statistics are kept unless a folder is named: `EASYEDIT_MDM_CACHE`, or `easyedit_mdm` in the
    user's cache folder.
    """
    named = os.environ.get("EASYEDIT_MDM_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "easyedit_mdm"


def moments_for(
    adapter: Adapter,
    sites: Sequence[Site],
    dataset: str | Path,
    tokens: int | None = None,
    folder: str | Path | None = None,
    mask_ratio: int | float | str = 0,
    context_length: int = CONTEXT_LENGTH,
    settled: float | None = None,
    seed: int = 0,
    checkpoint_every: float = 60.0,
    wait: bool = True,
    ranks: Ranks = ALONE,
) -> list[SecondMoments]:
    """Second moments of some sites of the model as it was when they were first asked for: sequential edits
    keep the statistics of the base model.

    Args:
        dataset: see `text_source`.
        tokens: how many; 10 times the key's dimension by default. Under twice the dimension there is a
            warning.
        folder: where they are kept; the user's cache folder by default (`cache_folder`).
        mask_ratio, context_length, settled, seed: see `CollectConfig`.
        checkpoint_every: seconds after which a collection leaves what it has on the disk, from where the next
            one goes on.
        wait: if another process is collecting the same, wait and read what it writes.
        ranks: which of several processes this is that were started to collect together; every one of them has
            to ask for the same.

    Raises:
        StatisticsError: if the text does not exist or is too short, or a file is not what its name says.
        FileError: without `wait`, if another process is collecting the same; it is named.
    """
    source = text_source(dataset)
    inner = max(key_width(adapter, site) for site in sites)
    config = CollectConfig(
        tokens or TOKENS_PER_DIMENSION * inner,
        min(context_length, adapter.max_positions),
        mask_ratio,
        settled,
        seed,
    )
    if config.tokens < 2 * inner:
        warnings.warn(
            f"{config.tokens} tokens for keys of {inner} dimensions: second moments want at least"
            f" {2 * inner}, better {10 * inner}",
            stacklevel=2,
        )
    cache = _IN_MEMORY.setdefault(adapter.native, {})
    wanted = {site.name: (site.name, source.fingerprint, config, adapter.attention) for site in sites}
    absent = [site for site in sites if wanted[site.name] not in cache]
    if absent:
        place = cache_folder() if folder is None else Path(folder).expanduser()
        moments_by_site = _read_or_collect(
            adapter, absent, source, config, place, checkpoint_every, wait, ranks
        )
        for name, moments in moments_by_site.items():
            cache[wanted[name]] = moments
    return [cache[wanted[site.name]] for site in sites]


def note_base(adapter: Adapter) -> None:
    """Take the model as it is now for the base model, whose statistics edits use from now on. Only where it
    was not seen before.
    """
    if adapter.native not in _FIRST_SEEN:
        _FIRST_SEEN[adapter.native] = model_fingerprint(adapter.native)


def _settings(model: str, source: TextSource, config: CollectConfig) -> dict[str, Any]:
    return {
        "model": model,
        "text": hashlib.sha256(source.fingerprint.encode()).hexdigest(),
        "tokens": config.tokens,
        "context_length": config.context_length,
        "mask_ratio": config.mask_ratio,
        "settled": config.settled,
        "seed": config.seed if config.mask_ratio else 0,
    }


def _blocks(adapter: Adapter) -> dict[str, Any]:
    """Who sees whom, where it is not all or the left: the same weights have other keys under another
    block.
    """
    plain = adapter.attention.full or adapter.attention.causal
    return {} if plain else {"attention": asdict(adapter.attention)}


def _read_or_collect(
    adapter: Adapter,
    sites: Sequence[Site],
    source: TextSource,
    config: CollectConfig,
    folder: Path,
    every: float,
    wait: bool,
    ranks: Ranks,
) -> dict[str, SecondMoments]:
    """From the files of the model as it was first seen, else of the model as it is now; what is in neither is
    collected.

    The fingerprint is taken anew each time: a model that was edited since must not leave its statistics under
    the base model's name.
    """
    now = model_fingerprint(adapter.native)
    moments_by_site: dict[str, SecondMoments] = {}
    for model in dict.fromkeys((_FIRST_SEEN.setdefault(adapter.native, now), now)):
        settings = _settings(model, source, config) | _blocks(adapter)
        files = {
            site.name: folder / f"mom2-{site.name}-{run_name(settings, [site])}.safetensors" for site in sites
        }
        moments_by_site |= _there(files, moments_by_site, model)
    # settings and files are those of the model as it is now; the checkpoint is named after all sites asked
    # for, so that a run that was killed between the writing of two results, or after the last, is found again
    # by the next that asks for the same
    checkpoint = folder / f"unfinished-{run_name(settings, sites)}.safetensors"
    if len(moments_by_site) == len(sites) and not checkpoint.exists():
        return moments_by_site
    with only_writer(part_of(checkpoint, ranks), wait):
        moments_by_site |= _there(files, moments_by_site, now)  # another process may have made them meanwhile
        absent = [site for site in sites if site.name not in moments_by_site]
        made = collect(adapter, absent, source, config, checkpoint, every, ranks) if absent else {}
        for name, moments in made.items():
            moments.settings = {
                **settings,
                "site": name,
                "tokens_seen": moments.tokens,
                "dataset": source.name,
            }
            write(files[name], moments)
            moments_by_site[name] = moments
        if ranks.first:
            for part in (part_of(checkpoint, Ranks(rank, ranks.world)) for rank in range(ranks.world)):
                with explained(part, "removed"):
                    part.unlink(missing_ok=True)
    while len(moments_by_site) < len(sites):  # the first of several processes is adding them up
        time.sleep(PAUSE)
        moments_by_site |= _there(files, moments_by_site, now)
    return moments_by_site


def _there(files: dict[str, Path], known: dict[str, SecondMoments], model: str) -> dict[str, SecondMoments]:
    """Those files that exist, of sites that are not found yet."""
    return {name: read(file, model) for name, file in files.items() if name not in known and file.exists()}


def write(file: Path, moments: SecondMoments) -> None:
    """Store second moments, whole or not at all.

    Raises:
        FileError: if the file cannot be written.
    """
    write_tensors(
        file, {"moment": moments.moment}, {"settings": json.dumps(moments.settings, sort_keys=True)}
    )


def read(file: str | Path, model: str | None = None) -> SecondMoments:
    """Read a file of second moments.

    Args:
        model: fingerprint of the model that they are to be used with; not checked if None.

    Raises:
        StatisticsError: if it is no such file, holds NaN or is not square, or belongs to another model.
    """
    check_size(file, StatisticsError, "second moments")
    with opened_tensors(
        Path(file),
        StatisticsError,
        "a file of second moments",
        "remove it, or collect them again with easyedit-mdm stats",
    ) as stored:
        settings = json.loads((stored.metadata() or {}).get("settings", "null"))
        moment = stored.get_tensor("moment")
        tokens = int(settings.get("tokens_seen", 0)) if isinstance(settings, dict) else 0
    if (
        not isinstance(settings, dict)
        or moment.dim() != 2
        or moment.shape[0] != moment.shape[1]
        or not moment.is_floating_point()
    ):
        raise StatisticsError(
            f"{file} holds no usable second moments (shape {tuple(moment.shape)}, {moment.dtype}): remove it"
        )
    if not moment.double().isfinite().all() or not moment.numel():
        raise StatisticsError(
            f"{file} holds no usable second moments (NaN or infinity, or nothing): remove it"
        )
    if model is not None and settings.get("model") != model:
        raise StatisticsError(
            f"{file} holds statistics of another model ({str(settings.get('model'))[:12]}..., this one is"
            f" {model[:12]}...): collect them again"
        )
    return SecondMoments(moment.double(), tokens, settings)
