"""One image file to uint8 [C, H, W]; whatever goes wrong is a CorruptSampleError."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3_framework import CorruptSampleError

# Pillow's modes by number of channels; it has none of 5 or more.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def decode(path: Path, channels: int, max_pixels: int) -> Tensor:
    """The image at ``path``, uint8 [channels, H, W].

    Image files are converted to grey, RGB or RGBA as ``channels`` demands. NumPy files hold uint8
    [H, W, channels], [channels, H, W] or, for one channel, [H, W], and are not converted. Raises
    ``CorruptSampleError``, for more than ``max_pixels`` before anything is decoded.
    """
    try:
        if path.suffix.lower() == ".npy":
            pixels = _read_array(path, channels, max_pixels)
        else:
            pixels = _read_image(path, channels, max_pixels)
    except (CorruptSampleError, MemoryError):  # the latter says nothing about the file
        raise
    except Exception as error:  # decoders fed with garbage raise nearly anything
        message = str(error) or type(error).__name__
        raise CorruptSampleError(str(path), message) from error
    return torch.from_numpy(pixels)


def _read_image(path: Path, channels: int, max_pixels: int) -> np.ndarray:
    """Through Pillow, [C, H, W]."""
    with _pixel_limit(max_pixels), Image.open(path) as image:
        _check_size(path, image.width, image.height, max_pixels)
        if channels not in MODES:
            raise CorruptSampleError(
                str(path),
                f"an image file gives 1 to 4 channels, images.channels is {channels}; .npy files "
                "hold any number",
            )
        image.load()
        converted = _to_8_bits(path, image)
        if converted.mode != MODES[channels]:
            converted = converted.convert(MODES[channels])
        pixels = np.array(converted)  # a copy, since a view of Pillow's memory is read-only
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_8_bits(path: Path, image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, where Pillow's own conversion would cut at 255."""
    if image.mode == "F":
        raise CorruptSampleError(str(path), "holds floating-point values; 8 or 16 bits are read")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise CorruptSampleError(str(path), "holds 32-bit values; 8 or 16 bits are read")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _read_array(path: Path, channels: int, max_pixels: int) -> np.ndarray:
    """From a NumPy file, [C, H, W]."""
    # Mapped, only the header is read before the shape is known to be sound.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != np.uint8:
        raise CorruptSampleError(str(path), f"holds {array.dtype}, uint8 is read")
    if array.ndim == 2 and channels == 1:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] == channels:
        array = array.transpose(2, 0, 1)
    elif array.ndim != 3 or array.shape[0] != channels:
        raise CorruptSampleError(
            str(path), f"has shape {list(array.shape)}, images.channels is {channels}"
        )
    _check_size(path, array.shape[2], array.shape[1], max_pixels)
    return np.array(array, order="C")


def _check_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise CorruptSampleError(
            str(path), f"{width} x {height} pixels are more than max_pixels = {max_pixels:,}"
        )
    if width * height == 0:
        raise CorruptSampleError(str(path), f"{width} x {height} pixels")


@contextmanager
def _pixel_limit(pixels: int) -> Iterator[None]:
    """Pillow's own guard against decompression bombs, at ``pixels`` and as an error.

    It also holds where one file wraps another of a different size, which our look at the outer
    header would miss.
    """
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
