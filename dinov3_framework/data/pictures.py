"""Images in every form that people have them in, as uint8 [C, H, W].

Files are decoded by Pillow alone: its palettes, CMYK and 16-bit values come out right, and masks
are to be read with the same rule. An orientation in EXIF data is not applied.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.errors import CorruptSampleError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = "str | PathLike[str] | Image | Tensor | np.ndarray[Any, Any]"

# Pillow's modes by number of channels; it has none of 5 or more.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 178_956_970  # where Pillow refuses, about 0.5 GB once decoded

# What Pillow decodes itself, or a plugin of it. Not EPS, which runs Ghostscript, nor what other
# programs have to draw.
_FORMATS = (
    "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "MPO", "DIB", "TGA",
    "ICO", "CUR", "ICNS", "PCX", "DCX", "SGI", "PSD", "QOI", "DDS", "BLP", "FTEX", "SPIDER", "SUN",
    "XBM", "XPM", "IM", "IMT", "MSP", "FITS", "FLI", "GBR", "IPTC", "MCIDAS", "PCD", "PIXAR",
    "XVTHUMB", "HEIF", "JXL",
)  # fmt: skip


# --------------------------------------------------------------------------- files
def read_image(path: str | PathLike[str], channels: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The image in a file, uint8 [channels, H, W].

    Image files are converted to gray, RGB or RGBA as ``channels`` demands. NumPy files hold uint8
    [H, W, channels], [channels, H, W] or, for one channel, [H, W], and are not converted. Raises
    ``CorruptSampleError``, for more than ``max_pixels`` before anything is decoded.
    """
    path = fspath(path)
    try:
        if path.lower().endswith(".npy"):
            return torch.from_numpy(_read_array(path, channels, max_pixels))
        return _read_raster(path, channels, max_pixels)
    except (CorruptSampleError, MemoryError):  # the latter says nothing about the file
        raise
    except Exception as error:  # decoders fed with garbage raise nearly anything
        message = str(error) or type(error).__name__
        raise CorruptSampleError(path, message) from error


def _read_raster(path: str, channels: int, max_pixels: int) -> Tensor:
    from PIL import Image

    with _pixel_limit(max_pixels), Image.open(path, formats=_formats()) as image:
        _check_size(path, image.width, image.height, max_pixels)
        if channels not in MODES:
            raise CorruptSampleError(
                path,
                f"an image file gives 1 to 4 channels, images.channels is {channels}; .npy files "
                "hold any number",
            )
        image.load()
        return _from_pil(image, channels, path)


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _read_array(path: str, channels: int, max_pixels: int) -> np.ndarray:
    """From a NumPy file, [C, H, W]."""
    # Mapped, only the header is read before the shape is known to be sound.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.uint8:
        raise CorruptSampleError(path, f"holds {array.dtype}, uint8 is read")
    if array.ndim == 2 and channels == 1:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] == channels:
        array = array.transpose(2, 0, 1)
    elif array.ndim != 3 or array.shape[0] != channels:
        raise CorruptSampleError(
            path, f"has shape {list(array.shape)}, images.channels is {channels}"
        )
    _check_size(path, array.shape[2], array.shape[1], max_pixels)
    return np.array(array, order="C")


def _check_size(path: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise CorruptSampleError(
            path, f"{width} x {height} pixels are more than max_pixels = {max_pixels:,}"
        )
    if width * height == 0:
        raise CorruptSampleError(path, f"{width} x {height} pixels")


@contextmanager
def _pixel_limit(pixels: int) -> Iterator[None]:
    """Pillow's own guard against decompression bombs, at ``pixels`` and as an error.

    It also holds where one file wraps another of a different size, which our look at the outer
    header would miss.
    """
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _from_pil(image: Image, channels: int, name: str) -> Tensor:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, name)
    # A copy, since a view of Pillow's memory is read-only.
    values = np.array(image if image.mode == MODES[channels] else image.convert(MODES[channels]))
    return _planes(values)


def _to_8_bits(image: Image, name: str) -> Image:
    """16-bit gray scaled to 8 bits, where Pillow's own conversion would cut at 255."""
    from PIL import Image as pil

    if image.mode == "F":
        raise CorruptSampleError(name, "holds floating-point values; 8 or 16 bits are read")
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise CorruptSampleError(name, "holds 32-bit values; 8 or 16 bits are read")
    return pil.fromarray((values >> 8).astype(np.uint8))


def _planes(values: np.ndarray) -> Tensor:
    """[H, W] or [H, W, C] to [C, H, W], in memory of its own or that of ``values``."""
    planes = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes))


# --------------------------------------------------------------------------- any form
def as_tensor(picture: Any, channels: int) -> Tensor:
    """One image of any accepted form as uint8 [channels, H, W]; raises ``DataError``."""
    if isinstance(picture, Tensor):
        return _from_tensor(picture, channels)
    if isinstance(picture, np.ndarray):
        if picture.ndim not in (2, 3) or picture.dtype != np.uint8:
            raise DataError(
                "an image as an array must be uint8 [H, W, C] or [H, W], is "
                f"{picture.dtype} {list(picture.shape)}"
            )
        return _from_tensor(_planes(picture.copy()), channels)
    is_file = isinstance(picture, str | PathLike)
    if not is_file and not (hasattr(picture, "convert") and hasattr(picture, "mode")):
        raise DataError(
            "an image must be a path, a PIL image, a uint8 tensor [C, H, W] or a uint8 array "
            f"[H, W, C], is {type(picture).__name__}"
        )
    name = fspath(picture) if is_file else "a PIL image"
    if channels not in (1, 3) and not name.endswith(".npy"):
        # Pillow would make up an alpha channel of 255, which a backbone of 4 hardly means.
        raise DataError(
            f"{name} gives 1 or 3 channels, the backbone takes {channels}; give a uint8 tensor "
            f"[{channels}, H, W]"
        )
    try:
        return read_image(name, channels) if is_file else _from_pil(picture, channels, name)
    except CorruptSampleError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DataError(f"there is no image {name}") from None
        raise DataError(f"{name} cannot be read as an image: {error.reason}") from error


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
