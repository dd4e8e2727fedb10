"""One page with all that was predicted; it needs no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen
from markupsafe import Markup

from dinov3_framework.runtime.report import Block, Image, Section, write_report
from dinov3_predict.canvas import Color, Pixels

THUMBNAIL = 448  # pixels of the longer side of an image on the page


@frozen(eq=False)
class Shown:
    """An image on the page: as it is, and with what was predicted, if that can be seen."""

    name: str
    image: Pixels
    picture: Pixels | None
    caption: str


def write_page(
    path: Path,
    facts: Mapping[str, Any],
    shown: Sequence[Shown],
    legend: Mapping[str, Color],
    notes: Sequence[str],
) -> None:
    """Write the page; raises ``OutputError``."""
    blocks: list[Block] = [dict(facts), *notes]
    if legend:
        blocks.append(_legend(legend))
    sections = [Section(blocks=blocks), *map(_section, shown)]
    write_report(path, "Predictions", sections, style=_STYLE)


def _section(shown: Shown) -> Section:
    pictures = [Image(shown.image, alt=f"{shown.name}, the image")]
    if shown.picture is not None:
        pictures.append(Image(shown.picture, alt=f"{shown.name}, what was predicted"))
    return Section(shown.name, [shown.caption, pictures])


def _legend(legend: Mapping[str, Color]) -> Markup:
    chip = Markup('<span class="chip"><i style="background: rgb({}, {}, {})"></i>{}</span>')
    return Markup(" ").join(chip.format(*color, name) for name, color in legend.items())


_STYLE = """\
.chip { display: inline-block; margin: 0 14px 4px 0; overflow-wrap: anywhere; }
.chip i { display: inline-block; width: 14px; height: 14px; margin-right: 6px;
  border: 1px solid var(--muted); vertical-align: -2px; }
p:has(.chip) { max-width: none; }
@media (max-width: 640px) {
  body { padding: 12px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 6px; }
}
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e6edf3; --muted: #9198a1; --faint: #3d444d; }
  body { background: #0d1117; }
  a { color: #4493f8; }
  .frame { background: #21262d; }
}
"""
