"""Opt-in: with this folder on PYTHONPATH, plain `python run_zsre_llama2.py --editing_method=ROME_MDM` works.

`PYTHONPATH=$(easyedit-mdm hook) python ...`. Python runs this file at start; it costs nothing until
`easyeditor` is imported, and then hands over to `easyedit_mdm.host.hook`. Another `sitecustomize` further
down the path still runs.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _WaitForEasyEdit(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Answers for `easyeditor` alone, once."""
        if name != "easyeditor":
            return None
        sys.meta_path.remove(self)
        from easyedit_mdm.host.hook import spec_that_joins

        return spec_that_joins()


sys.meta_path.insert(0, _WaitForEasyEdit())

_elsewhere = [p for p in sys.path if os.path.abspath(p or ".") != _HERE]
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", _elsewhere)
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(importlib.util.module_from_spec(_next))
