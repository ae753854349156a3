"""What the app shows, as HTML: everything that a user or a model wrote is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import jinja2

from easyedit_mdm.app.desk import OWN, PLAIN, Trial
from easyedit_mdm.editing import Edit
from easyedit_mdm.errors import DataError

TITLES = {"before": "Before", PLAIN: "Plain edit", OWN: "Denoising-aware edit"}
ONE_WAY = {"before": "Before", OWN: "After the edit"}
MOST_BYTES = 50_000_000


def trial_page(trial: Trial) -> str:
    """The canvases of a trial, step by step, with paraphrases and neighbours beneath."""
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(_file("canvas.html"))
    titles = TITLES if PLAIN in trial.sides else ONE_WAY
    return template.render(trial=trial, titles=titles, marks=_mark)


def _mark(section: str, trial: Trial, arm: str, row: int) -> str:
    """`good` or `bad` where there is something to say: a paraphrase should be followed by the target, a
    neighbour by what it was before.
    """
    if arm == "before":
        return ""
    text = getattr(trial.sides[arm], section)[row][1]
    wanted = trial.fact.target.strip()
    if section == "neighbours":
        wanted = trial.sides["before"].neighbours[row][1]
    return "good" if text == wanted else "bad"


def stack_page(edits: Sequence[Edit]) -> str:
    """The edits in the model, the oldest first."""
    if not edits:
        return notice("The model carries no edit.")
    facts = [fact for edit in edits for fact in edit.card.get("facts", [])]
    rows = "".join(
        f"<li>{html.escape(fact['prompt'])} … <b>{html.escape(fact['target_new'])}</b></li>" for fact in facts
    )
    return f'<div class="mdm told"><ol>{rows}</ol></div>'


def notice(sentence: str) -> str:
    """A sentence."""
    return f'<div class="mdm told" role="status">{html.escape(sentence)}</div>'


def wrong(sentence: str) -> str:
    """A sentence that says what was wrong."""
    return f'<div class="mdm wrong" role="alert">{html.escape(sentence)}</div>'


def report_page(path: str | Path | None) -> str:
    """A report of `compare`, `trace`, `sweep` or `demo` in a frame of its own, which can reach neither this
    page nor the network's other places with our address.

    Raises:
        DataError: if it is not an HTML file that can be read.
    """
    if path is None or not str(path).strip():
        raise DataError("no report was given: choose an HTML file such as report.html")
    file = Path(path)
    if file.is_dir():
        file = file / "report.html"
    if file.suffix.lower() not in (".html", ".htm") or not file.is_file():
        raise DataError(f"{path} is not an HTML file: choose one such as report.html")
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{path} has more than {MOST_BYTES} bytes: open it in the browser itself")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    return (
        '<div class="mdm"><iframe title="report" sandbox="allow-scripts"'
        f' srcdoc="{html.escape(text, quote=True)}"></iframe></div>'
    )


def style() -> str:
    """The style sheet."""
    return _file("app.css")


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
