"""Maps as tiles of one size: an array of pixels each, a title, and which patches to mark."""

from __future__ import annotations

from collections.abc import Collection

import attrs
import numpy as np
import torch
from torch.nn import functional as F

from dinov3_figures.pixels import Pixels, to_rgb
from dinov3_figures.visualize_images import Seen
from dinov3_figures.visualize_maps import Maps, Marked
from dinov3_framework import ImagesConfig

COLOUR_MAP = "viridis"  # of similarities: even steps, also to colour-blind eyes and in grey


@attrs.frozen(eq=False)
class Tile:
    """One picture of an image: itself at its own size, or a map with a pixel for each patch."""

    column: str  # what it shows; alike in all images
    title: str
    note: str
    pixels: Pixels  # uint8 [H, W, 3], or [h, w, 3]
    marks: tuple[int, ...] = ()  # numbers, from 1, of the marked patches to draw on it
    similarity: bool = False  # whether the colour bar is about it


def tiles_of(seen: Seen, maps: Maps, spec: ImagesConfig, wanted: Collection[str]) -> list[Tile]:
    """The tiles of an image in the order in which they are shown: it first, then its maps."""
    height, width = seen.image.shape[-2:]
    rows, columns = maps.grid
    every = tuple(range(1, len(maps.marked) + 1))
    note = f"{width} x {height} px{channels_shown(spec.channels)}"
    tiles = [Tile("image", "image", note, to_rgb(seen.image, spec), every)]
    if "pca" in wanted:
        note = f"{columns} x {rows} patches, {sum(maps.pca_shares):.0%} of variance"
        tiles.append(Tile("pca", "PCA", note, maps.pca))
    if "foreground" in wanted:
        share = sum(maps.foreground_shares)
        note = f"{maps.foreground_share:.0%} of patches, {share:.0%} of variance"
        tiles.append(Tile("foreground", "PCA of foreground", note, maps.foreground_pca))
    low = lowest(maps)
    for number, marked in enumerate(maps.marked, start=1):
        tiles.append(
            Tile(
                f"to {marked.what}",
                f"similarity to patch {number}",
                f"at {marked.what}" if marked.given else f"most typical of the {marked.what}",
                shade(marked, low),
                (number,),
                similarity=True,
            )
        )
    return tiles


def channels_shown(channels: int) -> str:
    """What to say of an image of which not all channels can be seen, such as ", channel 1 of 2"."""
    if channels in (1, 3):
        return ""
    return f", channels 1-3 of {channels}" if channels > 3 else f", channel 1 of {channels}"


def lowest(maps: Maps) -> float:
    """Where the colours of an image's similarities begin; they end at 1."""
    low = min((float(marked.similarity.min()) for marked in maps.marked), default=0.0)
    return low if low < 1 - 1e-4 else 0.0


def shade(marked: Marked, low: float) -> Pixels:
    """Similarities in ``low``..1 as colours, uint8 [h, w, 3]."""
    levels = ((marked.similarity - low) / (1 - low) * 255).round().clip(0, 255)
    return colour_table()[levels.astype(np.uint8)]


def colour_table() -> Pixels:
    """The colours of similarities from the lowest to 1, uint8 [256, 3]."""
    from matplotlib import colormaps

    table: Pixels = (colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table


def enlarged(tile: Tile, shape: tuple[int, int]) -> Pixels:
    """A tile at (height, width) pixels: images smoothly, maps with a block for each patch."""
    height, width = shape
    if tile.column != "image":
        rows, columns = tile.pixels.shape[:2]
        row = (np.arange(height) * 2 + 1) * rows // (2 * height)
        column = (np.arange(width) * 2 + 1) * columns // (2 * width)
        return tile.pixels[row[:, None], column]
    flat = torch.from_numpy(tile.pixels).permute(2, 0, 1)[None]
    smooth = F.interpolate(flat.contiguous(), shape, mode="bilinear", antialias=True)
    pixels: Pixels = smooth[0].permute(1, 2, 0).contiguous().numpy()
    return pixels


def box_of(marked: Marked, grid: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a marked patch as shares of the image."""
    rows, columns = grid
    return marked.column / columns, marked.row / rows, 1 / columns, 1 / rows
