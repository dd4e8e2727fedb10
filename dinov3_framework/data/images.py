"""From images of any size to what a backbone takes; the one place that does so in evaluations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.data.pictures import as_tensor
from dinov3_framework.errors import DataError

if TYPE_CHECKING:
    from dinov3_framework.data.pictures import Picture

SQUARE = ("crop", "squash")
FITS = (*SQUARE, "pad", "native")
# Evaluation resizes the shorter side to 256 where it crops 224, whatever the size.
_RESIZE_RATIO = 256 / 224
_LONGEST = 2**16  # pixels of a resized side, above which the middle is cut out first
_SUPPORT = 4  # pixels beside a place that bicubic interpolation looks at, and some more


def normalize(images: Tensor, spec: ImagesConfig) -> Tensor:
    """Scale uint8 images [..., C, H, W] to 0..1, subtract the mean, divide by the deviation.

    The result is float32 on the images' device. Floating-point images count as normalized and are
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


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """A uint8 image [C, H, W] at another size, bicubic with antialias, as torchvision does it."""
    if image.shape[1:] == (height, width):
        return image
    # Only in host memory can torch resize uint8 directly, which is several times faster.
    batch = image[None] if image.is_cpu else image[None].float()
    resized = F.interpolate(
        batch, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    if resized.is_floating_point():
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized[0]


def evaluation_image(image: Tensor, size: int, shorter: int | None = None) -> Tensor:
    """The square that evaluations look at: uint8 [C, H, W] to uint8 [C, size, size].

    The shorter side is resized to ``shorter`` pixels, by default ``round(size * 256 / 224)``
    (bicubic with antialias), then the center is cropped. An image that is ``size`` x ``size``
    already is left alone: in datasets of tiny images the subject fills the frame, and enlarging 28
    pixels to 32 only to cut the rim off again would blur it and lose its edges.
    """
    _require_image(image)
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    shorter = round(size * _RESIZE_RATIO) if shorter is None else shorter
    if max(height, width) * shorter / min(height, width) > _LONGEST:
        image = _middle(image, size, shorter)
        height, width = image.shape[-2:]
    # The longer side is rounded down, as torchvision's Resize does it.
    target = (
        shorter if height <= width else int(shorter * height / width),
        shorter if width <= height else int(shorter * width / height),
    )
    top, left = (round((side - size) / 2) for side in target)
    return resize(image, *target)[:, top : top + size, left : left + size].contiguous()


def _middle(image: Tensor, size: int, shorter: int) -> Tensor:
    """The middle of a long and thin image, a little more than a crop of ``size`` px shows of it.

    Resized as a whole, 2 x 60,000 pixels would become 256 x 7,680,000.
    """
    axis = 1 if image.shape[1] > image.shape[2] else 2
    length, scale = image.shape[axis], shorter / min(image.shape[1:])
    seen = math.ceil(size / scale) + 2 * math.ceil(_SUPPORT * max(1, 1 / scale))
    seen += (length - seen) % 2  # as much on either side
    return image.narrow(axis, (length - seen) // 2, seen) if seen < length else image


@frozen
class ImageFit:
    """A rule from uint8 images [C, H, W] to uint8 images whose sides are whole patches.

    - ``crop``: the evaluation image, its shorter side resized to ``shorter`` and the middle cropped
      to ``size`` x ``size``.
    - ``squash``: all of the image, resized to ``size`` x ``size`` whatever its shape.
    - ``pad``: the longer side is resized to ``size`` (None: nothing is resized); then the mean
      color, rounded to 8 bits, is added at the right and at the bottom up to whole patches.
    - ``native``: the image itself, whose sides must be multiples of the patch size.
    """

    images: ImagesConfig
    patch_size: int
    fit: str = "crop"
    size: int | None = None
    shorter: int | None = None  # left out, in proportion to size

    def complaint(self) -> tuple[str, str, str] | None:
        """(option, what is wrong with it, what to do), if there is something wrong."""
        size, patch = self.size, self.patch_size
        if self.fit not in FITS:
            return "fit", f"is {self.fit!r}", f"one of {', '.join(FITS)}"
        if self.fit == "native":
            hint = 'leave size out, or take fit = "crop", "squash" or "pad"'
            return None if size is None else ("size", "native images keep their own size", hint)
        if self.fit == "pad":
            return None if size is None or size > 0 else ("size", f"is {size}", "above 0")
        if size is None:
            return "size", f"{self.fit} needs one and nothing says which", "give size, in pixels"
        if size < patch or size % patch:
            message = f"{size} px are no multiple of the backbone's patch size {patch}"
            return "size", message, f"take {_nearest(size, patch)}"
        return None

    @property
    def ragged(self) -> bool:
        """Whether images keep their shapes, so that grids of patches differ."""
        return self.fit not in SQUARE

    def __call__(self, image: Tensor) -> Tensor:
        """The image that the backbone sees, on the CPU.

        Raises ``DataError`` for what is no uint8 image of ``images.channels``, and for a native one
        that does not fit.
        """
        _require_image(image)
        if image.shape[0] != self.images.channels:
            wanted = self.images.channels
            raise DataError(f"an image has {image.shape[0]} channels, the backbone takes {wanted}")
        image = image.cpu()
        if self.fit == "native":
            return self._unchanged(image)
        if self.fit == "pad":
            return self._padded(image)
        if self.size is None:
            raise DataError(f"fit = {self.fit!r} needs a size")
        if self.fit == "crop":
            return evaluation_image(image, self.size, self.shorter)
        return resize(image, self.size, self.size)

    def _unchanged(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        patch = self.patch_size
        if height % patch or width % patch:
            raise DataError(
                f"{height} x {width} pixels (height x width) are no multiple of the patch size "
                f"{patch}; resize it to {_nearest(height, patch)} x {_nearest(width, patch)}, or "
                'take fit = "pad"'
            )
        return image

    def _padded(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        if self.size is not None:
            scale = self.size / max(height, width)
            height, width = (max(round(side * scale), 1) for side in (height, width))
            image = resize(image, height, width)
        whole = [-(-side // self.patch_size) * self.patch_size for side in (height, width)]
        if [height, width] == whole:
            return image
        color = torch.tensor(self.images.mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        padded = color[:, None, None].repeat(1, *whole)
        padded[:, :height, :width] = image
        return padded


@frozen
class EvaluationTransform:
    """A picture of any form to what the backbone takes, float32 [C, H, W] on the CPU.

    A path, a PIL image, a uint8 tensor [C, H, W] or a uint8 array [H, W, C] or [H, W]; fitted,
    scaled and normalized. Raises ``DataError`` for anything else.
    """

    fit: ImageFit

    def __call__(self, picture: Picture) -> Tensor:
        images = self.fit.images
        return normalize(self.fit(as_tensor(picture, images.channels)), images)


def _require_image(image: Tensor) -> None:
    if image.ndim != 3 or image.dtype != torch.uint8 or 0 in image.shape:
        dtype = str(image.dtype).removeprefix("torch.")
        raise DataError(f"an image must be uint8 [C, H, W], is {dtype} {list(image.shape)}")


def _nearest(side: int, patch: int) -> str:
    lower = side // patch * patch
    if side % patch == 0 and side:
        return str(side)
    return f"{lower} or {lower + patch}" if lower else str(patch)
