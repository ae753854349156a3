"""lm-evaluation-harness's own command line, with `--model easyedit_mdm` in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run_harness(arguments: Sequence[str]) -> None:
    """Run `lm-eval ARGUMENTS`, where `--model easyedit_mdm` is known.

    The harness (0.4.13) has no entry points for models: one is registered by being imported. It then leaves
    its own models out, so they are imported too.
    """
    from easyedit_mdm.harness import model  # noqa: F401  (registers the model)

    import lm_eval.models  # isort: skip  # noqa: F401
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
