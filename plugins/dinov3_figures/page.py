"""index.html: all pictures on one page, and similarities to the patch under the pointer."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import attrs
import numpy as np
from markupsafe import Markup

from dinov3_figures.images import Seen
from dinov3_figures.maps import Codes, Maps
from dinov3_figures.sheet import Mark, Tile
from dinov3_figures.tiles import color_table
from dinov3_framework.runtime.report import Block, Image, Section, write_report

_WIDTH, _WIDEST = 224, 360  # pixels of a tile on the page, and where its height allows


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
        label = f"  ({self.seen.label})" if self.seen.label else ""
        return self.seen.name + label


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
    across = min(max(round(_WIDTH * (width / height) ** 0.5), _WIDTH // 2), _WIDEST)
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
    scale = Markup('cosine {:.2f} <i class="scale"></i> 1.00 &emsp; ').format(shown.maps.lowest)
    link = Markup('<a href="{}">as one picture</a>').format(shown.figure)
    blocks: list[Block] = [images, (scale if shown.maps.marks else Markup("")) + link]
    return Section(shown.seen.name, blocks, shown.seen.label, _data(shown))


def _mark(mark: Mark, *, numbered: bool) -> Markup:
    left = " left" if mark.box[0] > 0.5 else ""  # the number's side is that towards the middle
    number = Markup("<b>{}</b>").format(mark.number) if numbered else ""
    style = "left:{:.4%};top:{:.4%};width:{:.4%};height:{:.4%}".format(*mark.box)
    return Markup('<div class="mark{}" style="{}">{}</div>').format(left, style, number)


def _data(shown: Shown) -> dict[str, str]:
    """What the script needs to know of a section."""
    codes, maps = shown.codes, shown.maps
    if codes is None:
        return {}
    rows, columns = maps.grid
    first = maps.marks[0] if maps.marks else None
    start = first.row * columns + first.column if first else rows * columns // 2
    return {
        "grid": f"{rows},{columns}",
        "start": str(start),
        "weights": ",".join(f"{weight:.9g}" for weight in codes.weights),
        "values": _base64(codes.values),
        "colors": _base64(color_table()),
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")


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
