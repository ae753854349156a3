"""What happens when a script that knows nothing of us imports `easyeditor` under `easyedit-mdm hook`."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path

from easyedit_mdm.errors import HostNotFoundError
from easyedit_mdm.host.finding import Host, find_easyedit, how_to_get
from easyedit_mdm.host.importing import in_one_sentence
from easyedit_mdm.host.joining import register
from easyedit_mdm.host.runner import (
    EASYEDIT_SEED,
    numbers_alone_in_locality,
    seed_everything,
    understanding_our_methods,
)
from easyedit_mdm.host.standins import standins


def folder() -> Path:
    """What to put on PYTHONPATH."""
    return Path(__file__).parent / "autoload"


class _JoiningLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, host: Host):
        self.loader, self.host = loader, host

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        """As EasyEdit's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the package, then join it."""
        # for the whole process, on purpose: these are entered and never left
        script = Path(sys.argv[0]).resolve() if sys.argv and sys.argv[0] else None
        _ENTERED.extend([standins(script), understanding_our_methods()])
        for manager in _ENTERED:
            manager.__enter__()
        with in_one_sentence(self.host):
            self.loader.exec_module(module)
        joined = register()
        if script is not None:
            _ENTERED.append(numbers_alone_in_locality(script, joined.editor_class))
            _ENTERED[-1].__enter__()
        seed_everything(EASYEDIT_SEED)  # as the import of EasyEdit itself would have left the generators


_ENTERED: list = []


def spec_that_joins() -> importlib.machinery.ModuleSpec:
    """EasyEdit's own spec, with a loader that joins it once it is imported.

    Raises:
        HostNotFoundError: if there is no EasyEdit.
    """
    host = find_easyedit()
    spec = importlib.machinery.PathFinder.find_spec("easyeditor", [str(host.root)])
    if spec is None or spec.loader is None:
        raise HostNotFoundError(f"no package easyeditor in {host.root}. {how_to_get()}")
    spec.loader = _JoiningLoader(spec.loader, host)
    return spec
