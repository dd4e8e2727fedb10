"""The pictures: one for each image with its maps side by side, and an overview of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from dinov3_figures.canvas import FAINT, INK, MUTED, new_figure
from dinov3_figures.visualize_maps import Maps
from dinov3_figures.visualize_tiles import COLOUR_MAP, Tile, box_of, enlarged, lowest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100
_MARGIN = 24
_TILE = 300  # pixels along the side of a square tile; others have its area
_LONGEST_TILE = 640
_NARROWEST = 190  # pixels that titles need
_GAP = 22
_TITLES = 40  # pixels above a tile for its two lines
_HEAD = 84  # and above all for the picture's own
_WIDEST = 1800  # pixels of tiles in one row
_BAR = 12  # pixels that the colour bar is wide
_BAR_LABELS = 64
_CELL, _SMALLEST_CELL = 150, 48  # pixels along a side of the overview's tiles
_TALLEST = 6000  # pixels of the overview, before its tiles become smaller
_SMALLEST_BOX = 9  # pixels along the side of a mark


@attrs.frozen(eq=False)
class Shown:
    """One image with all that is drawn of it."""

    name: str
    label: str
    maps: Maps
    tiles: Sequence[Tile]

    @property
    def heading(self) -> str:
        return f"{self.name}  ({self.label})" if self.label else self.name


class _Sheet:
    """A figure on which things have their places in pixels from the top left."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = new_figure(width / _DPI, height / _DPI, _DPI)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        place = (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )
        return self.figure.add_axes(place)

    def text(self, left: float, top: float, text: str, size: float, **style: Any) -> None:
        style = {"color": INK, "va": "top", "fontsize": size, **style}
        # Names of files may hold dollar signs, which are no formulas.
        at = (left / self.width, 1 - top / self.height)
        self.figure.text(*at, text, parse_math=False, **style)


# --------------------------------------------------------------------------- one image
def panel(shown: Shown, caption: str) -> Figure:
    """An image and its maps side by side, with titles, marks and a colour bar."""
    width, height = _of_area(shown, _TILE**2)
    column = max(width, _NARROWEST)
    pitch = column + _GAP
    down = math.ceil(len(shown.tiles) / max(_WIDEST // pitch, 1))
    across = math.ceil(len(shown.tiles) / down)  # rows of about equal length
    similar = any(tile.similarity for tile in shown.tiles)
    full = across * pitch - _GAP + 2 * _MARGIN + (_BAR + _BAR_LABELS if similar else 0)
    full = max(full, 640)
    sheet = _Sheet(full, _HEAD + down * (_TITLES + height + _GAP) - _GAP + _MARGIN)
    sheet.text(
        _MARGIN, 16, _cut(shown.heading, full - 2 * _MARGIN, 13, bold=True), 13, weight="bold"
    )
    sheet.text(_MARGIN, 42, _cut(caption, full - 2 * _MARGIN, 9), 9, color=MUTED)
    left = top = 0.0
    for place, tile in enumerate(shown.tiles):
        left = _MARGIN + place % across * pitch
        top = _HEAD + place // across * (_TITLES + height + _GAP) + _TITLES
        sheet.text(left, top - 38, tile.title, 9.5, weight="bold")
        sheet.text(left, top - 20, tile.note, 8, color=MUTED)
        _draw_tile(sheet, tile, shown.maps, (left, top), (width, height), numbers=True)
    if similar:
        _draw_bar(sheet, lowest(shown.maps), left + column + 12, top, height)
    return sheet.figure


def _of_area(shown: Shown, area: float) -> tuple[int, int]:
    """(width, height) of a tile with about ``area`` pixels, but not too long."""
    rows, columns = shown.tiles[0].pixels.shape[:2]
    longest = max(rows, columns) * math.sqrt(area / (rows * columns))
    return _of_length(shown, min(longest, _LONGEST_TILE))


def _of_length(shown: Shown, longest: float) -> tuple[int, int]:
    """(width, height) of a tile at the image's aspect, by its longer side."""
    rows, columns = shown.tiles[0].pixels.shape[:2]
    scale = longest / max(rows, columns)
    return max(round(columns * scale), 1), max(round(rows * scale), 1)


def _draw_tile(
    sheet: _Sheet,
    tile: Tile,
    maps: Maps,
    place: tuple[float, float],
    shape: tuple[int, int],
    *,
    numbers: bool,
) -> None:
    from matplotlib.patches import Rectangle

    width, height = shape
    axes = sheet.axes(*place, width, height)
    axes.imshow(
        enlarged(tile, (height, width)),
        interpolation="none",
        aspect="auto",
        extent=(0, width, height, 0),
    )
    axes.set_axis_off()
    for number in tile.marks:
        across, down, wide, high = box_of(maps.marked[number - 1], maps.grid)
        middle = (across + wide / 2) * width, (down + high / 2) * height
        sides = max(wide * width, _SMALLEST_BOX), max(high * height, _SMALLEST_BOX)
        corner = _inside(middle[0], sides[0], width), _inside(middle[1], sides[1], height)
        # A dark line under a white one shows on any colour.
        for line, colour in ((3.0, INK), (1.3, "white")):
            axes.add_patch(Rectangle(corner, *sides, fill=False, lw=line, ec=colour))
        if numbers and tile.column == "image":
            _draw_number(axes, number, corner, sides, shape)


def _inside(middle: float, side: float, length: float) -> float:
    """Where a box around ``middle`` begins whose lines do not stick out of 0..``length``."""
    return max(min(middle - side / 2, length - side - 1), 1.0)


def _draw_number(
    axes: Axes,
    number: int,
    corner: tuple[float, float],
    sides: tuple[float, float],
    shape: tuple[int, int],
) -> None:
    """The number of a mark right of its box, or left of it at the right edge."""
    at_edge = corner[0] + sides[0] + 20 > shape[0]
    left = corner[0] - 10 if at_edge else corner[0] + sides[0] + 10
    axes.text(
        left,
        min(max(corner[1] + sides[1] / 2, 9), shape[1] - 9),
        str(number),
        color="white",
        fontsize=8,
        weight="bold",
        ha="center",
        va="center",
        bbox={"boxstyle": "round,pad=0.2", "fc": INK, "ec": "white", "lw": 0.8},
    )


def _draw_bar(sheet: _Sheet, low: float, left: float, top: float, height: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = sheet.axes(left, top, _BAR, height)
    bar = sheet.figure.colorbar(ScalarMappable(Normalize(low, 1), COLOUR_MAP), cax=axes)
    bar.set_ticks([low, (1 + low) / 2, 1], labels=[f"{low:.2f}", f"{(1 + low) / 2:.2f}", "1.00"])
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=3)
    bar.outline.set_edgecolor(FAINT)
    sheet.text(left, top - 20, "cosine", 8, color=MUTED)


# --------------------------------------------------------------------------- all images
def overview(every: Sequence[Shown], title: str, caption: str) -> Figure:
    """A row for each image, its maps in columns; small."""
    names = {tile.column: _short(tile) for shown in every for tile in shown.tiles}
    columns = sorted(names, key=_column_order(every))
    line = 20  # pixels for the name above a row
    cell = min(_CELL, max(_SMALLEST_CELL, _TALLEST // len(every) - line))
    pitch = max(cell, 110) + 10
    full = max(len(columns) * pitch - 10 + 2 * _MARGIN, 640)
    shapes = [_of_length(shown, cell) for shown in every]
    below = sum(line + height + 10 for _, height in shapes)
    sheet = _Sheet(full, _HEAD + 24 + below + _MARGIN)
    sheet.text(_MARGIN, 16, title, 13, weight="bold")
    sheet.text(_MARGIN, 42, _cut(caption, full - 2 * _MARGIN, 9), 9, color=MUTED)
    for place, column in enumerate(columns):
        head = _cut(names[column], pitch - 6, 8.5, bold=True)
        sheet.text(_MARGIN + place * pitch, _HEAD, head, 8.5, weight="bold")
    top = _HEAD + 24
    for shown, shape in zip(every, shapes, strict=True):
        sheet.text(_MARGIN, top, _cut(shown.heading, full - 2 * _MARGIN, 8), 8, color=MUTED)
        for tile in shown.tiles:
            left = _MARGIN + columns.index(tile.column) * pitch
            _draw_tile(sheet, tile, shown.maps, (left, top + line), shape, numbers=False)
        top += line + shape[1] + 10
    return sheet.figure


def _short(tile: Tile) -> str:
    """The head of a tile's column; a mark's number may differ from image to image."""
    return tile.column if tile.similarity else tile.title


def _column_order(every: Sequence[Shown]) -> Callable[[str], int]:
    """By the place in the image that has the most tiles: an image may lack a mark."""
    fullest = max(every, key=lambda shown: len(shown.tiles))
    order = [tile.column for tile in fullest.tiles]
    return lambda column: order.index(column) if column in order else len(order)


def _cut(text: str, width: float, size: float, *, bold: bool = False) -> str:
    """Text cut in its middle to what ``width`` pixels hold: both ends of a path tell something."""
    letters = int(width / (size * _DPI / 72 * (0.64 if bold else 0.56)))
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"
