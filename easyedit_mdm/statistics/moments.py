"""C = E[k k^T] over a text, in float64, kept on disk under everything that determines it."""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from easyedit_mdm.common.fingerprints import model_fingerprint
from easyedit_mdm.errors import StatisticsError
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.models.geometry import right_padded
from easyedit_mdm.models.hooks import reading_input

CONTEXT_LENGTH = 128
TOKENS_PER_DIMENSION = 10

_IN_MEMORY: "weakref.WeakKeyDictionary[nn.Module, dict[tuple, SecondMoments]]" = weakref.WeakKeyDictionary()


@dataclass
class SecondMoments:
    """Second moments of a site's keys.

    Attributes:
        moment: E[k k^T], float64, on the CPU.
        tokens: number of keys it is the mean of.
    """

    moment: Float[Tensor, "inner inner"]
    tokens: int
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False)

    def solve(self, key: Float[Tensor, " inner"], eps: float = 0.0) -> Float[Tensor, " inner"]:
        """(C + eps tr(C)/d I)^-1 key, by a Cholesky factor that is kept.

        Raises:
            StatisticsError: if C is singular: too few tokens for the dimension, or too small a vocabulary; raise either, or eps.
        """
        if eps not in self._factors:
            ridge = eps * self.moment.diagonal().mean()
            try:
                self._factors[eps] = torch.linalg.cholesky(self.moment + ridge * torch.eye(len(self.moment), dtype=torch.float64))
            except torch.linalg.LinAlgError:
                raise StatisticsError(
                    f"second moments of {self.tokens} tokens in {len(self.moment)} dimensions are singular: "
                    "use more tokens (mom2_n_tokens) or a ridge (mom2_eps, such as 1e-6)"
                ) from None
        solved = torch.cholesky_solve(key.detach().double().cpu()[:, None], self._factors[eps])[:, 0]
        return solved.to(key.device, key.dtype)


@torch.no_grad()
def collect(adapter: Adapter, site: Site, text: str, tokens: int, batch: int = 8) -> SecondMoments:
    """Second moments of the keys at `site` over the first `tokens` tokens of `text`, unmasked, in rows of 128 tokens.

    Raises:
        StatisticsError: if the text is shorter than that.
    """
    ids = torch.tensor(adapter.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
    if len(ids) < tokens:
        raise StatisticsError(f"the text has {len(ids)} tokens, {tokens} are wanted: give a longer one or lower mom2_n_tokens")
    rows = list(ids.split(min(CONTEXT_LENGTH, adapter.max_positions)))
    module = adapter.module(site.name)
    moment = None
    for start in range(0, len(rows), batch):
        padded, mask = right_padded(rows[start : start + batch], adapter.ids.pad, adapter.device)
        with reading_input(module) as seen:
            adapter.hidden_before(site.layer + 1, padded, mask)
        keys = seen[0][mask.bool().to(seen[0].device)].double()
        part = (keys.T @ keys).cpu()
        moment = part if moment is None else moment + part
    return SecondMoments(moment / tokens, tokens)


def moments_for(adapter: Adapter, site: Site, dataset: str | Path, tokens: int | None = None, folder: str | Path | None = None) -> SecondMoments:
    """Second moments of a text file, from `folder` if they were collected before with the same model, text and settings.

    Args:
        tokens: how many; 10 times the key's dimension by default.
        folder: where they are kept; nothing is kept if None.

    Raises:
        StatisticsError: if the file does not exist, is too short, or gives fewer tokens than dimensions.
    """
    path = Path(dataset).expanduser()
    if not path.is_file():
        raise StatisticsError(f"mom2_dataset {str(dataset)!r} is not a file: give a plain-text file")
    weight = adapter.module(site.name).weight
    inner = weight.shape[0] if site.transposed else weight.shape[1]
    tokens = tokens or TOKENS_PER_DIMENSION * inner
    if tokens < inner:
        raise StatisticsError(f"mom2_n_tokens={tokens} is less than the key's {inner} dimensions: C would be singular")
    cache = _IN_MEMORY.setdefault(adapter.native, {})
    request = (site.name, str(path.resolve()), path.stat().st_mtime_ns, tokens)
    if request not in cache:  # of the model as it was first seen: sequential edits keep the statistics of the base model
        cache[request] = _read_or_collect(adapter, site, path, tokens, folder)
    return cache[request]


def _read_or_collect(adapter: Adapter, site: Site, path: Path, tokens: int, folder: str | Path | None) -> SecondMoments:
    text = path.read_text(encoding="utf-8")
    known = {
        "model": model_fingerprint(adapter.native),
        "site": site.name,
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": tokens,
        "context_length": min(CONTEXT_LENGTH, adapter.max_positions),
        "mask_ratio": 0,
    }
    return _kept(adapter, site, text, tokens, known, None if folder is None else Path(folder).expanduser())


def _kept(adapter: Adapter, site: Site, text: str, tokens: int, known: dict, folder: Path | None) -> SecondMoments:
    from safetensors.torch import safe_open, save_file

    if folder is None:
        return collect(adapter, site, text, tokens)
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"mom2-{site.name}-{name}.safetensors"
    if file.exists():
        with safe_open(file, "pt") as stored:
            if stored.metadata() != {"settings": json.dumps(known, sort_keys=True)}:
                raise StatisticsError(f"{file} was made with other settings: remove it")
            return SecondMoments(stored.get_tensor("moment"), tokens)
    made = collect(adapter, site, text, tokens)
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    save_file({"moment": made.moment}, part, metadata={"settings": json.dumps(known, sort_keys=True)})
    part.replace(file)
    return made
