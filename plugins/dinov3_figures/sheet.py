"""Sheets of pictures: rows of tiles with titles and marks, drawn pixel by pixel and saved whole."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import accumulate, zip_longest
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
DPI = 100
_MARGIN = 24
_GAP = 16  # between tiles
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
    rows: Sequence[Sequence[Tile | None]],
    *,
    heads: Sequence[str] = (),
    labels: Sequence[str] = (),
    narrowest: int = 0,
    lowest: float | None = None,
) -> Figure:
    """Rows of tiles under the sheet's title; a pixel of a tile's size is a pixel of the figure.

    ``heads`` stand above the columns, ``labels`` above the rows; without heads each tile has its
    title and note above it. Columns are at least ``narrowest`` pixels wide. ``lowest`` adds a bar
    of colors from there to 1.
    """
    from matplotlib.figure import Figure

    columns = list(zip_longest(*rows))
    widths = [max(narrowest, *(tile.size[1] for tile in column if tile)) for column in columns]
    lefts = [_MARGIN + sum(widths[:c]) + _GAP * c for c in range(len(widths))]
    inner = max(lefts[-1] + widths[-1] - _MARGIN + (76 if lowest is not None else 0), 512)
    heads = [
        "\n".join(
            textwrap.fill(line, _letters(width + 10, 8.5, True)) for line in head.splitlines()
        )
        for head, width in zip(heads, widths, strict=False)
    ]
    lines = [part for line in note.splitlines() for part in textwrap.wrap(line, _letters(inner, 9))]
    above = 20 * bool(labels) + (0 if heads else 40)
    tops = [64 + 15 * len(lines) + 15 * max((head.count("\n") + 1 for head in heads), default=0)]
    tops += [above + _GAP + max(tile.size[0] for tile in row if tile) for row in rows]
    tops = list(accumulate(tops))
    width, height = inner + 2 * _MARGIN, tops[-1] - _GAP + _MARGIN
    figure = Figure((width / DPI, height / DPI), DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # its units are pixels from the top left

    def write(x: float, y: float, text: str, size: float, space: float = 0, **style: Any) -> None:
        letters = _letters(space or inner, size, "weight" in style)
        text = "\n".join(cut(line, letters) for line in text.splitlines())
        # Names of files may hold dollar signs, which are no formulas.
        style = {"color": INK, "va": "top", "parse_math": False, **style}
        axes.text(x, y, text, fontsize=size, **style)

    write(_MARGIN, 16, title, 13, weight="bold")
    write(_MARGIN, 42, "\n".join(lines), 9, color=MUTED)
    for left, across, head in zip(lefts, widths, heads, strict=False):
        write(left, tops[0] - 6, head, 8.5, across + 10, weight="bold", va="bottom")
    for top, label in zip(tops, labels, strict=False):
        write(_MARGIN, top, label, 8, color=MUTED)
    for top, row in zip(tops, rows, strict=False):
        for left, tile in zip(lefts, row, strict=False):
            if tile:
                _draw_tile(axes, tile, left, top + above, numbered=not heads)
                if not heads:
                    write(left, top + 2, tile.title, 9.5, weight="bold")
                    write(left, top + 20, tile.note, 8, color=MUTED)
    if lowest is not None:
        x, y = lefts[len(rows[-1]) - 1] + widths[len(rows[-1]) - 1] + 12, tops[-2] + above
        high = tops[-1] - _GAP - y
        write(x, y - 20, "cosine", 8, color=MUTED)
        axes.imshow(color_table()[::-1, None], aspect="auto", extent=(x, x + 12, y + high, y))
        for share in (0, 0.5, 1):
            value = f"{lowest + (1 - lowest) * share:.2f}"
            write(x + 18, y + high * (1 - share), value, 8, color=MUTED, va="center")
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure


def _draw_tile(axes: Axes, tile: Tile, left: int, top: int, *, numbered: bool) -> None:
    """A picture, boxes around its marks, and, if it is no map, their numbers beside these."""
    from matplotlib.patches import Rectangle

    height, width = tile.size
    place = (left, left + width, top + height, top)
    blend = "nearest" if tile.crisp else "antialiased"
    axes.imshow(tile.pixels, interpolation=blend, aspect="auto", extent=place)
    for mark in tile.marks:
        at_left, at_top, wide, high = mark.box
        x, y = left + (at_left + wide / 2) * width, top + (at_top + high / 2) * height
        wide, high = max(wide * width, _SMALLEST_BOX), max(high * height, _SMALLEST_BOX)
        # A dark line under a white one shows on any color.
        for line, color in ((3.0, INK), (1.3, "white")):
            corner = x - wide / 2, y - high / 2
            axes.add_patch(Rectangle(corner, wide, high, fill=False, lw=line, ec=color, zorder=2))
        if numbered and not tile.crisp:
            beside = (wide / 2 + 10) * (1 if at_left < 0.5 else -1)  # towards the middle
            frame = {"boxstyle": "round,pad=0.2", "fc": INK, "ec": "white", "lw": 0.8}
            style = {"color": "white", "fontsize": 8, "weight": "bold", "bbox": frame}
            axes.text(x + beside, y, str(mark.number), ha="center", va="center", **style)


def color_table() -> Pixels:
    """The colors of similarities from the lowest to 1, uint8 [256, 3]."""
    from matplotlib import colormaps

    # Even steps, also to color-blind eyes and in gray.
    table: Pixels = (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table


def _letters(width: float, size: float, bold: bool = False) -> int:
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
