"""Random changes that published trainings on masks make, and that torchvision has otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from dinov3_transforms.changes import drawn, happens

_BRIGHTER = 32.0  # at most, of 255
_FACTORS = (0.5, 1.5)  # of contrast and of saturation
_HUE = 0.5  # at most, of the color circle


def is_varied(masks: Sequence[Tensor], ignored: Sequence[int | None], share: float) -> bool:
    """Whether each mask shows two classes or more, and none of them on ``share`` or more of it.

    Pixels that are ignored do not count.
    """
    for mask, index in zip(masks, ignored, strict=True):
        known = mask if index is None else mask[mask != index]
        counts = torch.unique(known, return_counts=True)[1]
        if len(counts) < 2 or int(counts.max()) >= share * int(counts.sum()):
            return False
    return True


def distorted(image: Tensor, probability: float) -> Tensor:
    """Other brightness, contrast, saturation and hue, each with a probability; type and range stay.

    As MMSegmentation has it, which DINOv2 and DINOv3 take: up to 32 of 255 are added, contrast
    comes before saturation and hue or after them, hue may be any, and each change is cut off.
    """
    contrast_first = happens(0.5)
    image = _brightened(image, probability)
    if contrast_first:
        image = _contrasted(image, probability)
    if image.shape[0] == 3:
        if happens(probability):
            image = tv.adjust_saturation(image, drawn(*_FACTORS))
        if happens(probability):
            image = tv.adjust_hue(image, drawn(-_HUE, _HUE))
    return image if contrast_first else _contrasted(image, probability)


def _brightened(image: Tensor, probability: float) -> Tensor:
    if not happens(probability):
        return image
    most = 1.0 if image.is_floating_point() else 255.0
    return _cut_off(image.float() + drawn(-_BRIGHTER, _BRIGHTER) * most / 255, image)


def _contrasted(image: Tensor, probability: float) -> Tensor:
    return _cut_off(image.float() * drawn(*_FACTORS), image) if happens(probability) else image


def _cut_off(pixels: Tensor, like: Tensor) -> Tensor:
    most = 1.0 if like.is_floating_point() else 255.0
    return pixels.clamp(0, most).to(like.dtype)
