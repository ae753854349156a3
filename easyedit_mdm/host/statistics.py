"""EasyEdit's MEMIT, AlphaEdit, EMMET, ... on our second moments, instead of an 18 GB download.

They call `layer_stats` with the name of one of three Wikipedia data sets. Where `mom2_dataset` names
something else (a text file, JSON lines, `datasets:...`, a shipped text), the moments come from
`easyedit_mdm.statistics`, under the same files that our own methods use; `mom2_n_samples` then counts tokens.

EasyEdit writes its own files in place. Of two processes that make the same one, the second waits for the
first and reads what that wrote.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from easyedit_mdm.api import wrap_model
from easyedit_mdm.common.locks import only_writer
from easyedit_mdm.models import Adapter
from easyedit_mdm.models.adapter import Site
from easyedit_mdm.statistics import SecondMoments, moments_for

_THEIRS = ("wikipedia", "wikitext", "wikitext2")


@dataclass(frozen=True)
class _Moment:
    """What EasyEdit asks of a statistic: `stat.mom2.moment()`."""

    moments: SecondMoments

    @property
    def mom2(self) -> _Moment:
        """Itself."""
        return self

    def moment(self) -> Tensor:
        """C."""
        return self.moments.moment


def join_statistics() -> None:
    """Replace `layer_stats` in every module of EasyEdit that has it; calling again changes nothing."""
    for name, module in list(sys.modules.items()):
        theirs = getattr(module, "layer_stats", None) if name.startswith("easyeditor.models.") else None
        if callable(theirs) and not hasattr(theirs, "_easyedit_mdm"):
            # by type, a module has no such attribute
            setattr(module, "layer_stats", _wrapped(theirs))  # noqa: B010


def _wrapped(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def layer_stats(
        model: Any,
        tokenizer: Any,
        layer_name: str,
        stats_dir: Any,
        ds_name: str,
        to_collect: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Ours, unless it is one of EasyEdit's own data sets; one process at a time either way."""
        if ds_name in _THEIRS:
            with _alone(Path(stats_dir) / f"{ds_name}-{layer_name}"):
                return theirs(model, tokenizer, layer_name, stats_dir, ds_name, to_collect, *args, **kwargs)
        adapter = wrap_model(model, tokenizer)
        return _Moment(
            moments_for(adapter, [_site(adapter, layer_name)], ds_name, kwargs.get("sample_size"), stats_dir)[
                0
            ]
        )

    vars(layer_stats)["_easyedit_mdm"] = True
    return layer_stats


def _alone(path: Path) -> AbstractContextManager[None]:
    """The lock of a file; none in a folder that can only be read, where nobody writes."""
    there = next(folder for folder in path.parents if folder.exists())
    return only_writer(path, wait=True) if os.access(there, os.W_OK) else nullcontext()


def _site(adapter: Adapter, name: str) -> Site:
    number = re.search(r"\.(\d+)\.", name)
    return adapter.site(int(number.group(1)) if number else 0, name)
