"""Charts of both reports, as pixels: plain, and to be told apart without colors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT, ALARM = "#1f2328", "#656d76", "#d8dee4", "#b3261e"
# Okabe and Ito's colors, which color-blind readers can tell apart, without the pale ones.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

DENSITY = 2  # pixels of a chart for each one on the page
_DPI = 96 * DENSITY
_BINS = 40


def new_figure(width: float, height: float) -> Figure:
    """``width`` and ``height`` in inches, of 96 pixels on the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9}):
        return Figure((width, height), _DPI, facecolor="white", layout="constrained")


def rendered(figure: Figure) -> np.ndarray:
    """A figure as uint8 [H, W, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    with Image.open(buffer) as image:
        return np.asarray(image.convert("RGB"))


def plain(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """The look that all axes share. Texts from data are no formulas."""
    axes.set_title(title, loc="left", fontsize=10, color=INK, weight="bold", parse_math=False)
    axes.set_xlabel(x, color=MUTED, fontsize=9, parse_math=False)
    axes.set_ylabel(y, color=MUTED, fontsize=9, parse_math=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def short(text: str, letters: int) -> str:
    """Text cut in its middle: both ends of a name say something."""
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"


# --------------------------------------------------------------------------- inspect
def sizes_chart(sizes: np.ndarray, marks: Sequence[tuple[float, str]] = ()) -> np.ndarray:
    """Widths against heights, and histograms of the shorter side and of the aspect ratio.

    ``sizes`` are heights and widths [n, 2]; ``marks`` are lines over the shorter side.
    """
    height, width = sizes.T.astype(float)
    shorter, aspect = np.minimum(height, width), width / height
    figure = new_figure(11, 3.2)
    first, second, third = figure.subplots(1, 3)
    first.scatter(width, height, s=9, color=PALETTE[0], alpha=0.35, linewidths=0)
    plain(first, "Width and height", "width, px", "height, px")
    if sizes.max() > 20 * sizes.min():
        first.set_xscale("log")
        first.set_yscale("log")
    low, high = float(min(width.min(), height.min())), float(max(width.max(), height.max()))
    first.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle=":")
    _histogram(second, shorter, logarithmic=shorter.max() > 20 * shorter.min())
    plain(second, "Shorter side", "px", "images")
    for place, (value, text) in enumerate(marks):
        second.axvline(value, color=PALETTE[1], linewidth=1.3, linestyle=LINES[1 + place % 3])
        second.annotate(
            text, (value, 1), (3, -10 - 11 * place), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip
    _histogram(third, aspect, logarithmic=True)
    third.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
    plain(third, "Aspect ratio", "width / height", "images")
    ticks = [t for t in (1 / 8, 1 / 4, 1 / 2, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 2, 4, 8)
             if aspect.min() * 0.9 <= t <= aspect.max() * 1.1]  # fmt: skip
    if aspect.max() > 3 * aspect.min():
        ticks = [tick for tick in ticks if np.log2(tick) % 1 == 0]
    third.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    third.minorticks_off()
    return rendered(figure)


def _histogram(axes: Axes, values: np.ndarray, logarithmic: bool) -> None:
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low * 0.9, high * 1.1
    edges: Any = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, 41)
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.hist(values, edges, color=PALETTE[0], edgecolor="white", linewidth=0.4)
    if logarithmic:
        axes.set_xscale("log")


def classes_chart(names: Sequence[str], counts: Sequence[int], what: str) -> np.ndarray:
    """Bars by class, from the largest; with too many to name, the sorted counts as a line."""
    if len(names) > 40:
        figure = new_figure(11, 3)
        axes = figure.subplots()
        axes.fill_between(range(len(counts)), counts, color=PALETTE[0], step="mid", linewidth=0)
        axes.set_ylim(0)
        plain(axes, f"{len(names):,} classes, from the largest", "classes", what)
        return rendered(figure)
    figure = new_figure(11, 0.55 + 0.23 * len(names))
    axes = figure.subplots()
    places = range(len(names))
    axes.barh(places, counts, color=PALETTE[0], height=0.72)
    axes.set_yticks(places, [short(name, 40) for name in names], parse_math=False)
    axes.invert_yaxis()
    for place, count in enumerate(counts):
        axes.annotate(
            f"{count:,}", (count, place), (4, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=INK if count else ALARM,
        )  # fmt: skip
    plain(axes, "", what)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08, y=0.01)
    return rendered(figure)
