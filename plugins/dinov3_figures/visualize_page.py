"""index.html: all pictures on one page that needs no other file, no network and no script.

Where scripts run, a further tile shows the similarities to the patch under the pointer.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from urllib.parse import quote

import attrs
import numpy as np

from dinov3_figures.pixels import Pixels
from dinov3_figures.visualize_maps import Codes
from dinov3_figures.visualize_panels import Shown
from dinov3_figures.visualize_tiles import Tile, box_of, colour_table, lowest

_WIDTH, _WIDEST = 224, 360  # pixels of a tile on the page, and where its height allows
_INDEXED = 12  # images from which on the page has a list of them


@attrs.frozen(eq=False)
class Entry:
    """One image's section of the page."""

    shown: Shown
    figure: str  # path of its picture from the page
    codes: Codes | None  # for similarities under the pointer


def page(entries: Sequence[Entry], facts: Mapping[str, str], notes: Sequence[str]) -> str:
    """The whole page: facts about the run, notes, and a section for each image."""
    # Nothing is ever loaded from elsewhere, and browsers are told so.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    rows = "\n".join(
        f"<dt>{escape(label)}</dt><dd>{escape(value)}</dd>" for label, value in facts.items()
    )
    paragraphs = "\n".join(f"<p>{escape(note)}</p>" for note in notes)
    sections = "\n".join(_section(place, entry) for place, entry in enumerate(entries))
    script = f"<script>\n{_part('js')}</script>\n" if any(e.codes for e in entries) else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Patch features: {escape(facts.get("backbone", ""))}</title>
<style>
{_part("css")}.scale i {{ --colours: linear-gradient(to right, {_gradient()}); }}
</style>
</head>
<body data-colours="{_base64(colour_table().tobytes())}">
<h1>What the patch features see</h1>
<dl>
{rows}
</dl>
{paragraphs}
{_contents(entries)}{sections}
{script}</body>
</html>
"""


def _contents(entries: Sequence[Entry]) -> str:
    if len(entries) < _INDEXED:
        return ""
    lines = "\n".join(
        f'<li><a href="#image-{place}">{escape(entry.shown.heading)}</a></li>'
        for place, entry in enumerate(entries)
    )
    return f"<nav><ol>\n{lines}\n</ol></nav>\n"


def _section(place: int, entry: Entry) -> str:
    shown = entry.shown
    height, width = shown.tiles[0].pixels.shape[:2]
    # Tall images narrower and wide ones wider, so that tiles take about the same area.
    across = min(max(round(_WIDTH * (width / height) ** 0.5), _WIDTH // 2), _WIDEST)
    style = f"--width: {across}px; --aspect: {width} / {height}"
    label = f" <small>{escape(shown.label)}</small>" if shown.label else ""
    similar = any(tile.similarity for tile in shown.tiles)
    return f"""<section id="image-{place}" style="{style}"{_data(entry)}>
<h2>{escape(shown.name)}{label}</h2>
<div class="tiles">
{"".join(_figure(shown, tile) for tile in shown.tiles)}</div>
<div class="below">{_scale(lowest(shown.maps)) if similar else ""}
<a href="{quote(entry.figure)}">as one picture</a></div>
{_template(shown) if entry.codes else ""}</section>"""


def _data(entry: Entry) -> str:
    """What the script needs to know of a section."""
    codes, maps = entry.codes, entry.shown.maps
    if codes is None:
        return ""
    rows, columns = maps.grid
    first = maps.marked[0] if maps.marked else None
    start = first.row * columns + first.column if first else rows * columns // 2
    weights = ",".join(f"{weight:.9g}" for weight in codes.weights)
    return (
        f' data-grid="{rows},{columns}" data-start="{start}" data-weights="{weights}"'
        f' data-values="{_base64(codes.values.tobytes())}"'
    )


def _figure(shown: Shown, tile: Tile) -> str:
    is_map = tile.column != "image"
    source = _png(tile.pixels) if is_map else _jpeg_or_png(tile.pixels)
    marks = "".join(_mark(shown, number, tile) for number in tile.marks)
    alt = escape(f"{shown.name}: {tile.title}, {tile.note}", quote=True)
    kind = ' class="map"' if is_map else ""
    return (
        f'<figure><div class="frame"><img{kind} src="{source}" alt="{alt}">{marks}</div>'
        f"<figcaption>{escape(tile.title)}<span>{escape(tile.note)}</span></figcaption></figure>\n"
    )


def _mark(shown: Shown, number: int, tile: Tile) -> str:
    left, top, width, height = (
        f"{100 * part:.4g}%" for part in box_of(shown.maps.marked[number - 1], shown.maps.grid)
    )
    # Where its number has no room right of a mark, or half of it none above or below.
    rows, columns = shown.maps.grid
    at = shown.maps.marked[number - 1]
    edges = (
        (" left", at.column >= 0.9 * columns),
        (" top", at.row < 0.05 * rows),
        (" bottom", at.row >= 0.95 * rows),
    )
    at_edge = "".join(name for name, is_at in edges if is_at)
    label = f"<b>{number}</b>" if tile.column == "image" else ""
    style = f"left:{left};top:{top};width:{width};height:{height}"
    return f'<div class="mark{at_edge}" style="{style}">{label}</div>'


def _scale(low: float) -> str:
    return (
        '<span class="scale" aria-label="colours of the similarities to marked patches">'
        f"cosine {low:.2f} <i></i> 1.00</span>"
    )


def _template(shown: Shown) -> str:
    """The tile that the script fills; without it nothing is seen of it."""
    label = escape(
        f"{shown.name}: similarity to the patch under the pointer; arrow keys move it", quote=True
    )
    return (
        f'<template><figure><div class="frame" role="img" aria-label="{label}">'
        '<canvas class="map"></canvas></div><figcaption>similarity to the patch under the pointer'
        "<span></span></figcaption></figure></template>\n"
    )


# --------------------------------------------------------------------------- pieces
def _part(ending: str) -> str:
    name = f"visualize_page.{ending}"
    return resources.files("dinov3_figures").joinpath(name).read_text("utf-8")


def _gradient() -> str:
    return ", ".join("#" + bytes(colour).hex() for colour in colour_table()[::15])


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _png(pixels: Pixels) -> str:
    return f"data:image/png;base64,{_base64(_encoded(pixels, 'PNG'))}"


def _jpeg_or_png(pixels: Pixels) -> str:
    """The smaller of the two: photographs as JPEG, drawings and tiny images as PNG."""
    jpeg, png = _encoded(pixels, "JPEG"), _encoded(pixels, "PNG")
    kind, content = ("png", png) if len(png) <= len(jpeg) else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{_base64(content)}"


def _encoded(pixels: Pixels, form: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    options = {"quality": 90} if form == "JPEG" else {"optimize": True}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, form, **options)
    return buffer.getvalue()
