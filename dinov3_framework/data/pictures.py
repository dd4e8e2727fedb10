"""Images in every form that people have them in, as uint8 [C, H, W]."""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = "str | PathLike[str] | Image | Tensor | np.ndarray[Any, Any]"

_MODES = {1: "L", 3: "RGB"}  # Pillow's, by number of channels


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
