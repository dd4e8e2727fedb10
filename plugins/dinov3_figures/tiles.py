"""The pictures of the task: one for each image with its maps, and an overview of all."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from dinov3_figures.images import Seen
from dinov3_figures.maps import Maps
from dinov3_figures.sheet import COLOR_MAP, Mark, Pixels, Row, Tile, draw_sheet, pixels_of, to_rgb
from dinov3_framework import ImagesConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TILE, _LONGEST = 300, 640  # pixels along the side of a square tile; others have its area
_PITCH, _WIDEST = 190, 1800  # pixels that a tile's titles need, and all tiles of a row
_CELL, _SMALLEST_CELL = 150, 48  # pixels along a side of the overview's tiles
_TALLEST = 6000  # pixels of the overview, before its tiles become smaller


def tiles_of(seen: Seen, maps: Maps, spec: ImagesConfig, wanted: Collection[str]) -> list[Tile]:
    """The tiles of an image in the order in which they are shown: it first, then its maps.

    A map has a pixel for each patch.
    """
    height, width = seen.image.shape[-2:]
    rows, columns = maps.grid
    shown, note = pixels_of(to_rgb(seen.image, spec)), f"{width} x {height} px"
    if spec.channels not in (1, 3):
        note += f", channel{'s 1-3' if spec.channels > 3 else ' 1'} of {spec.channels}"
    tiles = [Tile(shown, title="image", note=note, head="image", marks=maps.marks)]

    def add(pixels: Pixels, title: str, note: str, head: str = "", *marks: Mark) -> None:
        tiles.append(Tile(pixels, (height, width), True, title, note, head or title, marks))

    if "pca" in wanted:
        variance = f"{sum(maps.pca_shares):.0%} of variance"
        add(maps.pca, "PCA", f"{columns} x {rows} patches, {variance}")
    if "foreground" in wanted:
        variance = f"{sum(maps.foreground_shares):.0%} of variance"
        note = f"{maps.foreground.mean():.0%} of patches, {variance}"
        add(maps.foreground_pca, "PCA of foreground", note)
    for mark in maps.marks:
        levels = (mark.similarity - maps.lowest) / (1 - maps.lowest) * 255
        pixels = color_table()[levels.round().clip(0, 255).astype(np.uint8)]
        note = f"{'at' if mark.what[0] == '[' else 'most typical of the'} {mark.what}"
        add(pixels, f"similarity to patch {mark.number}", note, f"to {mark.what}", mark)
    return tiles


def color_table() -> Pixels:
    """The colors of similarities from the lowest to 1, uint8 [256, 3]."""
    from matplotlib import colormaps

    table: Pixels = (colormaps[COLOR_MAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table


def panel(title: str, caption: str, tiles: Sequence[Tile], lowest: float | None) -> Figure:
    """An image and its maps side by side, with titles, marks and, from ``lowest``, a color bar."""
    height, width = tiles[0].size
    longest = min(max(height, width) * _TILE / math.sqrt(height * width), _LONGEST)
    sized = [_scaled(tile, longest) for tile in tiles]
    pitch = max(sized[0].size[1], _PITCH) + 22
    down = math.ceil(len(tiles) / max(_WIDEST // pitch, 1))
    across = math.ceil(len(tiles) / down)  # rows of about equal length
    rows = [Row(sized[start : start + across]) for start in range(0, len(tiles), across)]
    return draw_sheet(title, caption, rows, narrowest=_PITCH, lowest=lowest)


def overview(caption: str, every: Sequence[tuple[str, Sequence[Tile]]]) -> Figure:
    """A row for each image, given as its title and tiles, with its maps in columns; small."""
    # In the order of the image that has the most: an image may lack a mark.
    fullest = max((tiles for _, tiles in every), key=len)
    heads = dict.fromkeys(
        tile.head for tiles in (fullest, *(t for _, t in every)) for tile in tiles
    )
    cell = min(_CELL, max(_SMALLEST_CELL, _TALLEST // len(every) - 20))
    rows = []
    for title, tiles in every:
        by_head = {tile.head: _scaled(tile, cell) for tile in tiles}
        rows.append(Row([by_head.get(head) for head in heads], title))
    return draw_sheet("Patch features", caption, rows, list(heads), narrowest=110)


def _scaled(tile: Tile, longest: float) -> Tile:
    """A tile whose longer side has so many pixels."""
    height, width = tile.size
    scale = longest / max(height, width)
    return attrs.evolve(tile, size=(max(round(height * scale), 1), max(round(width * scale), 1)))
