"""A backbone ready for use: images of whatever form in, features out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts import Backbone
from dinov3_framework.errors import DataError
from dinov3_framework.images import evaluation_image, normalize

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = "str | PathLike[str] | Image | Tensor | np.ndarray[Any, Any]"

_MODES = {1: "L", 3: "RGB"}  # Pillow's, by number of channels


@frozen
class LoadedBackbone:
    """A backbone with what it was trained on.

    >>> loaded = load_backbone("teacher_backbone.safetensors")
    >>> loaded.features(["a.jpg", "b.png"]).shape  # [2, D]
    """

    backbone: Backbone
    images: ImagesConfig
    size: int  # pixels, of the images it was trained on
    provenance: Mapping[str, str]

    def features(
        self,
        images: Picture | Sequence[Picture],
        size: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Class tokens [n, D], float32 on the CPU, without gradient.

        ``images`` is one image or a list: a path, a PIL image, a uint8 tensor [C, H, W] (or
        several, [n, C, H, W]) or a uint8 array [H, W, C] or [H, W]. Grey becomes RGB and RGB grey
        as the backbone wants. Each is resized and cropped to ``size`` pixels, by default those of
        the training; a multiple of the patch size. ``batch_size`` images pass the backbone at a
        time. Raises ``DataError`` for what is no such image or size.
        """
        size = self._checked_size(self.size if size is None else size)
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, is {batch_size}")
        channels = self.images.channels
        first = next(self.backbone.parameters())
        parts = [torch.empty(0, self.backbone.embed_dim)]
        was_training = [module for module in self.backbone.modules() if module.training]
        self.backbone.eval()
        try:
            with torch.no_grad():
                for batch in _batches(images, batch_size):
                    pixels = [evaluation_image(as_tensor(x, channels), size) for x in batch]
                    inputs = normalize(torch.stack(pixels).to(first.device), self.images)
                    parts.append(self.backbone(inputs.to(first.dtype)).float().cpu())
        finally:
            for module in was_training:
                module.training = True
        return torch.cat(parts)

    def _checked_size(self, size: int) -> int:
        patch = self.backbone.patch_size
        if size < patch or size % patch:
            lower = max(size // patch, 1) * patch
            raise DataError(
                f"a size of {size} px is no multiple of the backbone's patch size {patch}; take "
                f"{lower} or {lower + patch}"
            )
        return size


def _batches(images: Any, batch_size: int) -> Iterator[list[Any]]:
    if isinstance(images, Tensor) and images.ndim == 4:
        items: Sequence[Any] = images  # type: ignore[assignment]
    else:
        items = images if isinstance(images, list | tuple) else [images]
    for start in range(0, len(items), batch_size):
        yield list(items[start : start + batch_size])


def as_tensor(picture: Any, channels: int) -> Tensor:
    """One image of any accepted form as uint8 [channels, H, W]; raises ``DataError``."""
    if isinstance(picture, str | PathLike):
        return _from_file(fspath(picture), channels)
    if isinstance(picture, Tensor):
        return _from_tensor(picture, channels)
    if isinstance(picture, np.ndarray):
        planes = picture[..., None] if picture.ndim == 2 else picture
        if planes.ndim != 3 or planes.dtype != np.uint8:
            raise DataError(
                "an image as an array must be uint8 [H, W, C] or [H, W], is "
                f"{picture.dtype} {list(picture.shape)}"
            )
        return _from_tensor(torch.from_numpy(planes.transpose(2, 0, 1).copy()), channels)
    if hasattr(picture, "convert") and hasattr(picture, "mode"):
        return _from_pil(picture, channels, "a PIL image")
    raise DataError(
        "an image must be a path, a PIL image, a uint8 tensor [C, H, W] or a uint8 array "
        f"[H, W, C], is {type(picture).__name__}"
    )


def _from_file(path: str, channels: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return _from_pil(image, channels, path)
    except FileNotFoundError:
        raise DataError(f"there is no image {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def _from_pil(image: Image, channels: int, name: str) -> Tensor:
    if channels not in _MODES:
        raise DataError(
            f"{name} gives 1 or 3 channels, the backbone takes {channels}; give a uint8 tensor "
            f"[{channels}, H, W]"
        )
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, name)
    values = np.array(image.convert(_MODES[channels]))
    planes = values[..., None] if values.ndim == 2 else values
    return torch.from_numpy(planes.transpose(2, 0, 1).copy())


def _to_8_bits(image: Image, name: str) -> Image:
    """16-bit grey scaled to 8 bits, where Pillow's own conversion would cut at 255."""
    from PIL import Image as pil

    values = np.asarray(image)
    if image.mode == "F" or (values.size and (values.min() < 0 or values.max() > 65535)):
        raise DataError(f"{name} holds values of more than 16 bits; 8 or 16 are read")
    return pil.fromarray((values >> 8).astype(np.uint8))


def _from_tensor(image: Tensor, channels: int) -> Tensor:
    if image.ndim != 3 or image.dtype != torch.uint8:
        dtype = str(image.dtype).removeprefix("torch.")
        raise DataError(
            f"an image as a tensor must be uint8 [C, H, W], is {dtype} {list(image.shape)}"
        )
    given = image.shape[0]
    if given == channels:
        return image
    if {given, channels} != {1, 3}:
        raise DataError(f"an image has {given} channels, the backbone takes {channels}")
    from PIL import Image

    pixels = image[0] if given == 1 else image.permute(1, 2, 0)
    return _from_pil(Image.fromarray(pixels.cpu().contiguous().numpy()), channels, "an image")
