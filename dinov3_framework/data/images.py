"""From uint8 images to what a backbone sees; the one place that does so outside augmentations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.errors import DataError

# Evaluation resizes the shorter side to 256 where it crops 224, whatever the size.
_RESIZE_RATIO = 256 / 224


def normalize(images: Tensor, spec: ImagesConfig) -> Tensor:
    """Scale uint8 images [..., C, H, W] to 0..1, subtract the mean, divide by the deviation.

    The result is float32 on the images' device. Floating-point images count as normalised and are
    returned as they are. Raises ``DataError`` where C is not ``spec.channels``.
    """
    if images.ndim < 3 or images.shape[-3] != spec.channels:
        raise DataError(
            f"images of shape {list(images.shape)} where images.channels = {spec.channels} asks "
            f"for [..., {spec.channels}, H, W]; set images.channels (with mean and std) to what "
            "the data hold"
        )
    if images.is_floating_point():
        return images
    mean = torch.tensor(spec.mean, dtype=torch.float32, device=images.device)[:, None, None]
    std = torch.tensor(spec.std, dtype=torch.float32, device=images.device)[:, None, None]
    return images.float().sub_(mean * 255).div_(std * 255)


def evaluation_image(image: Tensor, size: int) -> Tensor:
    """The square that evaluations look at: uint8 [C, H, W] to uint8 [C, size, size].

    The shorter side is resized to ``round(size * 256 / 224)`` (bicubic with antialias), then the
    centre is cropped. An image that is ``size`` x ``size`` already is left alone: in datasets of
    tiny images the subject fills the frame, and enlarging 28 pixels to 32 only to cut the rim off
    again would blur it and lose its edges.
    """
    if image.ndim != 3 or image.dtype != torch.uint8:
        dtype = str(image.dtype).removeprefix("torch.")
        raise DataError(f"an image must be uint8 [C, H, W], is {dtype} {list(image.shape)}")
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    shorter = round(size * _RESIZE_RATIO)
    # The longer side is rounded down, as torchvision's Resize does it.
    target = (
        shorter if height <= width else int(shorter * height / width),
        shorter if width <= height else int(shorter * width / height),
    )
    resized = image if target == (height, width) else _resize(image, target)
    top, left = (round((side - size) / 2) for side in target)
    return resized[:, top : top + size, left : left + size].contiguous()


def _resize(image: Tensor, target: tuple[int, int]) -> Tensor:
    batch = image[None]
    # Only in host memory can torch resize uint8 directly, which is several times faster.
    if not image.is_cpu:
        batch = batch.float()
    resized = F.interpolate(batch, target, mode="bicubic", antialias=True, align_corners=False)
    if resized.is_floating_point():
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized[0]
