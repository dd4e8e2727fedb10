"""Pictures side by side, and what explains their colors; pixels are uint8 [H, W, 3]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pixels = np.ndarray[Any, Any]
Color = tuple[int, int, int]

_PAPER, _INK = (255, 255, 255), (31, 35, 40)
_LEAST = 120  # pixels of the height that is needed to explain anything
_MAX = {torch.uint8: 255, torch.uint16: 2**16 - 1, torch.int16: 2**15 - 1}


def as_pixels(image: Tensor) -> Pixels:
    """An image [C, H, W] as it can be seen: of more than three channels the first three."""
    values = image.float() / _MAX.get(image.dtype, 1) * 255
    shown = values[:3] if len(values) >= 3 else values[:1].expand(3, -1, -1)
    found: Pixels = shown.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return found


def shrunk(pixels: Pixels, longest: int) -> Pixels:
    """Pixels of which no side is longer than ``longest``."""
    from PIL import Image

    factor = longest / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    height, width = (max(round(side * factor), 1) for side in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))


def beside(left: Pixels, right: Pixels | None) -> Pixels:
    """Two pictures side by side; the lower one is continued in white."""
    if right is None:
        return left
    height = max(len(left), len(right))
    padded = [
        np.pad(each, ((0, height - len(each)), (0, 0), (0, 0)), constant_values=255)
        for each in (left, right)
    ]
    return np.concatenate(padded, 1)


def color_bar(colors: Pixels, ticks: Sequence[str], height: int) -> Pixels:
    """A bar of ``colors`` [n, 3] from the top to the bottom, with equally spaced ``ticks``."""
    from PIL import Image, ImageDraw

    font, size = _font(max(height, _LEAST))
    room = round(max(font.getlength(tick) for tick in ticks))
    found = np.full((max(height, _LEAST), 3 * size + room, 3), _PAPER, dtype=np.uint8)
    rows = np.arange(len(found)) * len(colors) // len(found)
    found[:, size // 2 : size // 2 + size] = colors[rows, None]
    picture = Image.fromarray(found)
    draw = ImageDraw.Draw(picture)
    for place, tick in enumerate(ticks):
        share = place / max(len(ticks) - 1, 1)
        anchor = {0.0: "la", 1.0: "ld"}.get(share, "lm")
        draw.text((2 * size, share * len(found)), tick, _INK, font, anchor)
    return np.array(picture)


def color_list(lines: Sequence[tuple[Color, str]], height: int) -> Pixels | None:
    """Colors with words beside them, as many lines as there is room for; None for none."""
    from PIL import Image, ImageDraw

    if not lines:
        return None
    font, size = _font(max(height, _LEAST))
    step = round(1.6 * size)
    shown = list(lines)[: max((max(height, _LEAST) - size) // step, 1)]
    more = f"and {len(lines) - len(shown) + 1} more" if len(shown) < len(lines) else ""
    words = [text for _, text in shown]
    words[-1] = more or words[-1]
    room = round(max(font.getlength(text) for text in words))
    found = np.full((max(height, _LEAST), 3 * size + room, 3), _PAPER, dtype=np.uint8)
    picture = Image.fromarray(found)
    draw = ImageDraw.Draw(picture)
    for place, ((color, _), text) in enumerate(zip(shown, words, strict=True)):
        top = size // 2 + place * step
        if not more or place < len(shown) - 1:
            draw.rectangle((size // 2, top, size // 2 + size, top + size), color, _INK)
        draw.text((2 * size, top + size // 2), text, _INK, font, "lm")
    return np.array(picture)


def _font(height: int) -> tuple[Any, int]:
    """Letters for a picture of some height, and their size."""
    import matplotlib
    from PIL import ImageFont

    size = min(max(height // 32, 11), 48)
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size), size
