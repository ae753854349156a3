"""Figures of causal tracing, after ROME's paper (Meng et al., arXiv 2202.05262, figures 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from easyedit_mdm.report.figures import (
    DASHES,
    INK,
    MARKERS,
    SERIES,
    SOFT,
    dressed,
    legend,
    matplotlib_parts,
    new_figure,
    short,
)
from easyedit_mdm.tracing import CLASSES, KINDS
from easyedit_mdm.tracing.averages import GROUPS
from easyedit_mdm.tracing.records import FactRecord, ModelTrace, Profile, StateRecord

TITLES = {"hidden": "hidden state", "mlp": "MLP", "attention": "attention"}
MEASURE_TITLES = {
    "probability": "probability of the answer",
    "log_probability": "log-probability of the answer, nats",
    "final_log_probability": "final log-probability after denoising on, nats",
}


def average_figure(models: Sequence[ModelTrace], group: str, measure: str) -> Any:
    """Average indirect effect by layer: a row a model, a column a kind, a line a class of tokens; None where
    there is nothing to draw.
    """
    drawn = [m for m in models if any(measure in kinds for kinds in m["averages"].get(group, {}).values())]
    if not drawn:
        return None
    figure = new_figure(figsize=(11, 0.9 + 2.7 * len(drawn)))
    handles: dict[str, Any] = {}
    grid = figure.subplots(len(drawn), len(KINDS), squeeze=False, sharey="row")
    for line, model in zip(grid, drawn):
        for axes, kind in zip(line, KINDS):
            tables = model["averages"][group][kind][measure]
            window = "" if kind == "hidden" else f", {model['window']} layers"
            dressed(axes, short(f"{model['name']}: {TITLES[kind]}{window}"))
            for i, name in enumerate(CLASSES):
                if name in tables:
                    handles[name] = _curve(axes, tables[name], i)
            _layer_axis(axes, model["layers"])
    legend(figure, list(handles.values()), [CLASSES[name] for name in handles], 11)
    figure.supylabel(f"indirect effect on the\n{MEASURE_TITLES[measure]}", color=INK, fontsize=9)
    return figure


def _curve(axes: Any, table: Profile, number: int) -> Any:
    """A line with its interval as a shade."""
    layers = np.arange(len(table["mean"]))
    look = {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }
    if table["low"][0] is not None:
        axes.fill_between(layers, table["low"], table["high"], color=look["color"], alpha=0.14, linewidth=0)
    return axes.plot(layers, table["mean"], markersize=4, linewidth=1.4, **look)[0]


def _layer_axis(axes: Any, layers: int) -> None:
    axes.set_xticks(range(0, layers, max(1, layers // 8)))
    axes.set_xlabel("layer", color=INK, fontsize=9)
    axes.axhline(0, color=SOFT, linewidth=0.6)
    axes.grid(axis="y", color=SOFT, alpha=0.2, linewidth=0.7)


def compare_figure(
    models: Sequence[ModelTrace], at: Sequence[str] = ("subject_last", "last", "slots")
) -> Any:
    """The models over each other, by relative depth: a row a class of tokens, a column a kind."""
    figure = new_figure(figsize=(11, 0.9 + 2.7 * len(at)))
    handles: dict[str, Any] = {}
    grid = figure.subplots(len(at), len(KINDS), squeeze=False)
    for line, name in zip(grid, at):
        for axes, kind in zip(line, KINDS):
            dressed(axes, f"{TITLES[kind]} at the {CLASSES[name]}")
            for i, model in enumerate(models):
                table = model["averages"].get("none", {}).get(kind, {}).get("probability", {}).get(name)
                if table is not None:
                    handles[model["name"]] = _over_depth(axes, table, i)
            axes.set_xlabel("depth (0: below the first layer, 1: above the last)", color=INK, fontsize=8)
            axes.grid(axis="y", color=SOFT, alpha=0.2, linewidth=0.7)
            axes.set_xlim(0, 1)
    legend(figure, list(handles.values()), [short(name) for name in handles], 11)
    figure.supylabel("indirect effect on the probability of the answer", color=INK, fontsize=9)
    return figure


def _over_depth(axes: Any, table: Profile, number: int) -> Any:
    depth = (np.arange(len(table["mean"])) + 0.5) / len(table["mean"])
    look = {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }
    if table["low"][0] is not None:
        axes.fill_between(depth, table["low"], table["high"], color=look["color"], alpha=0.14, linewidth=0)
    return axes.plot(depth, table["mean"], markersize=4, linewidth=1.4, **look)[0]


def heat_rows(fact: FactRecord) -> list[tuple[str, StateRecord, str]]:
    """The rows of a fact's heatmaps: a title, a state and a measure."""
    rows = []
    for state in fact["states"]:
        slots = "" if not state["k"] else f" with {state['k']} of {fact['n_tokens']} slots revealed"
        rows.append((f"probability{slots}", state, "probability"))
        if "final_log_probability" in state["clean"] and fact["n_tokens"] - state["k"] > 1:
            rows.append(
                (f"final log-probability, restored at step {state['k']}", state, "final_log_probability")
            )
    return rows


def heat_figure(fact: FactRecord, mask: str = "░") -> Any:
    """Heatmaps of one fact, token by layer; a column a kind. Blue: what comes back; orange: what is lost.
    Clear where nothing happens.
    """
    rows = heat_rows(fact)
    labels = _labels(fact, mask)
    figure = new_figure(figsize=(11, len(rows) * (0.75 + 0.17 * len(labels))))
    grid = figure.subplots(len(rows), len(KINDS), squeeze=False, sharey=True)
    for line, (title, state, measure) in zip(grid, rows):
        most = max(float(np.abs(state["effects"][kind][measure]).max()) for kind in KINDS) or 1.0
        for axes, kind in zip(line, KINDS):
            values = np.array(state["effects"][kind][measure]).T
            shades = axes.imshow(
                values, aspect="auto", cmap=_shades(), vmin=-most, vmax=most, interpolation="nearest"
            )
            dressed(axes, TITLES[kind] if kind != "hidden" else f"{title}:\n{TITLES[kind]}")
            axes.set_yticks(range(len(labels)), labels, fontsize=7)
            axes.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 8)))
        scale = figure.colorbar(shades, ax=line, fraction=0.02, pad=0.01)
        scale.ax.tick_params(colors=INK, labelsize=7)
        scale.solids.set_rasterized(True)
        scale.outline.set_edgecolor(SOFT)
    return figure


def _labels(fact: FactRecord, mask: str) -> list[str]:
    """Texts of the tokens; the subject's with a star, as in ROME's figures, the slots with their numbers."""
    labels, slot = [], 0
    for text, name in zip(fact["tokens"], fact["classes"]):
        slot += name == "slots"
        star = "*" if name.startswith("subject") else ""
        labels.append(short(f"slot {slot}" if name == "slots" else text.strip() or repr(text))[:18] + star)
    return labels


def _shades() -> Any:
    """From orange over nothing to blue: see-through in the middle, so that it reads on light and dark
    ground.
    """
    matplotlib, _ = matplotlib_parts()
    from matplotlib.colors import ListedColormap

    strength = np.linspace(-1, 1, 255)
    loss, gain = matplotlib.colors.to_rgb("#d55e00"), matplotlib.colors.to_rgb("#2f8fd0")
    return ListedColormap([(*(gain if s > 0 else loss), abs(s) ** 0.8) for s in strength])


def group_title(group: str, measure: str) -> str:
    """What one average figure shows."""
    if measure == "final_log_probability":
        return (
            f"Temporal indirect effect, restored at {'the first step' if group == 'none' else 'a later step'}"
        )
    return f"Average indirect effect, {GROUPS[group]}"
