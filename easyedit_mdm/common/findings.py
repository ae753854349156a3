"""What `easyedit-mdm doctor` says of one thing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what.
        found: what was found of it.
        state: `ok`; `limited`, where something besides editing will not work; `fails`, where no twin can be
            edited.
        cure: what will not work, and what to do; empty for `ok`.
    """

    subject: str
    found: str
    state: str = "ok"
    cure: str = ""
