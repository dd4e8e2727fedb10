"""An HTML report: texts, tables and pictures on one page that needs no network and no server."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import attrs
import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from dinov3_framework.errors import printable
from dinov3_framework.runtime.output import write_aside
from dinov3_framework.runtime.results import Row, format_value, tabulated

_NOTHING = Markup()
_LISTED = 12  # titled sections from which on a list of them stands before the first


@attrs.frozen(eq=False)
class Image:
    """A picture: pixels that the page embeds, or the path from the page to a file."""

    source: np.ndarray | str  # uint8 [H, W, 3], or a path
    title: str = ""
    note: str = ""
    alt: str = ""  # for who does not see it; left out, the title
    width: int | None = None  # pixels on the page; left out, its own
    crisp: bool = False  # whether pixels are enlarged to squares, instead of blended
    over: Markup = _NOTHING  # markup that is drawn over it

    @property
    def uri(self) -> str:
        if isinstance(self.source, str):
            return quote(os.fsencode(self.source))
        png = _encoded(self.source, "PNG", optimize=True)
        jpeg = png if self.crisp else _encoded(self.source, "JPEG", quality=90)
        # Photographs are smaller as JPEG, drawings and tiny images as PNG.
        kind, content = ("png", png) if len(png) <= len(jpeg) else ("jpeg", jpeg)
        return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"

    @property
    def style(self) -> Markup:
        size = "" if self.width is None else f"width: {self.width}px"
        if not isinstance(self.source, str):
            height, width = self.source.shape[:2]
            size += f"; aspect-ratio: {width} / {height}"
        return Markup(size.strip("; "))


# A paragraph (Markup is taken as it is), facts by label, a table, or pictures side by side.
Block: TypeAlias = str | Mapping[str, Any] | Sequence[Row] | Sequence[Image]


@attrs.frozen(eq=False)
class Section:
    """A part of a report under a heading, if it has a title."""

    title: str = ""
    blocks: Sequence[Block] = ()
    note: str = ""  # small, beside the title
    data: Mapping[str, str] = attrs.field(factory=dict)  # data-* attributes, for a script


def write_report(
    path: Path, title: str, sections: Sequence[Section], *, style: str = "", script: str = ""
) -> None:
    """Write a page; all text is escaped, and what does not print in it, but for ``Markup``.

    ``style`` (CSS) and ``script`` (JavaScript) come on top of the page's own and are trusted. A
    page without a script forbids any. Raises ``OutputError`` where it cannot be written.
    """
    titled = [place for place, section in enumerate(sections) if section.title]
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    template = environment.from_string(_PAGE)
    page = template.render(
        title=title,
        sections=sections,
        listed=titled[0] if len(titled) >= _LISTED else None,
        style=Markup(_STYLE + style),
        script=Markup(script),
        kind=_kind,
        tabulated=tabulated,
        format_value=_cell,
    )
    write_aside(path, page)


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _cell(value: Any) -> str:
    return value if isinstance(value, Markup) else format_value(value)


def _kind(block: Block) -> str:
    if isinstance(block, str | Mapping):
        return "text" if isinstance(block, str) else "facts"
    return "images" if block and isinstance(block[0], Image) else "table"


def _encoded(pixels: np.ndarray, form: str, **options: Any) -> bytes:
    from PIL import Image as pil

    buffer = io.BytesIO()
    pil.fromarray(np.ascontiguousarray(pixels)).save(buffer, form, **options)
    return buffer.getvalue()


# Nothing is ever loaded from elsewhere, and browsers are told so.
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
img-src data: file: 'self'; style-src 'unsafe-inline'\
{{ "; script-src 'unsafe-inline'" if script }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
{% if loop.index0 == listed %}
<nav><ol>
{% for section in sections %}
{% if section.title %}
<li><a href="#section-{{ loop.index }}">{{ section.title }} {{ section.note }}</a></li>
{% endif %}
{% endfor %}
</ol></nav>
{% endif %}
<section id="section-{{ loop.index }}"\
{% for key, value in section.data.items() %} data-{{ key }}="{{ value }}"{% endfor %}>
{% if section.title %}
<h2>{{ section.title }} <small>{{ section.note }}</small></h2>
{% endif %}
{% for block in section.blocks %}
{% if kind(block) == "text" %}
<p>{{ block }}</p>
{% elif kind(block) == "facts" %}
<dl>
{% for label, value in block.items() %}
<dt>{{ label }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% elif kind(block) == "table" %}
{% set rows, columns = tabulated(block) %}
<table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for name in columns %}<td>{{ format_value(row.get(name, "")) }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% else %}
<div class="images">
{% for image in block %}
<figure{% if image.width %} style="width: {{ image.width }}px"{% endif %}>
<div class="frame" style="{{ image.style }}"><img{{ ' class="crisp"'|safe if image.crisp }} \
src="{{ image.uri }}" alt="{{ image.alt or image.title }}">{{ image.over }}</div>
<figcaption>{{ image.title }}<span>{{ image.note }}</span></figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% endfor %}
</section>
{% endfor %}
{% if script %}
<script>
{{ script }}</script>
{% endif %}
</body>
</html>
"""

_STYLE = """\
:root { color-scheme: light; --ink: #1f2328; --muted: #656d76; --faint: #d8dee4; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 24px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 17px; margin: 0; overflow-wrap: anywhere; }
h2 small, dt, figcaption span { color: var(--muted); font-weight: normal; }
section + section { border-top: 1px solid var(--faint); margin-top: 24px; padding-top: 16px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0 0 12px; }
dd { margin: 0; }
dd, td, nav a { overflow-wrap: anywhere; }
p { max-width: 80ch; }
a { color: #0969da; }
nav ol { columns: 22em; padding-left: 1.5em; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--faint); padding: 2px 16px 2px 0; text-align: left; }
.images { display: flex; flex-wrap: wrap; gap: 16px; margin-top: 10px; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
.frame { position: relative; max-width: 100%; background: #eee; }
.frame > img, .frame > canvas { display: block; width: 100%; height: 100%; }
.crisp { image-rendering: pixelated; }
figcaption { font-size: 13px; line-height: 1.35; margin-top: 4px; }
figcaption span { display: block; }
"""
