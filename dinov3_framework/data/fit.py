"""How an image of any size becomes one that a backbone takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor
from torch.nn import functional as F

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.data.images import evaluation_image, normalize
from dinov3_framework.data.pictures import as_tensor
from dinov3_framework.errors import DataError

if TYPE_CHECKING:
    from dinov3_framework.data.pictures import Picture

SQUARE = ("crop", "squash")
FITS = (*SQUARE, "pad", "native")


@frozen
class ImageFit:
    """A rule from uint8 images [C, H, W] to uint8 images whose sides are whole patches.

    - ``crop``: the evaluation image, resized and cropped to ``size`` x ``size``.
    - ``squash``: all of the image, resized to ``size`` x ``size`` whatever its shape.
    - ``pad``: the longer side is resized to ``size`` (None: nothing is resized); then the mean
      colour, rounded to 8 bits, is added at the right and at the bottom up to whole patches.
    - ``native``: the image itself, whose sides must be multiples of the patch size.
    """

    images: ImagesConfig
    patch_size: int
    fit: str = "crop"
    size: int | None = None

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

        Raises ``DataError`` for what is no uint8 image, and for a native one that does not fit.
        """
        if image.ndim != 3 or image.dtype != torch.uint8 or 0 in image.shape:
            dtype = str(image.dtype).removeprefix("torch.")
            raise DataError(f"an image must be uint8 [C, H, W], is {dtype} {list(image.shape)}")
        image = image.cpu()
        if self.fit == "native":
            return self._unchanged(image)
        if self.fit == "pad":
            return self._padded(image)
        size = self.size
        if size is None:
            raise DataError(f"fit = {self.fit!r} needs a size")
        if self.fit == "crop":
            return evaluation_image(image, size)
        return _resized(image, size, size)

    def _unchanged(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        patch = self.patch_size
        if height % patch or width % patch or 0 in (height, width):
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
            image = _resized(image, height, width)
        whole = [-(-side // self.patch_size) * self.patch_size for side in (height, width)]
        if [height, width] == whole:
            return image
        colour = torch.tensor(self.images.mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        padded = colour[:, None, None].repeat(1, *whole)
        padded[:, :height, :width] = image
        return padded


@frozen
class EvaluationTransform:
    """A picture of any form to what the backbone takes, float32 [C, H, W] on the CPU.

    A path, a PIL image, a uint8 tensor [C, H, W] or a uint8 array [H, W, C] or [H, W]; fitted,
    scaled and normalised. Raises ``DataError`` for anything else.
    """

    fit: ImageFit

    def __call__(self, picture: Picture) -> Tensor:
        images = self.fit.images
        return normalize(self.fit(as_tensor(picture, images.channels)), images)


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 [C, height, width]; bicubic with antialias, as evaluation images."""
    if image.shape[1:] == (height, width):
        return image
    resized = F.interpolate(
        image[None], (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0]


def _nearest(side: int, patch: int) -> str:
    lower = side // patch * patch
    if side % patch == 0 and side:
        return str(side)
    return f"{lower} or {lower + patch}" if lower else str(patch)
