"""Random boxes of an image, and their crops at one size.

Boxes follow the random resized crop of Inception (Szegedy et al. 2015, arXiv 1409.4842) as
torchvision spells it: area uniform, aspect ratio log-uniform, ten tries, then the largest central
box whose aspect ratio is allowed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

TRIES = 10


def random_boxes(
    rng: np.random.Generator,
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
) -> NDArray[np.int64]:
    """Boxes (top, left, height, width) in pixels, [count, 4].

    ``scale`` is the range of a box's share of the area, ``aspect_ratio`` of its width over height.
    """
    area = height * width * rng.uniform(*scale, size=(count, TRIES))
    low, high = map(math.log, aspect_ratio)
    ratio = np.exp(rng.uniform(low, high, size=(count, TRIES)))
    place = rng.random((count, 2))
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=1)  # 0 as well where no try fits
    boxes = np.empty((count, 4), np.int64)
    for index, attempt in enumerate(first):
        if fits[index, attempt]:
            h, w = heights[index, attempt], widths[index, attempt]
            down, right = place[index]
            top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
        else:
            h, w = _central_box(height, width, aspect_ratio)
            top, left = (height - h) // 2, (width - w) // 2
        boxes[index] = top, left, h, w
    return boxes


def _central_box(height: int, width: int, aspect_ratio: tuple[float, float]) -> tuple[int, int]:
    low, high = aspect_ratio
    if width < low * height:
        return max(round(width / low), 1), width
    if width > high * height:
        return height, max(round(height * high), 1)
    return height, width


def crop(
    pixels: NDArray[np.uint8], boxes: NDArray[np.int64], flips: NDArray[np.bool_], size: int
) -> NDArray[np.uint8]:
    """The boxes of an image [H, W, C], each resized to size x size and mirrored where told.

    Returns [boxes, C, size, size].
    """
    crops = np.empty((len(boxes), pixels.shape[2], size, size), np.uint8)
    for out, (top, left, height, width), flip in zip(crops, boxes.tolist(), flips, strict=True):
        # Compact and channels last: what the native uint8 kernel is fastest on.
        box = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        resized = _resize(torch.from_numpy(box).permute(2, 0, 1)[None], size)[0].numpy()
        out[...] = resized[:, :, ::-1] if flip else resized
    return crops


def resize(crops: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Square crops [N, C, S, S] at another size; a copy where they have it already."""
    if crops.shape[-1] == size:
        return crops.copy()
    channels_last = np.ascontiguousarray(crops.transpose(0, 2, 3, 1))
    resized = _resize(torch.from_numpy(channels_last).permute(0, 3, 1, 2), size)
    return np.ascontiguousarray(resized.numpy())


def _resize(images: torch.Tensor, size: int) -> torch.Tensor:
    return interpolate(images, (size, size), mode="bicubic", antialias=True)
