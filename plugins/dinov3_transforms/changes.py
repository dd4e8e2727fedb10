"""Random changes that published trainings on depth make, and that torchvision has otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dinov3_framework import ImagesConfig


def happens(probability: float) -> bool:
    """Whether something does; nothing is drawn for what never does."""
    return probability > 0 and float(torch.rand(())) < probability


def drawn(low: float, high: float) -> float:
    """A number between two; nothing is drawn where they are one."""
    return low if low == high else low + (high - low) * float(torch.rand(()))


def mean_color(image: Tensor, images: ImagesConfig) -> list[float]:
    """The mean by channel of images, as values of ``image``."""
    scale = 1.0 if image.is_floating_point() else 255.0
    return [scale * mean for mean in images.mean]


def turned(part: Any, angle: float, fill: Any) -> Any:
    """An image or a target, turned counter-clockwise by degrees; new pixels are ``fill``.

    Images are interpolated (bilinear), masks and maps are not.
    """
    if isinstance(part, tv_tensors.BoundingBoxes):
        return tv.rotate(part, angle)
    if not isinstance(part, tv_tensors.Mask):
        return tv.rotate(part, angle, interpolation=InterpolationMode.BILINEAR, fill=fill)
    # In float32, as torchvision does it: ids are right up to 2^24.
    plain = part.as_subclass(Tensor)
    planes = plain.reshape(-1, *plain.shape[-2:])
    found = tv.rotate(planes, angle, interpolation=InterpolationMode.NEAREST, fill=fill)
    return tv_tensors.wrap(found.reshape(plain.shape), like=part)


def shaded(
    image: Tensor,
    gamma: tuple[float, float],
    brightness: tuple[float, float],
    color: tuple[float, float],
) -> Tensor:
    """An image with other gamma, brightness and colors, float32 in 0..1.

    As Monocular Depth Toolbox has it, which DINOv2 and DINOv3 take: values of 0..255 to the power
    of gamma, times a factor of all channels and one of each.
    """
    pixels = image.as_subclass(Tensor)
    pixels = pixels * 255 if pixels.is_floating_point() else pixels.float()
    pixels = pixels.clamp(min=0) ** drawn(*gamma) * drawn(*brightness)
    factors = torch.tensor([drawn(*color) for _ in range(len(pixels))])
    return (pixels * factors[:, None, None]).clamp(max=255) / 255
