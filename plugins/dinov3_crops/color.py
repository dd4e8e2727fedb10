"""Color operations on stacks of crops, in place.

Pixels are float32 [N, C, H, W] with levels 0..255; a factor is one number per crop, [N]. The
meaning of each is torchvision's (``adjust_brightness`` and so on); values are not rounded to whole
levels in between.

All of it is numpy: on one core it is as quick as torch, on tiny crops quicker, and its bits do not
depend on a number of threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LUMA = np.array((0.2989, 0.587, 0.114), np.float32)  # ITU-R BT.601


def column(values: Floats) -> Floats:
    """Numbers [N] so shaped that they broadcast over crops [N, C, H, W]."""
    return values.reshape(-1, 1, 1, 1)


def luminance(pixels: Floats) -> Floats:
    """Gray levels [N, 1, H, W] of RGB pixels [N, 3, H, W]."""
    gray: Floats = pixels[:, 0:1] * LUMA[0]
    part = np.empty_like(gray)
    for channel in (1, 2):
        gray += np.multiply(pixels[:, channel : channel + 1], LUMA[channel], out=part)
    return gray


def mean_luminance(pixels: Floats) -> Floats:
    """Mean gray level of each crop, [N]; the plain mean where it is not RGB."""
    count, channels, height, width = pixels.shape
    sums = np.add.reduce(pixels.reshape(count, channels, -1), axis=2)
    weights = LUMA if channels == 3 else np.full(channels, 1 / channels, np.float32)
    means: Floats = np.add.reduce(sums * weights, axis=1) / np.float32(height * width)
    return means


def blend(pixels: Floats, factor: Floats, *others: Floats) -> None:
    """``factor * pixels + sum(others)``, held within 0..255; others broadcast.

    Brightness has no other; contrast has (1 - factor) * mean, saturation (1 - factor) * gray.
    """
    pixels *= column(factor)
    for other in others:
        pixels += other
    # Up to a factor of 1 the result lies between two levels that were in range.
    if factor.max() > 1:
        np.clip(pixels, np.float32(0), np.float32(255), out=pixels)


def shift_hue(pixels: Floats, shift: Floats) -> None:
    """Turn the hue of RGB pixels by ``shift`` in -0.5..0.5 turns; saturation and value stay.

    With M, m the greatest and least channel and d = M - m, hue is a place on a circle of length
    6 d, red at 0, green at 2 d, blue at 4 d. A channel at circular distance x from that place is
    M up to x = d, m from x = 2 d on and linear between (Smith 1978, "Color gamut transform
    pairs"). So there is no division, and no conversion back and forth.
    """
    red, green, blue = pixels[:, 0], pixels[:, 1], pixels[:, 2]
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    spread = high - low
    # As if blue were greatest, then moved where it is green or red.
    place = red - green
    place += spread * np.float32(4)
    if_green = blue - red
    if_green += spread * np.float32(2)
    _move_where(place, green == high, if_green)
    _move_where(place, red == high, green - blue)
    circle = spread * np.float32(6)
    place += circle * shift.reshape(-1, 1, 1)
    ceiling = high + spread
    around = np.empty_like(place)
    for channel in range(3):
        distance = pixels[:, channel]
        np.subtract(place, spread * np.float32(2 * channel), out=distance)
        np.abs(distance, out=distance)
        # The place lies in -4 d..8 d, at most once around from any channel's.
        np.subtract(distance, circle, out=around)
        np.minimum(distance, np.abs(around, out=around), out=distance)
        np.subtract(ceiling, distance, out=distance)
        np.minimum(np.maximum(distance, low, out=distance), high, out=distance)


def _move_where(values: Floats, mask: NDArray[np.bool_], target: Floats) -> None:
    # By arithmetic: numpy's masked copies take ten times as long as a product.
    target -= values
    target *= mask.astype(np.float32)
    values += target


def solarize(crop: NDArray[np.uint8], threshold: int) -> None:
    """Invert the levels of a uint8 crop from ``threshold`` on."""
    np.copyto(crop, ~crop, where=crop >= threshold)
