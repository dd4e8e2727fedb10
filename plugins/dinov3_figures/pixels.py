"""From tensors of images to RGB that a person can look at."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dinov3_framework import DataError, ImagesConfig

Pixels = np.ndarray  # uint8 [..., H, W, 3]


def to_rgb(images: Tensor, spec: ImagesConfig) -> Pixels:
    """Images [..., C, H, W], uint8 or normalised float, as uint8 RGB [..., H, W, 3].

    One channel becomes grey, three are red, green and blue. Of any other number the first three
    (of two, the first) are shown, each stretched to its own range within an image: such channels
    often fill a small part of theirs. Raises ``DataError`` where C is not ``spec.channels``.
    """
    if images.ndim < 3 or images.shape[-3] != spec.channels:
        raise DataError(
            f"crops of shape {list(images.shape)} where [..., {spec.channels}, H, W] is expected: "
            "images.channels must be what the augmentation gives"
        )
    values = _scaled(images.detach().cpu(), spec)
    if spec.channels not in (1, 3):
        values = values[..., : 3 if spec.channels > 3 else 1, :, :]
        low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
        values = (values - low) / (high - low).clamp_min(1e-6)
    if values.shape[-3] == 1:
        values = values.expand(*values.shape[:-3], 3, *values.shape[-2:])
    shown = (values.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)
    return shown.contiguous().numpy()


def _scaled(images: Tensor, spec: ImagesConfig) -> Tensor:
    """Values in 0..1, without the normalisation."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    mean = torch.tensor(spec.mean)[:, None, None]
    std = torch.tensor(spec.std)[:, None, None]
    return images.float() * std + mean


def fit(images: Pixels, side: int) -> Pixels:
    """Square images [..., s, s, 3] at ``side`` pixels: whole pixels repeated where that fits."""
    old = images.shape[-2]
    if side % old == 0:
        return images.repeat(side // old, axis=-3).repeat(side // old, axis=-2)
    flat = torch.from_numpy(images.reshape(-1, old, old, 3)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        flat.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    shown = resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return shown.numpy().reshape(*images.shape[:-3], side, side, 3)
