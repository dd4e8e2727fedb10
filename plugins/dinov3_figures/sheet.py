"""Sheets of pictures: rows of tiles with titles and marks, drawn pixel by pixel and saved whole."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from torch import Tensor

from dinov3_framework import DataError, ImagesConfig
from dinov3_framework.runtime.output import output_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = np.ndarray  # uint8 [H, W, 3]

INK, MUTED, FAINT = "#1f2328", "#656d76", "#d8dee4"
COLOR_MAP = "viridis"  # of similarities: even steps, also to color-blind eyes and in gray

DPI = 100
_MARGIN = 24
_GAP = 16  # between tiles
_NARROWEST = 560  # pixels of a sheet
_SMALLEST_BOX = 9  # pixels along the side of a mark


@attrs.frozen(eq=False)
class Mark:
    """A marked patch, and how similar all patches of its image are to it."""

    number: int  # from 1
    row: int
    column: int
    what: str  # which it is: "[0.5, 0.5]", "foreground" or "background"
    similarity: np.ndarray  # cosines, float32 [rows, columns]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, width, height) as shares of the image."""
        rows, columns = self.similarity.shape
        return self.column / columns, self.row / rows, 1 / columns, 1 / rows


@attrs.frozen(eq=False)
class Tile:
    """A picture of a sheet, ``size`` (height, width) pixels large; left out, its own."""

    pixels: Pixels
    size: tuple[int, int] = attrs.field()
    crisp: bool = False  # whether a pixel is enlarged to a square, as those of maps
    title: str = ""
    note: str = ""
    head: str = ""  # of its column, where the sheet has columns
    marks: Sequence[Mark] = ()

    @size.default
    def _own_size(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]


@attrs.frozen(eq=False)
class Row:
    """Tiles side by side, None where there is none in a column, under a label."""

    tiles: Sequence[Tile | None]
    label: str = ""


def to_rgb(images: Tensor, spec: ImagesConfig) -> Tensor:
    """Images [..., C, H, W], uint8 or normalized float, as uint8 RGB [..., 3, H, W] on the CPU.

    One channel becomes gray, three are red, green and blue. Of any other number the first three
    (of two, the first) are shown, each stretched to its own range within an image: such channels
    often fill a small part of theirs. Raises ``DataError`` where C is not ``spec.channels``.
    """
    if images.ndim < 3 or images.shape[-3] != spec.channels:
        raise DataError(
            f"crops of shape {list(images.shape)} where [..., {spec.channels}, H, W] is expected: "
            "images.channels must be what the augmentation gives"
        )
    values = images.detach().cpu().float()
    if images.dtype == torch.uint8:
        values = values / 255
    else:
        mean, std = (torch.tensor(each)[:, None, None] for each in (spec.mean, spec.std))
        values = values * std + mean
    if spec.channels not in (1, 3):
        values = values[..., : 3 if spec.channels > 3 else 1, :, :]
        low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
        values = (values - low) / (high - low).clamp_min(1e-6)
    shown = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return shown.expand(*shown.shape[:-3], 3, *shown.shape[-2:])


def fit(images: Tensor, side: int) -> Tensor:
    """Square images [..., s, s] at ``side`` pixels: whole pixels repeated where that fits."""
    from torchvision.transforms.v2 import InterpolationMode as Mode
    from torchvision.transforms.v2.functional import resize

    mode = Mode.BILINEAR if side % images.shape[-1] else Mode.NEAREST_EXACT
    resized: Tensor = resize(images.contiguous(), [side, side], mode, antialias=True)
    return resized


def pixels_of(image: Tensor) -> Pixels:
    """A uint8 image [3, H, W] as an array [H, W, 3]."""
    pixels: Pixels = image.permute(1, 2, 0).contiguous().numpy()
    return pixels


# --------------------------------------------------------------------------- drawing
def draw_sheet(
    title: str,
    note: str,
    rows: Sequence[Row],
    heads: Sequence[str] = (),
    *,
    narrowest: int = 0,
    lowest: float | None = None,
) -> Figure:
    """Rows of tiles under the sheet's title; a pixel of a tile's size is a pixel of the figure.

    ``heads`` stand above the columns; without them each tile has its title and note above it.
    Columns are at least ``narrowest`` pixels wide. ``lowest`` adds a bar of colors from there to 1.
    """
    count = max(len(row.tiles) for row in rows)
    tiles = [(c, tile) for row in rows for c, tile in enumerate(row.tiles) if tile]
    widths = [max(narrowest, *(tile.size[1] for c, tile in tiles if c == n)) for n in range(count)]
    lefts = [_MARGIN + sum(widths[:c]) + _GAP * c for c in range(count)]
    bar = 0 if lowest is None else 76
    full = max(lefts[-1] + widths[-1] + bar + _MARGIN, _NARROWEST)
    inner = full - 2 * _MARGIN
    lines = [part for line in note.splitlines() for part in textwrap.wrap(line, _letters(inner, 9))]
    head = 15 * max((text.count("\n") + 1 for text in heads), default=0)
    above = 20 * any(row.label for row in rows) + (0 if heads else 40)
    heights = [above + max(tile.size[0] for tile in row.tiles if tile) for row in rows]
    top = 64 + 15 * len(lines)
    full_height = top + head + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN
    canvas = _Canvas(full, full_height)
    canvas.text(_MARGIN, 16, cut(title, _letters(inner, 13, bold=True)), 13, weight="bold")
    canvas.text(_MARGIN, 42, "\n".join(lines), 9, color=MUTED)
    for left, width, text in zip(lefts, widths, heads, strict=False):
        shown = "\n".join(cut(t, _letters(width + 10, 8.5, bold=True)) for t in text.splitlines())
        canvas.text(left, top - 4, shown, 8.5, weight="bold")
    top += head
    for row, height in zip(rows, heights, strict=True):
        canvas.text(_MARGIN, top, cut(row.label, _letters(inner, 8)), 8, color=MUTED)
        for left, tile in zip(lefts, row.tiles, strict=False):
            if tile:
                canvas.draw(tile, left, top + above, titled=not heads)
        top += height + _GAP
    if lowest is not None and (last := rows[-1].tiles[-1]):
        left = lefts[len(rows[-1].tiles) - 1] + last.size[1] + 12
        canvas.draw_bar(lowest, left, top - _GAP - last.size[0], last.size[0])
    return canvas.figure


class _Canvas:
    """A figure on which things have their places in pixels from the top left."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure((width / DPI, height / DPI), DPI, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        below = self.height - top - height
        sides = self.width, self.height, self.width, self.height
        place = [at / side for at, side in zip((left, below, width, height), sides, strict=True)]
        return self.figure.add_axes(tuple(place))

    def text(self, left: float, top: float, text: str, size: float, **style: Any) -> None:
        style = {"color": INK, "va": "top", "fontsize": size, **style}
        # Names of files may hold dollar signs, which are no formulas.
        at = (left / self.width, 1 - top / self.height)
        self.figure.text(*at, text, parse_math=False, **style)

    def draw(self, tile: Tile, left: float, top: float, *, titled: bool) -> None:
        height, width = tile.size
        if titled:
            self.text(left, top - 38, tile.title, 9.5, weight="bold")
            self.text(left, top - 20, tile.note, 8, color=MUTED)
        axes = self.axes(left, top, width, height)
        blend = "nearest" if tile.crisp else "antialiased"
        axes.imshow(tile.pixels, interpolation=blend, aspect="auto", extent=(0, width, height, 0))
        axes.set_axis_off()
        for mark in tile.marks:
            _draw_mark(axes, mark, width, height, numbered=titled and not tile.crisp)

    def draw_bar(self, low: float, left: float, top: float, height: float) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        colors = ScalarMappable(Normalize(low, 1), COLOR_MAP)
        bar = self.figure.colorbar(colors, cax=self.axes(left, top, 12, height))
        bar.set_ticks([low, (1 + low) / 2, 1], labels=[f"{x:.2f}" for x in (low, (1 + low) / 2, 1)])
        bar.ax.tick_params(labelsize=8, colors=MUTED, length=3)
        bar.outline.set_edgecolor(FAINT)
        self.text(left, top - 20, "cosine", 8, color=MUTED)


def _draw_mark(axes: Axes, mark: Mark, width: int, height: int, *, numbered: bool) -> None:
    """A box around a patch, and its number beside it, on the side towards the middle."""
    from matplotlib.patches import Rectangle

    left, top, *sides = mark.box
    x, y = (left + sides[0] / 2) * width, (top + sides[1] / 2) * height
    across, down = max(sides[0] * width, _SMALLEST_BOX), max(sides[1] * height, _SMALLEST_BOX)
    # A dark line under a white one shows on any color.
    for line, color in ((3.0, INK), (1.3, "white")):
        box = Rectangle((x - across / 2, y - down / 2), across, down, fill=False, lw=line, ec=color)
        axes.add_patch(box).set_clip_on(False)
    if numbered:
        beside = (across / 2 + 10) * (1 if x < width / 2 else -1)
        style = {"color": "white", "fontsize": 8, "weight": "bold", "ha": "center", "va": "center"}
        frame = {"boxstyle": "round,pad=0.2", "fc": INK, "ec": "white", "lw": 0.8}
        axes.text(x + beside, y, str(mark.number), bbox=frame, **style)


def _letters(width: float, size: float, *, bold: bool = False) -> int:
    """How many letters of a size in points ``width`` pixels hold, about."""
    return int(width / (size * DPI / 72 * (0.64 if bold else 0.56)))


def cut(text: str, letters: int) -> str:
    """Text cut in its middle: both ends of a path say something."""
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"


def save_png(figure: Figure, path: Path) -> None:
    """Write ``path``, whole, with equal bytes for equal figures; raises ``OutputError``."""
    with output_file(path) as aside:
        figure.savefig(aside, format="png", dpi=figure.dpi, metadata={"Software": None})
