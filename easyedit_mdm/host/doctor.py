"""What `easyedit-mdm doctor` says of EasyEdit."""

from __future__ import annotations

from pathlib import Path

from easyedit_mdm.common.findings import Finding
from easyedit_mdm.host.importing import import_easyedit


def easyedit(home: str | Path | None = None) -> Finding:
    """EasyEdit's form and place, after importing it as `easyedit-mdm run` would; never worse than
    `limited`.
    """
    try:
        host = import_easyedit(home)
    except Exception as error:  # whatever its own modules raise at import
        advice = (
            "`run`, `demo`, the hook, BaseEditor and EasyEdit's own methods in `bench` will not work;"
            " everything else does"
        )
        return Finding("EasyEdit", str(error) or type(error).__name__, "limited", advice)
    form = "the repository" if host.form == "head" else "PyPI's wheel of October 2023"
    cure = (
        ""
        if host.form == "head"
        else (
            "its runners (examples/run_*.py) and AlphaEdit are only in the repository: clone it and set"
            " EASYEDIT_HOME"
        )
    )
    return Finding(
        "EasyEdit", f"{form}, {host.source}, at {host.root}", "ok" if host.form == "head" else "limited", cure
    )
