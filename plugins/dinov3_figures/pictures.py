"""Pictures of images with their maps: one for each, an overview, and a page to explore them."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import numpy as np
from markupsafe import Markup

from dinov3_figures.images import Seen
from dinov3_figures.maps import Codes, Maps
from dinov3_figures.sheet import Mark, Pixels, Tile, color_table, draw_sheet, pixels_of, to_rgb
from dinov3_framework import ImagesConfig
from dinov3_framework.runtime.report import Image, Section, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TILE, _LONGEST = 300, 640  # pixels along the side of a square tile; others have its area
_PITCH, _WIDEST = 225, 1800  # pixels that a tile's titles need, and all tiles of a row
_CELL, _SMALLEST_CELL = 150, 48  # pixels along a side of the overview's tiles
_TALLEST = 6000  # pixels of the overview, before its tiles become smaller


@attrs.frozen(eq=False)
class Shown:
    """One image with all that is drawn of it."""

    seen: Seen
    maps: Maps
    tiles: Sequence[Tile]
    codes: Codes | None  # for similarities under the pointer
    figure: str  # path of its picture from the page

    @property
    def title(self) -> str:
        return f"{self.seen.name}  ({self.seen.label})" if self.seen.label else self.seen.name


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
        add(pixels, f"similarity to patch {mark.number}", note, f"similarity\nto {mark.what}", mark)
    return tiles


def panel(shown: Shown, caption: str) -> Figure:
    """An image and its maps side by side, with titles, marks and a color bar."""
    height, width = shown.tiles[0].size
    longest = min(max(height, width) * _TILE / math.sqrt(height * width), _LONGEST)
    tiles = [_scaled(tile, longest) for tile in shown.tiles]
    pitch = max(tiles[0].size[1], _PITCH) + 22
    down = math.ceil(len(tiles) / max(_WIDEST // pitch, 1))
    across = math.ceil(len(tiles) / down)  # rows of about equal length
    rows = [tiles[start : start + across] for start in range(0, len(tiles), across)]
    lowest = shown.maps.lowest if shown.maps.marks else None
    return draw_sheet(shown.title, caption, rows, narrowest=_PITCH, lowest=lowest)


def overview(every: Sequence[Shown], caption: str) -> Figure:
    """A row for each image, its maps in columns; small."""
    # In the order of the image that has the most: an image may lack a mark.
    fullest = sorted(every, key=lambda shown: -len(shown.tiles))
    heads = list(dict.fromkeys(tile.head for shown in fullest for tile in shown.tiles))
    cell = min(_CELL, max(_SMALLEST_CELL, _TALLEST // len(every) - 20))
    rows = []
    for shown in every:
        tiles = {tile.head: _scaled(tile, cell) for tile in shown.tiles}
        rows.append([tiles.get(head) for head in heads])
    labels = [shown.title for shown in every]
    return draw_sheet("Patch features", caption, rows, heads=heads, labels=labels, narrowest=110)


def _scaled(tile: Tile, longest: float) -> Tile:
    """A tile whose longer side has so many pixels."""
    scale = longest / max(tile.size)
    height, width = (max(round(side * scale), 1) for side in tile.size)
    return attrs.evolve(tile, size=(height, width))


# --------------------------------------------------------------------------- the page
def write_page(
    path: Path, facts: Mapping[str, str], notes: Sequence[str], every: Sequence[Shown]
) -> None:
    """Facts about the run, notes, and a section for each image; raises ``OutputError``."""
    script = resources.files("dinov3_figures").joinpath("explore.js").read_text("utf-8")
    colors = ", ".join("#" + bytes(color).hex() for color in color_table()[::15])
    write_report(
        path,
        "What the patch features see",
        [Section(blocks=[facts, *notes]), *map(_section, every)],
        style=f"{_STYLE}.scale {{ background: linear-gradient(to right, {colors}); }}\n",
        script=script if any(shown.codes for shown in every) else "",
    )


def _section(shown: Shown) -> Section:
    height, width = shown.tiles[0].pixels.shape[:2]
    # Tall images narrower and wide ones wider, so that tiles take about the same area.
    across = min(max(round(224 * (width / height) ** 0.5), 112), 360)
    images = [
        Image(
            tile.pixels,
            tile.title,
            tile.note,
            alt=f"{shown.seen.name}: {tile.title}, {tile.note}",
            width=across,
            crisp=tile.crisp,
            over=Markup("").join(_mark(mark, numbered=not tile.crisp) for mark in tile.marks),
        )
        for tile in shown.tiles
    ]
    below = Markup('<a href="{}">as one picture</a>').format(shown.figure)
    if shown.maps.marks:
        scale = Markup('cosine {:.2f} <i class="scale"></i> 1.00 &emsp; ')
        below = scale.format(shown.maps.lowest) + below
    return Section(shown.seen.name, [images, below], shown.seen.label, _data(shown))


def _mark(mark: Mark, *, numbered: bool) -> Markup:
    left = " left" if mark.box[0] > 0.5 else ""  # the number's side is that towards the middle
    number = Markup("<b>{}</b>").format(mark.number) if numbered else ""
    style = "left:{:.4%};top:{:.4%};width:{:.4%};height:{:.4%}".format(*mark.box)
    return Markup('<div class="mark{}" style="{}">{}</div>').format(left, style, number)


def _data(shown: Shown) -> dict[str, str]:
    """What the script needs to know of a section."""
    if shown.codes is None:
        return {}
    rows, columns = shown.maps.grid
    starts = [mark.row * columns + mark.column for mark in shown.maps.marks]
    return {
        "grid": f"{rows},{columns}",
        "start": str((starts or [rows * columns // 2])[0]),
        "weights": ",".join(f"{weight:.9g}" for weight in shown.codes.weights),
        "values": base64.b64encode(shown.codes.values.tobytes()).decode("ascii"),
        "colors": base64.b64encode(color_table().tobytes()).decode("ascii"),
    }


_STYLE = """\
.live .frame { cursor: crosshair; touch-action: manipulation; }
.frame:focus-visible { outline: 3px solid #0969da; outline-offset: 2px; }
.mark { position: absolute; border: 1.5px solid #fff; box-shadow: 0 0 0 1px var(--ink);
  min-width: 7px; min-height: 7px; pointer-events: none; }
.mark b { position: absolute; left: calc(100% + 3px); top: 50%; transform: translateY(-50%);
  background: var(--ink); color: #fff; border: 1px solid #fff; border-radius: 4px;
  font-size: 11px; line-height: 1; padding: 2px 4px; }
.mark.left b { left: auto; right: calc(100% + 3px); }
.pointer { border-color: #ffb000; }
.scale { display: inline-block; width: 160px; height: 10px; }
"""
