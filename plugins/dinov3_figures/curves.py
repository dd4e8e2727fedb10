"""curves.png: every figure of ``metrics.jsonl`` in small multiples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3_figures.canvas import ALARM, FAINT, INK, MUTED, PALETTE, new_figure
from dinov3_figures.series import Array, Panel, Series, panels
from dinov3_framework import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 130
_PANEL = (4.2, 2.7)  # inches
_BINS = 300  # points of a smoothed curve
_SIGMA = 5.0  # of the smoothing kernel, in bins
_FEW = 30  # points up to which a curve is drawn with its points, and not smoothed
_LEGEND_WIDTH = 44  # characters
_DECADES = 50.0  # positive figures that span more than this factor get a logarithmic axis


def curves_figure(series: Mapping[str, Series], title: str) -> Figure:
    """Small multiples of all series; raises ``DataError`` if there are none."""
    shown = panels(series)
    if not shown:
        raise DataError("there are no curves to draw: metrics.jsonl holds no figures yet")
    columns = min(math.ceil(math.sqrt(len(shown))), 4)
    rows = math.ceil(len(shown) / columns)
    head = 0.55  # inches for the title
    size = (columns * _PANEL[0], rows * _PANEL[1] + head)
    figure = new_figure(*size, _DPI)
    figure.set_layout_engine(
        "constrained", rect=(0, 0, 1, 1 - head / size[1]), w_pad=0.12, h_pad=0.1
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, shown, strict=False):
        _draw_panel(axes, panel, series)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes in grid[max(len(shown) - columns, 0) : len(shown)]:
        axes.set_xlabel("iteration", fontsize=8, color=MUTED)
    top = 1 - 0.14 / size[1]
    figure.text(0.12 / size[0], top, title, va="top", fontsize=13, weight="bold", color=INK)
    note = "pale: as logged, strong: smoothed; the number is the curve's last value"
    figure.text(1 - 0.12 / size[0], top, note, va="top", ha="right", fontsize=8, color=MUTED)
    return figure


def smooth(iterations: Array, values: Array) -> tuple[Array, Array]:
    """A Gaussian mean of ``values`` [n], n > 0, at no more than 300 places.

    Values may be NaN: each mean is over what is finite under the kernel, so that neither the ends
    nor gaps pull it down.
    """
    bins = np.array_split(np.arange(len(values)), min(len(values), _BINS))
    finite = np.isfinite(values)
    filled = np.where(finite, values, 0.0)
    sums = np.array([filled[index].sum() for index in bins])
    counts = np.array([finite[index].sum() for index in bins], dtype=float)
    reach = int(min(3 * _SIGMA, (len(bins) - 1) // 2))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.convolve(sums, kernel, "same") / np.convolve(counts, kernel, "same")
    places = np.array([iterations[index].mean() for index in bins])
    known = np.isfinite(means)
    return places[known], means[known]


def _draw_panel(axes: Axes, panel: Panel, series: Mapping[str, Series]) -> None:
    curves = [series[name] for name in panel.names]
    low, high, logarithmic = _limits(curves, panel.exact)
    for place, (label, curve) in enumerate(zip(panel.labels, curves, strict=True)):
        style: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "lw": 1.6, "label": label}
        if len(curve.finite) == 0:
            axes.plot([], [], **style)
        elif panel.exact or len(curve.finite) <= _FEW:
            # Schedules often coincide; dashes let the one below be seen.
            style["ls"] = "--" if place and panel.exact else "-"
            _draw_exact(axes, curve, style)
        else:
            _draw_smoothed(axes, curve, style, (low, high), logarithmic)
    if logarithmic:
        axes.set_yscale("log")
    gaps = [curve.iterations[~np.isfinite(curve.values)] for curve in curves]
    above = [curve.iterations[curve.values > high] for curve in curves]
    below = [curve.iterations[curve.values < low] for curve in curves]
    _mark(axes, gaps, "not finite", 0.03, marker="x", color=ALARM)
    _mark(axes, above, "off scale", 0.97, marker="^", color=MUTED)
    _mark(axes, below, "off scale", 0.03, marker="v", color=MUTED)
    if any(map(len, above)) or any(map(len, below)):
        axes.set_ylim(low, high)
    _dress(axes, panel)


def _draw_exact(axes: Axes, curve: Series, style: dict[str, Any]) -> None:
    known = np.isfinite(curve.values)
    if known.sum() <= _FEW:
        style |= {"marker": "o", "markersize": 3, "ls": "-"}
    style["label"] += f" {curve.finite[-1]:.3g}"
    axes.plot(curve.iterations[known], curve.finite, **style)


def _draw_smoothed(
    axes: Axes,
    curve: Series,
    style: dict[str, Any],
    limits: tuple[float, float],
    logarithmic: bool,
) -> None:
    axes.plot(curve.iterations, curve.values, color=style["color"], lw=0.6, alpha=0.35)
    usual = np.clip(curve.values, *limits)  # a spike would bend the mean all around it
    if logarithmic:
        places, logs = smooth(curve.iterations, np.log(usual))
        means = np.exp(logs)
    else:
        places, means = smooth(curve.iterations, usual)
    style["label"] += f" {curve.finite[-1]:.3g}"
    axes.plot(places, means, **style)


def _limits(curves: Sequence[Series], exact: bool) -> tuple[float, float, bool]:
    """What a panel shows, and whether on a logarithmic axis: everything, but for few points so
    extreme that they would flatten the rest."""
    values = np.sort(np.concatenate([curve.finite for curve in curves]))
    if len(values) == 0:
        return 0.0, 0.0, False
    least, most = float(values[0]), float(values[-1])
    if exact or len(values) <= _FEW:
        return least, most, not exact and 0 < least * _DECADES < most
    few = max(len(values) // 100, 1)
    low, high = float(values[few]), float(values[-1 - few])
    if 0 < low * _DECADES < high:
        # What a logarithmic axis cannot show of positive figures are only zeros.
        return (least if least > 0 else low / _DECADES), most, True
    span = high - low
    if span == 0 or most - least <= 2 * span:
        return least, most, False
    return max(least, low - span / 4), min(most, high + span / 4), False


def _mark(
    axes: Axes, iterations: Sequence[Array], what: str, height: float, *, marker: str, color: str
) -> None:
    """Marks at some iterations of any curve at a fraction of the panel's height."""
    places = np.unique(np.concatenate(iterations))
    if len(places):
        axes.plot(
            places,
            np.full(len(places), height),
            ls="none",
            marker=marker,
            markersize=4,
            color=color,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label=f"{what}: {len(places):,}",
        )


def _dress(axes: Axes, panel: Panel) -> None:
    labels = axes.get_legend_handles_labels()[1]
    columns = 4 if sum(map(len, labels)) <= _LEGEND_WIDTH else 3
    # In points: the legend stands between the title and the panel, where it hides no curve.
    above = 5 + 13 * math.ceil(len(labels) / columns)
    axes.set_title(panel.title, loc="left", fontsize=10, weight="bold", color=INK, pad=above)
    axes.set_title(panel.unit, loc="right", fontsize=8, color=MUTED, pad=above)
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        fontsize=8,
        frameon=False,
        borderpad=0.2,
        borderaxespad=0,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.2,
        labelspacing=0.3,
    )
    legend.set_in_layout(False)  # a long one may run over the edge, but not squeeze the panel
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, which="both")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
