"""Figures and pages of reports: drawn once, in colours that the page turns into its own, so that they follow
light and dark mode.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easyedit_mdm.errors import MissingPackageError
from easyedit_mdm.report.summaries import Estimate

# colours that the page turns into its own, so that figures follow light and dark mode
INK, SOFT = "#010203", "#010204"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(8))
PRINTED = (
    "#0072b2",
    "#d55e00",
    "#2a9d74",
    "#b0508c",
    "#9a7b00",
    "#56627a",
    "#c0392b",
    "#6b5bd2",
)  # the same, for files of their own
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
HATCHES = ("", "///", "...", "\\\\\\", "xx", "--", "++", "oo", "||")


def matplotlib_parts() -> tuple[Any, Any]:
    """matplotlib and its `Figure`, imported when the first figure is drawn.

    Raises:
        MissingPackageError: where matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(
            "the report's figures need the package matplotlib: pip install matplotlib"
        ) from None
    return matplotlib, Figure


def new_figure(**options: Any) -> Any:
    """An empty figure whose parts make room for each other."""
    return matplotlib_parts()[1](**{"layout": "constrained", **options})


def short(text: str) -> str:
    """A run's name as a figure can hold it: not too long, no mathematics between dollars, not hidden by a
    leading underscore.
    """
    kept = text if len(text) <= 60 else text[:59] + "…"
    return " " + re.sub(r"[\x00-\x1f\ud800-\udfff]", " ", kept).replace("$", r"\$")


def dressed(axes: Any, title: str) -> None:
    """Title and axes in the ink of the page."""
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SOFT)
    axes.set_axisbelow(True)


def svg(figure: Any, salt: str) -> str:
    """The figure as inline SVG: its colours are the page's variables, and it names no other document."""
    matplotlib, _ = matplotlib_parts()
    figure.patch.set_alpha(0)
    stream = io.StringIO()
    # the salt keeps bytes and ids the same from run to run, and ids of two figures apart
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # glyphs that the measuring font lacks; the browser has its own fonts
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for colour, name in (
        (INK, "currentColor"),
        (SOFT, "var(--soft)"),
        *((c, f"var(--series-{i})") for i, c in enumerate(SERIES)),
    ):
        text = text.replace(f'fill="{colour}"', f'style="fill: {name}"').replace(colour, name)
    width, _ = figure.get_size_inches()
    head, rest = text.split(">", 1)
    # as wide as the page allows, up to the size it was drawn for
    return (
        re.sub(r' (width|height)="[^"]*"', "", head)
        + f' role="img" style="max-width: {width * 1.1:.1f}in">'
        + rest
    )


def legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], width: int | float) -> None:
    """A legend above the axes, in as many columns as its names leave room for."""
    columns = max(1, min(len(labels), int(width * 11 / (max(map(len, labels)) + 8))))
    drawn = figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=3.2
    )
    for text in drawn.get_texts():
        text.set_color(INK)


def spans(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the whiskers below and above each mean, 0 where there is no interval."""
    return [[_rise(e["low"], e["mean"]) for e in estimates], [_rise(e["mean"], e["high"]) for e in estimates]]


def _rise(low: float | None, high: float | None) -> float:
    return 0.0 if low is None or high is None else max(0.0, high - low)


def rendered(template: str, **values: Any) -> str:
    """A page of this folder, filled in; values are escaped unless the template says otherwise.

    Raises:
        MissingPackageError: where jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingPackageError("the report's page needs the package jinja2: pip install jinja2") from None
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template(template).render(**values)


def save(figure: Any, path: Path) -> None:
    """The figure as PNG and as SVG beside it (`path` without an ending), on white, in colours of its own.
    Call `svg` first: it is drawn over.
    """
    matplotlib, _ = matplotlib_parts()
    figure.set_layout_engine("none")  # laid out already
    _printed(figure, matplotlib.colors.to_hex)
    with matplotlib.rc_context({"svg.hashsalt": path.name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as in `svg`
        figure.savefig(path.with_name(path.name + ".png"), dpi=130, facecolor="white")
        figure.savefig(path.with_name(path.name + ".svg"), facecolor="white", metadata={"Date": None})


def _printed(figure: Any, to_hex: Any) -> None:
    """The page's series colours turned into real ones, in lines and shades."""
    real = dict(zip(SERIES, PRINTED))
    for artist in figure.findobj():
        if hasattr(artist, "set_markerfacecolor"):  # a line
            artist.set_color(real.get(to_hex(artist.get_color()), artist.get_color()))
        elif hasattr(artist, "get_edgecolors"):  # shades and whiskers
            for part in ("facecolor", "edgecolor"):
                colours = getattr(artist, f"get_{part}")()
                if len(colours) and to_hex(colours[0]) in real:
                    getattr(artist, f"set_{part}")(real[to_hex(colours[0])])
