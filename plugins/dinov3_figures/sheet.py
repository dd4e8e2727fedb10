"""Contact sheets: rows of images under titles, first as one array, then as a figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from dinov3_figures.canvas import INK, MUTED, new_figure
from dinov3_figures.pixels import Pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 6  # pixels between images of a block
ROW_GAP = 16
_BLOCK_GAP = 20
_DPI = 100
_NOTE_GLYPH = 6.6  # pixels that a letter of the note takes, on average
_LARGEST = 1800  # pixels along a side of the finished sheet


@attrs.frozen
class Block:
    """A column of the sheet: ``n`` square images for each row, small ones in a grid."""

    title: str
    images: Pixels  # uint8 [rows, n, side, side, 3]


@attrs.frozen
class Sheet:
    """A composed sheet and where its blocks stand."""

    pixels: Pixels  # uint8 [H, W, 3], white between the images
    titles: Sequence[tuple[str, int, int]]  # (title, first pixel column, the one after the last)


def compose(blocks: Sequence[Block]) -> Sheet:
    """Lay blocks out side by side; all have the same number of rows.

    Images half as large as the largest stand two to a column within their block, and so on; a
    block lower than its row is centred in it.
    """
    largest = max(block.images.shape[2] for block in blocks)
    strips = [_strip(block.images, largest) for block in blocks]
    height = max(strip.shape[1] for strip in strips)
    columns: list[Pixels] = []
    titles: list[tuple[str, int, int]] = []
    left = 0
    for block, strip in zip(blocks, strips, strict=True):
        if columns:
            columns.append(_white(len(strip), height, _BLOCK_GAP))
            left += _BLOCK_GAP
        columns.append(_centred(strip, height))
        titles.append((block.title, left, left + strip.shape[2]))
        left += strip.shape[2]
    rows = np.concatenate(columns, axis=2)
    spaced = np.concatenate([rows, _white(len(rows), ROW_GAP, rows.shape[2])], axis=1)
    pixels = spaced.reshape(-1, *spaced.shape[2:])[:-ROW_GAP]
    return Sheet(pixels, titles)


def _strip(images: Pixels, largest: int) -> Pixels:
    """Each row's images [rows, n, side, side, 3] in a grid as high as ``largest`` allows."""
    rows, count, side = images.shape[:3]
    high = min(max(round(largest / side), 1), count)
    wide = math.ceil(count / high)
    pitch = side + GAP
    strip = _white(rows, high * pitch - GAP, wide * pitch - GAP)
    for index in range(count):
        top, left = index // wide * pitch, index % wide * pitch
        strip[:, top : top + side, left : left + side] = images[:, index]
    return strip


def _centred(strip: Pixels, height: int) -> Pixels:
    top = (height - strip.shape[1]) // 2
    rows, _, width = strip.shape[:3]
    below = height - strip.shape[1] - top
    return np.concatenate([_white(rows, top, width), strip, _white(rows, below, width)], axis=1)


def _white(rows: int, height: int, width: int) -> Pixels:
    return np.full((rows, height, width, 3), 255, dtype=np.uint8)


def draw_sheet(sheet: Sheet, title: str, note: str) -> Figure:
    """The sheet at one image pixel per figure pixel (or less, if large), with its titles."""
    rows, columns = sheet.pixels.shape[:2]
    scale = min(1.0, _LARGEST / max(rows, columns))
    width, height = columns * scale, rows * scale
    margin = 24
    across = max(width + 2 * margin, 560)
    note = "\n".join(
        textwrap.fill(line, int((across - 2 * margin) / _NOTE_GLYPH)) for line in note.splitlines()
    )
    head = 92 + 14 * len(note.splitlines())
    full = across, height + head + margin
    figure = new_figure(full[0] / _DPI, full[1] / _DPI, _DPI)
    axes = figure.add_axes(
        (margin / full[0], margin / full[1], width / full[0], height / full[1]), frameon=False
    )
    axes.imshow(sheet.pixels, interpolation="auto", aspect="auto")
    axes.set_axis_off()
    for text, left, right in sheet.titles:
        axes.annotate(
            text,
            ((left + right) / 2, 0),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
            annotation_clip=False,
        )
    at = margin / full[0]
    figure.text(at, 1 - 16 / full[1], title, va="top", fontsize=13, weight="bold", color=INK)
    figure.text(at, 1 - 40 / full[1], note, va="top", fontsize=9, color=MUTED)
    return figure
