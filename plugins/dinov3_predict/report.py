"""One page with all that was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from markupsafe import Markup

from dinov3_framework.runtime.report import Block, Image, Section, write_report
from dinov3_predict.drawing import Pixels

_LARGEST = 640  # pixels of the longer side of a picture on the page


@frozen(eq=False)
class Shown:
    """An image on the page: as it is, and with what was predicted."""

    name: str
    image: Pixels
    over: Pixels
    words: Mapping[str, Any]


def thumbnail(pixels: Pixels) -> Pixels:
    """Pixels as large as the page shows them."""
    from PIL import Image as pil

    factor = _LARGEST / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    height, width = (max(round(side * factor), 1) for side in pixels.shape[:2])
    return np.array(pil.fromarray(np.ascontiguousarray(pixels)).resize((width, height)))


def write_page(
    path: Path,
    facts: Mapping[str, Any],
    shown: Sequence[Shown],
    legend: Mapping[str, tuple[int, int, int]],
    *,
    left_out: int,
) -> None:
    """Write the page; raises ``OutputError``."""
    blocks: list[Block] = [dict(facts)]
    if legend:
        blocks.append(_legend(legend))
    if left_out:
        blocks.append(f"{left_out:,} more images are in predictions.csv, and not on this page.")
    sections = [Section(blocks=blocks), *map(_section, shown)]
    write_report(path, "Predictions", sections, style=_STYLE)


def _section(shown: Shown) -> Section:
    words = ", ".join(str(value) for value in shown.words.values())
    if {"least", "largest"} <= shown.words.keys():
        words = ", ".join(f"{name} {value}" for name, value in shown.words.items())
    same = shown.over is shown.image or np.array_equal(shown.over, shown.image)
    pictures = [Image(shown.image, alt=f"{shown.name}, as it is")]
    if not same:
        pictures.append(Image(shown.over, alt=f"{shown.name}, with what was predicted"))
    return Section(shown.name, [words, pictures])


def _legend(legend: Mapping[str, tuple[int, int, int]]) -> Markup:
    chips = [
        Markup('<span class="chip"><i style="background: rgb{}"></i>{}</span>').format(color, name)
        for name, color in legend.items()
    ]
    return Markup(" ").join(chips)


_STYLE = """\
.chip { display: inline-block; margin: 0 14px 4px 0; white-space: nowrap; }
.chip i { display: inline-block; width: 14px; height: 14px; margin-right: 6px;
  border: 1px solid var(--faint); vertical-align: -2px; }
"""
