"""Pictures of samples: thumbnails, and what an augmentation makes of an image, in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dinov3_framework import ImagesConfig
from dinov3_framework.data.images import resize

Pixels = np.ndarray  # uint8 [H, W, 3]

THUMBNAIL = 176  # pixels of a thumbnail's longer side
CROP = 128  # pixels of a global crop's side
_GAP = 6
_VEIL = torch.tensor([176.0, 184.0, 196.0])[:, None, None]
_COVER = 0.75  # how much of a masked patch the veil hides


def to_rgb(images: Tensor, spec: ImagesConfig) -> Tensor:
    """Images [..., C, H, W] as uint8 RGB [..., 3, H, W]; floats are ``spec``'s normalized ones.

    One channel becomes gray. Of any number other than three the first three are shown (of two, the
    first), each stretched to its own range within an image.
    """
    if images.dtype == torch.uint8 and images.shape[-3] == 3:
        return images
    values = images.float()
    if images.dtype == torch.uint8:
        values = values / 255
    elif images.dtype == torch.uint16:
        values = values / 65535
    else:
        mean, std = (torch.tensor(each)[:, None, None] for each in (spec.mean, spec.std))
        values = values * std + mean
    if values.shape[-3] not in (1, 3):
        values = values[..., : 3 if values.shape[-3] > 3 else 1, :, :]
        low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
        values = (values - low) / (high - low).clamp_min(1e-6)
    shown = (values.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return shown.expand(*shown.shape[:-3], 3, *shown.shape[-2:])


def thumbnail(image: Tensor, channels: int) -> Tensor:
    """An image as a dataset gives it, uint8 RGB [3, h, w], at most ``THUMBNAIL`` px."""
    plain = ImagesConfig(channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
    if image.dtype == torch.uint8:  # small before it becomes floats
        return to_rgb(_shrunk(image), plain)
    step = max(max(image.shape[-2:]) // (4 * THUMBNAIL), 1)
    return _shrunk(to_rgb(image[:, ::step, ::step], plain))


def _shrunk(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    scale = min(THUMBNAIL / max(height, width), 1.0)
    return resize(image, *(max(round(side * scale), 1) for side in (height, width)))


def small_crops(crops: Mapping[str, Tensor], spec: ImagesConfig, largest: int) -> dict[str, Tensor]:
    """Crops by view, uint8 RGB [crops, 3, s, s], in proportion: ``largest`` becomes ``CROP``."""
    found = {}
    for view, each in crops.items():
        side = max(round(CROP * each.shape[-1] / largest), 8)
        found[view] = torch.stack([resize(crop, side, side) for crop in to_rgb(each, spec)])
    return found


def veil(crops: Tensor, masks: Tensor) -> Tensor:
    """Crops [G, 3, s, s] whose masked patches, bool [G, P], are hardly to be seen."""
    side, grid = crops.shape[-1], math.isqrt(masks.shape[-1])
    patch = torch.arange(side) * grid // side  # which patch a row or column belongs to
    hidden = masks.unflatten(-1, (grid, grid))[:, patch[:, None], patch[None, :]][:, None]
    covered = (crops * (1 - _COVER) + _VEIL * _COVER).round().to(torch.uint8)
    return torch.where(hidden, covered, crops)


def in_a_row(first: Tensor, views: Sequence[Tensor]) -> Pixels:
    """An image [3, h, w], then the crops of each view: ``CROP`` high, smaller ones stacked."""
    height, width = first.shape[-2:]
    scale = CROP / max(height, width)
    cell = torch.full((3, CROP, CROP), 255, dtype=torch.uint8)
    image = resize(first, *(max(round(side * scale), 1) for side in (height, width)))
    top, left = ((CROP - side) // 2 for side in image.shape[-2:])
    cell[:, top : top + image.shape[-2], left : left + image.shape[-1]] = image
    columns = [cell]
    for crops in views:
        side = crops.shape[-1]
        down = max(CROP // (side + _GAP), 1)
        for start in range(0, len(crops), down):
            column = torch.full((3, CROP, side), 255, dtype=torch.uint8)
            for place, crop in enumerate(crops[start : start + down]):
                at = place * (side + _GAP)
                column[:, at : at + side] = crop[:, : CROP - at]
            columns.append(column)
    gap = torch.full((3, CROP, _GAP), 255, dtype=torch.uint8)
    parts = [part for column in columns for part in (column, gap)][:-1]
    return pixels_of(torch.cat(parts, dim=-1))


def pixels_of(image: Tensor) -> Pixels:
    """A uint8 image [3, H, W] as an array [H, W, 3]."""
    pixels: Pixels = image.permute(1, 2, 0).contiguous().numpy()
    return pixels
