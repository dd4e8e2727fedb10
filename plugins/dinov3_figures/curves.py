"""curves.png: every metric of ``metrics.jsonl`` in small multiples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from dinov3_figures.sheet import FAINT, INK, MUTED
from dinov3_framework import DataError
from dinov3_framework.runtime.durable import parse_json, read_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray

# Panels of known metrics: title, unit, patterns of names, whether drawn without smoothing.
_KNOWN = (
    ("k-NN accuracy", "%", "*knn@*", True),
    ("Gradient norm", "before clipping", "gradient_norm/*", False),
    ("Loss weights", "", "*/weight", True),
    ("Learning rate", "", "lr last_layer_lr", True),
    ("Weight decay", "", "weight_decay", True),
    ("Teacher momentum", "", "momentum", True),
    ("Throughput", "images/s", "images_per_second", False),
    ("Time of an iteration", "s", "data_wait time/*", False),
)
_SIMILAR = 20.0  # metrics of a loss this many times larger or smaller get a panel of their own

# Okabe and Ito's colors, which color-blind readers can tell apart, without the yellow: too pale
# for a line on white.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_ALARM = "#d1242f"
_DPI = 130
_PANEL = (4.2, 2.7)  # inches
_HEAD = 0.55  # inches for the title
_BINS = 300  # points of a smoothed curve
_SIGMA = 5.0  # of the smoothing kernel, in bins
_FEW = 30  # points up to which a curve is drawn with its points, and not smoothed
_LEGEND_WIDTH = 44  # characters
_DECADES = 50.0  # positive metrics that span more than this factor get a logarithmic axis


@attrs.frozen(eq=False)
class Series:
    """One metric over the run: iterations [n] and values [n], NaN where it was not finite."""

    iterations: Array
    values: Array

    @property
    def finite(self) -> Array:
        known: Array = self.values[np.isfinite(self.values)]
        return known

    @property
    def size(self) -> float:
        return float(np.median(np.abs(self.finite))) if len(self.finite) else 0.0


@attrs.frozen
class Panel:
    """Curves that share axes; ``exact`` ones are drawn as they are, without smoothing."""

    title: str
    unit: str
    names: tuple[str, ...]
    exact: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names: of ``gradient_norm/backbone`` the last part, of ``dino/weight`` the first
        where the last would not tell the curves apart."""
        parts = [name.split("/") for name in self.names]
        choices = (tuple(part[-1] for part in parts), tuple(part[0] for part in parts), self.names)
        return next(labels for labels in choices if len(set(labels)) == len(self.names))


def read_series(path: Path) -> dict[str, Series]:
    """Every metric of a ``metrics.jsonl`` by name; {} where there is no file or no line.

    null stands for a number that was not finite. A line that is no JSON object with an iteration
    (the last one of a run that was killed) is left out, and so is what is no number.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for text in read_file(path).decode("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and _is_number(iteration := line.pop("iteration", None)):
            for name, value in line.items():
                if value is None or _is_number(value):
                    number = float("nan") if value is None else float(value)
                    points.setdefault(name, []).append((iteration, number))
    return {name: Series(*map(np.array, zip(*at, strict=True))) for name, at in points.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def panels(series: Mapping[str, Series]) -> list[Panel]:
    """The panels in the order in which one looks at a run: losses, known metrics, the rest."""
    losses = [name for name in series if f"{name}/weight" in series]
    weights = {f"{loss}/weight" for loss in losses}
    constant = {name for name in weights if len(np.unique(series[name].finite)) <= 1}
    left = [name for name in series if name not in constant]
    found: list[Panel] = []

    def add(title: str, unit: str, names: list[str], exact: bool = False) -> None:
        if names:
            found.append(Panel(title, unit, tuple(names), exact))
            left[:] = [name for name in left if name not in names]

    if "loss" in series:
        add("Total loss", "", ["loss"])
    for loss in losses:
        # With the metrics of its size; the others each have a panel of their own.
        size = series[loss].size
        parts = [name for name in left if name.startswith(f"{loss}/") and name not in weights]
        near = [n for n in parts if size / _SIMILAR <= series[n].size <= size * _SIMILAR]
        add(f"Loss “{loss}”", "before its weight", [loss, *near])
        for name in parts:
            if name not in near:
                add(name, "", [name])
    for title, unit, patterns, exact in _KNOWN:
        every = [n for pattern in patterns.split() for n in left if fnmatchcase(n, pattern)]
        add(title, unit, every, exact)
    for name in list(left):
        add(name, "", [name])
    return found


# --------------------------------------------------------------------------- drawing
def curves_figure(series: Mapping[str, Series], title: str) -> Figure:
    """Small multiples of all series; raises ``DataError`` if there are none."""
    from matplotlib.figure import Figure

    shown = panels(series)
    if not shown:
        raise DataError("there are no curves to draw: metrics.jsonl holds no metrics yet")
    columns = min(math.ceil(math.sqrt(len(shown))), 4)
    rows = math.ceil(len(shown) / columns)
    width, height = columns * _PANEL[0], rows * _PANEL[1] + _HEAD
    figure = Figure((width, height), _DPI, facecolor="white")
    figure.set_layout_engine(
        "constrained", rect=(0, 0, 1, 1 - _HEAD / height), w_pad=0.12, h_pad=0.1
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, shown, strict=False):
        _draw_panel(axes, panel, series)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes in grid[max(len(shown) - columns, 0) : len(shown)]:
        axes.set_xlabel("iteration", fontsize=8, color=MUTED)
    left, top = 0.12 / width, 1 - 0.14 / height
    figure.text(left, top, title, va="top", fontsize=13, weight="bold", color=INK)
    note = "pale: as logged, strong: smoothed; the number is the curve's last value"
    figure.text(1 - left, top, note, va="top", ha="right", fontsize=8, color=MUTED)
    return figure


def smooth(iterations: Array, values: Array) -> tuple[Array, Array]:
    """A Gaussian mean of ``values`` [n], n > 0, at no more than 300 places.

    Values may be NaN: each mean is over what is finite under the kernel, so that neither the ends
    nor gaps pull it down.
    """
    count = min(len(values), _BINS)
    bins = np.repeat(np.arange(count), [len(part) for part in np.array_split(values, count)])
    finite = np.isfinite(values)
    sums = np.bincount(bins, np.where(finite, values, 0.0))
    places = np.bincount(bins, iterations) / np.bincount(bins)
    reach = int(min(3 * _SIGMA, (count - 1) // 2))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SIGMA) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = np.convolve(np.bincount(bins, finite), kernel, "same")
        means = np.convolve(sums, kernel, "same") / weights
    known = np.isfinite(means)
    return places[known], means[known]


def _draw_panel(axes: Axes, panel: Panel, series: Mapping[str, Series]) -> None:
    curves = [series[name] for name in panel.names]
    low, high, logarithmic = _limits(curves, panel.exact)
    for place, (label, curve) in enumerate(zip(panel.labels, curves, strict=True)):
        last = f" {curve.finite[-1]:.3g}" if len(curve.finite) else ""
        style: dict[str, Any] = {"color": _PALETTE[place % len(_PALETTE)], "label": label + last}
        x, y = curve.iterations, curve.values
        few = len(curve.finite) <= _FEW
        if panel.exact or few:
            # Schedules often coincide; dashes let the one below be seen.
            style |= {"marker": "o", "markersize": 3} if few else {"ls": "--" if place else "-"}
            x, y = x[np.isfinite(y)], curve.finite
        else:
            axes.plot(x, y, color=style["color"], lw=0.6, alpha=0.35)
            usual = np.clip(y, low, high)  # a spike would bend the mean all around it
            x, y = smooth(x, np.log(usual) if logarithmic else usual)
            y = np.exp(y) if logarithmic else y
        axes.plot(x, y, lw=1.6, **style)
    marks = [("not finite", "x", _ALARM, 0.03, [~np.isfinite(curve.values) for curve in curves])]
    marks += [("off scale", "^", MUTED, 0.97, [curve.values > high for curve in curves])]
    marks += [("off scale", "v", MUTED, 0.03, [curve.values < low for curve in curves])]
    for what, marker, color, height, wanted in marks:
        found = [curve.iterations[mask] for curve, mask in zip(curves, wanted, strict=True)]
        places = np.unique(np.concatenate(found))
        if len(places):
            style = {"marker": marker, "color": color, "label": f"{what}: {len(places):,}"}
            style |= {"transform": axes.get_xaxis_transform(), "clip_on": False, "ls": "none"}
            axes.plot(places, np.full(len(places), height), ms=4, **style)
            if what == "off scale":
                axes.set_ylim(low, high)
    if logarithmic:
        axes.set_yscale("log")
    _dress(axes, panel)


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
        # What a logarithmic axis cannot show of positive metrics are only zeros.
        return (least if least > 0 else low / _DECADES), most, True
    span = high - low
    if span == 0 or most - least <= 2 * span:
        return least, most, False
    return max(least, low - span / 4), min(most, high + span / 4), False


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
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, which="both")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
