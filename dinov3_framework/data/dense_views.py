"""The resized versions of an image that a dense prediction looks at, and the windows on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.images import normalize
from dinov3_framework.errors import DataError

_SMALLER = 32  # multiples of which sides are rounded up to at scales below 1, as published
_LONGEST = 2**16  # pixels of a resized side
_MAX = {torch.uint16: 2**16 - 1, torch.int16: 2**15 - 1}


def view_size(
    height: int, width: int, config: DenseInferenceConfig, scale: float
) -> tuple[int, int]:
    """The size of an image of ``height`` x ``width`` at one scale.

    The side that is resized is rounded down, at scales below 1 then up to a multiple of 32; the
    other is rounded to the nearest (as the reference does, dinov3/eval/segmentation/transforms.py).
    """
    if config.resize is None and scale == 1:
        return height, width
    longer = config.side == "longer"
    fixed = max(height, width) if longer else min(height, width)
    side = int((config.resize or fixed) * scale)
    if scale < 1:
        side = math.ceil(side / _SMALLER) * _SMALLER
    side = max(side, 1)
    if config.side == "both" and config.resize is not None:
        return side, side
    other = max(int(side * (height + width - fixed) / fixed + 0.5), 1)
    return (side, other) if (height == fixed) else (other, side)


def view_sizes(height: int, width: int, config: DenseInferenceConfig) -> list[tuple[int, int]]:
    """The size of an image at each scale; ``DataError`` for one too thin to be resized."""
    sizes = [view_size(height, width, config, scale) for scale in config.scales]
    if max(map(max, sizes)) > _LONGEST:
        tall, wide = max(sizes)
        raise DataError(
            f"an image of {height} x {width} pixels would be resized to {tall} x {wide}; resize "
            'its longer side (side = "longer"), or leave it out'
        )
    return sizes


def resized_views(
    image: Tensor, images: ImagesConfig, config: DenseInferenceConfig
) -> list[Tensor]:
    """A raw image [C, H, W] at every scale, float32, normalized.

    uint8, uint16, or floating point in 0..1. Raises ``DataError`` for another number of channels.
    """
    if image.ndim != 3 or image.shape[0] != images.channels or 0 in image.shape:
        raise DataError(
            f"an image of shape {list(image.shape)} where images.channels = {images.channels} "
            f"asks for [{images.channels}, H, W]"
        )
    image = image.as_subclass(Tensor)
    if image.dtype in _MAX:
        image = image.float() / _MAX[image.dtype]
    elif image.dtype != torch.uint8:
        image = image.float()
    height, width = image.shape[1:]
    sizes = view_sizes(height, width, config)
    return [_normalized(_resized(image, size, config.interpolation), images) for size in sizes]


def _resized(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size, mode=interpolation, antialias=True)[0]


def _normalized(image: Tensor, images: ImagesConfig) -> Tensor:
    if not image.is_floating_point():
        return normalize(image, images)
    mean, std = (torch.tensor(each)[:, None, None] for each in (images.mean, images.std))
    return (image.clamp(0, 1) - mean) / std  # bicubic interpolation leaves the range of the values


@frozen
class Windows:
    """Where windows of one size lie on an image: those of each row side by side."""

    height: int
    width: int
    tops: Sequence[int]
    lefts: Sequence[int]

    @classmethod
    def on(cls, height: int, width: int, window: int | None, stride: int) -> Windows:
        """Windows ``stride`` pixels apart, the last pulled back to the edge.

        An axis shorter than the window is covered as it is. Where both are shorter, windows are
        squares of the shorter side, as published, unless these would leave gaps between them: then
        there is one, the image. None is the image, too.
        """
        if window is None:
            return cls(height, width, (0,), (0,))
        if window > max(height, width) and stride <= min(height, width):
            window = min(height, width)
        tall, wide = min(window, height), min(window, width)
        return cls(tall, wide, _starts(height, tall, stride), _starts(width, wide, stride))

    @property
    def count(self) -> int:
        return len(self.tops) * len(self.lefts)


def _starts(side: int, window: int, stride: int) -> list[int]:
    count = math.ceil((side - window) / stride) + 1
    return [min(number * stride, side - window) for number in range(count)]


def coverage(side: int, window: int, starts: Sequence[int]) -> Tensor:
    """How many windows there are on each pixel of an axis, float32 [side]."""
    count = torch.zeros(side)
    for start in starts:
        count[start : start + window] += 1
    return count
