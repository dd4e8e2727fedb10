"""Charts of runs side by side: bars with intervals, curves, confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dinov3_reports.charts import (
    ALARM,
    INK,
    LINES,
    MARKERS,
    MUTED,
    PALETTE,
    new_figure,
    plain,
    rendered,
    short,
)
from dinov3_reports.comparison import Row
from dinov3_reports.runs import Confusion, RunResults

_ACROSS = 3  # panels side by side
_WIDTH = 11.0  # inches
_FEW = 40  # points up to which a curve shows each
_NAMED = 24  # classes up to which they are named
_WRITTEN = 12  # and shares written


def style_of(place: int) -> dict[str, Any]:
    """How the run at a place among all is drawn: never by color alone."""
    return {
        "color": PALETTE[place % len(PALETTE)],
        "linestyle": LINES[place // len(PALETTE) % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def bars(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
    """A panel for each row, with a bar for each run that has it, and its 95 % interval."""
    down = math.ceil(len(rows) / _ACROSS)
    figure = new_figure(_WIDTH, down * (0.75 + 0.26 * len(names)))
    panels = figure.subplots(down, _ACROSS, squeeze=False).flatten()
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    for panel, row in zip(panels, rows, strict=False):
        ends = []
        for place, name in enumerate(names):
            record = row.records.get(name)
            if record is None or not math.isfinite(record.value):
                panel.annotate(
                    "none", (0, place), (3, 0), textcoords="offset points", va="center",
                    fontsize=8, color=MUTED,
                )  # fmt: skip
                continue
            color = PALETTE[place % len(PALETTE)]
            hatch = "///" if row.mark(name) == "odd" else ""
            panel.barh(
                place, record.value, color=color, height=0.68, hatch=hatch, edgecolor="white",
                linewidth=0,
            )  # fmt: skip
            low, high = record.interval or (record.value, record.value)
            if record.interval is not None:
                panel.plot([low, high], [place, place], color=INK, linewidth=1.4)
                panel.plot([low, high], [place] * 2, "|", color=INK, markersize=7)
            ends.append(max(high, record.value))
            star = "  best" if name in row.best else ""
            panel.annotate(
                f"{record.value:.4g}{star}", (max(high, record.value, 0), place), (4, 0),
                textcoords="offset points", va="center", fontsize=8.5, color=INK,
                weight="bold" if star else "normal",
            )  # fmt: skip
        panel.set_yticks(range(len(names)), [short(name, 20) for name in names], parse_math=False)
        panel.set_ylim(len(names) - 0.4, -0.6)
        plain(panel, short(f"{row.evaluation}: {row.metric}", 34))
        panel.grid(visible=False, axis="y")
        if ends and max(ends) > 0:
            panel.set_xlim(right=1.3 * max(ends))
        if not row.is_comparable:
            text = "NOT COMPARABLE: hatched" if row.best else "NOT COMPARABLE"
            panel.set_xlabel(text, color=ALARM, fontsize=9, weight="bold")
    return rendered(figure)


def curves(runs: Sequence[RunResults], metrics: Sequence[str]) -> np.ndarray:
    """A panel for each metric, with a line for each run that has it."""
    across = min(_ACROSS, len(metrics))
    down = math.ceil(len(metrics) / across)
    figure = new_figure(_WIDTH * (across + 0.3) / (_ACROSS + 0.3), 0.45 + 2.5 * down)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    handles: dict[str, Any] = {}
    for panel, metric in zip(panels, metrics, strict=False):
        for place, run in enumerate(runs):
            if metric not in run.series:
                continue
            series, style = run.series[metric], style_of(place)
            if len(series.iterations) > _FEW:
                style["markevery"] = max(len(series.iterations) // 8, 1)
            (handles[run.name],) = panel.plot(
                series.iterations, series.values, linewidth=1.6, markersize=4.5, **style
            )
        plain(panel, short(metric, 34), "iteration")
    names = [short(name, 40) for name in handles]
    legend = figure.legend(
        handles.values(), names, loc="outside upper left", ncols=min(len(names), 4),
        frameon=False, fontsize=9,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    return rendered(figure)


def confusions(found: Mapping[str, Confusion]) -> np.ndarray:
    """Matrices side by side: rows are true classes, each as shares of its images."""
    largest = max(len(each.counts) for each in found.values())
    across = min(len(found), 2 if largest > _WRITTEN else _ACROSS)
    down = math.ceil(len(found) / across)
    side = _WIDTH / across
    figure = new_figure(_WIDTH, down * min(side, 5.4))
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    for panel, (name, confusion) in zip(panels, found.items(), strict=False):
        shares = confusion.counts / np.maximum(confusion.counts.sum(1, keepdims=True), 1e-12)
        picture = panel.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        plain(panel, short(name, 40), "taken for", "true class")
        panel.grid(visible=False)
        count = len(shares)
        if count <= _NAMED:
            labels = [short(each, 16) for each in confusion.classes]
            panel.set_yticks(range(count), labels, parse_math=False, fontsize=8)
            panel.set_xticks(
                range(count), labels, parse_math=False, fontsize=8, rotation=45, ha="right",
                rotation_mode="anchor",
            )  # fmt: skip
        if count <= _WRITTEN:
            for row, column in np.argwhere(shares >= 0.005).tolist():
                share = float(shares[row, column])
                panel.text(
                    column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5,
                    color="white" if share < 0.55 else INK,
                )  # fmt: skip
        bar = figure.colorbar(picture, ax=panel, shrink=0.8, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    return rendered(figure)
