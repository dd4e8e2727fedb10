"""Colors of classes, for pictures of masks."""

from __future__ import annotations

Palette = tuple[tuple[int, int, int], ...]  # RGB by class id


def palette(count: int) -> Palette:
    """Colors of ``count`` classes that are told apart well; the first is black.

    Those of the PASCAL VOC development kit: the bits of an id go in turn to red, green and blue,
    from their highest bit down. All of the first 256 differ; then they repeat.
    """
    return tuple(_color(number % 256) for number in range(count))


def _color(number: int) -> tuple[int, int, int]:
    red = green = blue = 0
    for place in range(7, -1, -1):
        red |= (number & 1) << place
        green |= (number >> 1 & 1) << place
        blue |= (number >> 2 & 1) << place
        number >>= 3
    return red, green, blue
