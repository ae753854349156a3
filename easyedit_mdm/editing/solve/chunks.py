"""Thousands of facts in one edit: values are optimised a chunk at a time and kept on the disk, keys are read
a chunk at a time, and what is solved does not grow with the number of facts.

The updates of MEMIT, EMMET and AlphaEdit depend on the keys K and the residuals R through K K^T and R K^T
alone (`easyedit_mdm.editing.methods.memit`, `alphaedit`). With K^T = Q S, Q's columns orthonormal,

    K K^T = S^T S,    R K^T = (R Q) S,

so that the columns S^T and R Q take the place of K and R. They are as many as a key has dimensions, however
many facts there are.

FOLDER holds `values.json`, which says what the values belong to, and a file a chunk. A chunk is written whole
or not at all, and what is in it depends on its own facts alone. So a run that was killed goes on with the
next chunk, and several processes may share a folder: each takes a chunk that no other has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from easyedit_mdm.common.files import explained, opened_tensors, read_json, write_json, write_tensors
from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.common.locks import PAUSE, writing_alone
from easyedit_mdm.editing.edit import Change, Edit, keeping, write
from easyedit_mdm.editing.facts import Fact, tokenise
from easyedit_mdm.editing.request import EditRequest, check_requests
from easyedit_mdm.editing.solve.batch import (
    BatchHyperParams,
    ClosedForm,
    System,
    outputs,
    values_of,
    weighted_columns,
)
from easyedit_mdm.editing.solve.card import Outcome, card
from easyedit_mdm.editing.solve.sites import changes_of, check_modules, settled, statistics
from easyedit_mdm.errors import EditError, HyperParameterError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site

CHUNK = 256
CARD = "values.json"


@dataclass(frozen=True)
class Chunk:
    """Some facts whose values are known.

    Attributes:
        facts: tokenised.
        before: what the last edited layer puts out for them, in the unedited model.
        delta: their values.
        outcomes: how their optimisation went.
    """

    facts: list[Fact]
    before: Float[Tensor, "facts width"]
    delta: Float[Tensor, "facts width"]
    outcomes: list[Outcome]


class Columns:
    """Keys and residuals of any number of facts, as at most so many columns as a key has dimensions (twice
    that while they are collected).
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.residual: list[Tensor] = []

    def add(self, keys: Float[Tensor, "inner columns"], residual: Float[Tensor, "width columns"]) -> None:
        """Add some columns, float64."""
        self.keys.append(keys)
        self.residual.append(residual)
        if sum(part.shape[1] for part in self.keys) > 2 * keys.shape[0]:
            self._fold()

    def joined(self) -> tuple[Float[Tensor, "inner columns"], Float[Tensor, "width columns"]]:
        """All of them, with the same K K^T and R K^T."""
        if sum(part.shape[1] for part in self.keys) > self.keys[0].shape[0]:
            self._fold()
        return torch.cat(self.keys, dim=1), torch.cat(self.residual, dim=1)

    def _fold(self) -> None:
        keys, residual = torch.cat(self.keys, dim=1), torch.cat(self.residual, dim=1)
        basis, left = torch.linalg.qr(keys.T)
        self.keys, self.residual = [left.T], [residual @ basis.to(residual)]


class KeptValues:
    """The values of many facts in a folder; see the module.

    Args:
        site: the last edited layer, where values are optimised.
        size: facts a chunk.

    Raises:
        EditError: for a folder with the values of other facts, another model or other settings.
        FileError: if it cannot be written.
    """

    def __init__(
        self,
        adapter: Adapter,
        requests: Sequence[EditRequest],
        hparams: BatchHyperParams,
        site: Site,
        folder: str | Path,
        size: int = CHUNK,
    ):
        self.adapter, self.requests, self.hparams, self.site = adapter, requests, hparams, site
        self.folder, self.size = Path(folder), size
        self.numbers = range(-(-len(requests) // size))
        self._check(_identity(adapter, requests, hparams, size))

    def _check(self, identity: dict[str, Any]) -> None:
        file = self.folder / CARD
        if file.exists():
            known = read_json(file, EditError, "what these values belong to")
            if isinstance(settings := known.get("hyperparameters"), dict):
                known["hyperparameters"] = _settings(type(self.hparams).as_now(settings))
            other = [name for name in identity if known.get(name) != identity[name]]
            if other:
                raise EditError(
                    f"{self.folder} holds values of another run ({', '.join(other)} differ): give another"
                    " folder, or remove it"
                )
        else:
            with explained(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, identity, indent=2)

    def part(self, number: int) -> list[EditRequest]:
        """The requests of a chunk."""
        return list(self.requests[number * self.size : (number + 1) * self.size])

    def file(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"chunk-{number:05d}.safetensors"

    def fill(self) -> None:
        """Optimise what is missing; chunks that another process is at are waited for.

        Raises:
            OptimisationError, RequestError, FileError: finished chunks stay.
        """
        announced = False
        missing = [number for number in self.numbers if not self.file(number).exists()]
        done = len(self.requests) - sum(len(self.part(number)) for number in missing)
        with tqdm(total=len(self.requests), initial=done, desc="values", unit="fact", delay=2) as bar:
            while missing:
                made = [number for number in missing if self._make(number)]
                left = [number for number in missing if not self.file(number).exists()]
                bar.update(sum(len(self.part(number)) for number in set(missing) - set(left)))
                missing = left
                if missing and not made:
                    if not announced:
                        logging.getLogger(__name__).warning(
                            "waiting for other processes, which make %d chunks of %s",
                            len(missing),
                            self.folder,
                        )
                    announced = True
                    time.sleep(PAUSE)

    def _make(self, number: int) -> bool:
        """Make a chunk, unless it is there or another process is at it."""
        file = self.file(number)
        with writing_alone(file) as alone:
            if not alone or file.exists():
                return False
            facts = self._tokenised(number)
            before = outputs(self.adapter, self.site, facts, self.hparams)
            made = values_of(self.adapter, self.site, facts, self.hparams)
            outcomes = [{**asdict(one), "delta": None} for one in made]
            tensors = {"before": before, "delta": torch.stack([one.delta for one in made])}
            write_tensors(file, tensors, {"outcomes": json.dumps(outcomes)})
        return True

    def _tokenised(self, number: int) -> list[Fact]:
        return [tokenise(self.adapter, request, self.hparams) for request in self.part(number)]

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in turn, one at a time in memory.

        Raises:
            EditError: for a file that is broken.
        """
        for number in self.numbers:
            what = "optimised values", "remove it, and run the command again"
            with opened_tensors(self.file(number), EditError, *what) as stored:
                outcomes = json.loads(stored.metadata()["outcomes"])
                before, delta = (stored.get_tensor(name) for name in ("before", "delta"))
            facts = self._tokenised(number)
            where = self.adapter.device
            yield Chunk(
                facts,
                before.to(where),
                delta.to(where),
                [Outcome(**{k: v for k, v in one.items() if k != "delta"}) for one in outcomes],
            )


def edit_in_chunks(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: BatchHyperParams,
    closed_form: ClosedForm,
    folder: str | Path,
    size: int = CHUNK,
) -> Edit:
    """Make (not apply) one edit of thousands of requests: that of `edit_batch`, up to rounding.

    Args:
        closed_form: see `edit_batch`.
        folder: for the values; see the module.
        size: facts a chunk.

    Raises:
        HyperParameterError: for values that are optimised together (`optimise_through: weights`).
        EditError: for a folder with other values.
        RequestError, StatisticsError, OptimisationError: as `edit_batch`.
    """
    sites = checked(adapter, requests, hparams)
    kept = KeptValues(adapter, requests, hparams, sites[-1], folder, size)
    moments = statistics(adapter, sites, hparams)
    kept.fill()
    changes: list[Change] = []
    figures = {}

    def spread() -> None:
        """Change layer after layer."""
        for i, site in enumerate(sites):
            columns, distance = _columns(kept, sites, i)
            system = System(site, *columns.joined(), moments[i])
            left, right = closed_form(system)
            made = changes_of(adapter, site, left.float(), right.float())
            changes.extend(made)
            figures[str(site.layer)] = {
                "residual": distance,
                **moments[i].cheap_figures(hparams.mom2_eps), **system.figures
            }  # fmt: skip
            write(adapter, Edit(made))

    keeping(adapter, [name for site in sites for name in site.weights], spread)
    whole = card([], [], hparams, [], {"layers": figures})
    for number, chunk in enumerate(kept.chunks()):
        whole["facts"] += card(kept.part(number), chunk.facts, hparams, chunk.outcomes, {})["facts"]
    return Edit(changes, whole)


def fill(
    adapter: Adapter,
    requests: Sequence[EditRequest],
    hparams: BatchHyperParams,
    folder: str | Path,
    size: int = CHUNK,
) -> None:
    """Make the values that are missing in a folder, and no edit; raises as `edit_in_chunks`."""
    sites = checked(adapter, requests, hparams)
    KeptValues(adapter, requests, hparams, sites[-1], folder, size).fill()


def checked(adapter: Adapter, requests: Sequence[EditRequest], hparams: BatchHyperParams) -> list[Site]:
    """The edited layers, after a look at everything that can be wrong before work begins.

    Raises:
        RequestError, HyperParameterError, ModelError: see `edit_in_chunks`.
    """
    if hparams.optimise_through == "weights":
        raise HyperParameterError(
            "optimise_through: weights optimises the values of all facts together: in chunks only"
            " `activation` can be used"
        )
    check_requests(requests)
    check_modules(adapter, hparams)
    sites = [adapter.site(layer, hparams.rewrite_module_tmp) for layer in hparams.layers]
    return [settled(adapter, site, (tokenise(adapter, r, hparams) for r in requests)) for site in sites]


def _columns(kept: KeptValues, sites: Sequence[Site], i: int) -> tuple[Columns, float]:
    """Keys and residuals of all facts at one layer, and how far the outputs are from the wanted ones, on
    average.
    """
    columns, distance = Columns(), 0.0
    for chunk in kept.chunks():
        target = chunk.before + chunk.delta
        now = chunk.before if i == 0 else outputs(kept.adapter, sites[-1], chunk.facts, kept.hparams)
        residual = (target - now).double() / (len(sites) - i)
        columns.add(*weighted_columns(kept.adapter, sites[i], chunk.facts, residual, kept.hparams))
        distance += float((target - now).norm(dim=1).sum())
    return columns, distance / len(kept.requests)


def _identity(
    adapter: Adapter, requests: Sequence[EditRequest], hparams: BatchHyperParams, size: int
) -> dict[str, Any]:
    """What values belong to."""
    asked = json.dumps([[r.prompt, r.subject, r.target_new] for r in requests])
    settings = json.loads(json.dumps(hparams.to_dict(), default=str))
    return {
        "model": model_fingerprint(adapter.native),
        "facts": hashlib.sha256(asked.encode()).hexdigest(),
        "number": len(requests),
        "chunk": size,
        "hyperparameters": _settings(settings),
    }


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that values depend on."""
    return {k: v for k, v in settings.items() if k not in _NO_PART}


# hyperparameters that have no part in the values
_NO_PART = (
    "device", "model_name", "stats_dir", "mom2_dataset", "mom2_n_tokens", "mom2_update_weight", "mom2_eps",
    "emmet_lambda", "L2", "nullspace_threshold", "nullspace_scale", "guard", "batch_size",
)  # fmt: skip
