"""Images in every form that people have them in, as uint8 [C, H, W], with the upper side up.

Pillow decodes files: its palettes and CMYK come out right. What it would cut to 8 bits or to fewer
bands is read by torchvision (PNG) and tifffile (TIFF). An orientation in EXIF data is applied, and
what is transparent shows a background; masks are to be read with the same rules.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.data.rasters import (
    Range,
    Raster,
    check_size,
    is_cut,
    read_png,
    read_tiff,
    to_8_bits,
)
from dinov3_framework.errors import CorruptSampleError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = "str | PathLike[str] | Image | Tensor | np.ndarray[Any, Any]"

MAX_PIXELS = 178_956_970  # where Pillow refuses, about 0.5 GB once decoded
WHITE = (255, 255, 255)

# What Pillow decodes itself, or a plugin of it. Not EPS, which runs Ghostscript, nor what other
# programs have to draw.
_FORMATS = (
    "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "MPO", "DIB", "TGA",
    "ICO", "CUR", "ICNS", "PCX", "DCX", "SGI", "PSD", "QOI", "DDS", "BLP", "FTEX", "SPIDER", "SUN",
    "XBM", "XPM", "IM", "IMT", "MSP", "FITS", "FLI", "GBR", "IPTC", "MCIDAS", "PCD", "PIXAR",
    "XVTHUMB", "HEIF", "JXL",
)  # fmt: skip
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two for files over 4 GB


# --------------------------------------------------------------------------- files
def read_image(
    path: str | PathLike[str],
    channels: int,
    max_pixels: int = MAX_PIXELS,
    *,
    values: Range | None = None,
    background: tuple[int, int, int] = WHITE,
) -> Tensor:
    """The image in a file, uint8 [channels, H, W].

    Wanted as 1 or 3 channels, colors are converted, and what is transparent shows ``background``,
    8-bit RGB. As any other number of channels, the file has to have that many bands of its own.
    ``values`` are those that become 0 and 255, where bands have more than 8 bits. NumPy files hold
    [H, W, channels], [channels, H, W] or, for one channel, [H, W], and their bands are not
    converted. Raises ``CorruptSampleError``, for more than ``max_pixels`` before anything is
    decoded.
    """
    path = fspath(path)
    with blaming(path):
        found = read_raster(path, channels, max_pixels)
        return _converted(found, channels, path, values, background)


def decode_image(
    data: bytes,
    name: str,
    channels: int,
    max_pixels: int = MAX_PIXELS,
    *,
    values: Range | None = None,
    background: tuple[int, int, int] = WHITE,
) -> Tensor:
    """The image in the bytes of a file called ``name``; all else as :func:`read_image` does it."""
    with blaming(name):
        found = read_raster(name, channels, max_pixels, data)
        return _converted(found, channels, name, values, background)


def _converted(
    found: Image | Raster,
    channels: int,
    name: str,
    values: Range | None,
    background: tuple[int, int, int],
) -> Tensor:
    if isinstance(found, Raster):
        return _from_raster(found, channels, name, values, background)
    return _from_pil(found, channels, name, values, background)


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Turn whatever comes up while a file is read into its ``CorruptSampleError``."""
    try:
        yield
    except CorruptSampleError:
        raise
    except MemoryError as error:
        raise CorruptSampleError(name, "takes more memory to decode than there is") from error
    except Exception as error:  # decoders fed with garbage raise nearly anything
        message = str(error) or type(error).__name__
        raise CorruptSampleError(name, message) from error


def read_raster(
    path: str, channels: int, max_pixels: int, data: bytes | None = None
) -> Image | Raster:
    """What a file holds, decoded and upright: Pillow's image, or bands that it would cut.

    ``data`` are its bytes if they are in memory; nothing is looked for at ``path`` then.
    """
    if data is None and not stat.S_ISREG(os.stat(path).st_mode):
        raise CorruptSampleError(path, "is no regular file")
    if path.lower().endswith(".npy"):
        return Raster(_read_array(path, channels, max_pixels, data))
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        source = path if data is None else BytesIO(data)
        with _pixel_limit(max_pixels), Image.open(source, formats=_formats()) as image:
            check_size(path, image.width, image.height, max_pixels)
            if not is_cut(image, channels):
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return image
            turned, is_png = image.getexif().get(0x0112, 1), image.format == "PNG"
    except UnidentifiedImageError as error:
        if not _is_tiff(path, data):
            raise CorruptSampleError(path, "cannot identify image file") from error
        return read_tiff(path, channels, max_pixels, data)
    if not is_png:
        return read_tiff(path, channels, max_pixels, data)
    return read_png(path, turned, data)


def _is_tiff(path: str, data: bytes | None) -> bool:
    if data is not None:
        return data[:4] in _TIFF
    with open(path, "rb") as file:
        return file.read(4) in _TIFF


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    # Of files that are read otherwise then, one line each.
    logging.getLogger("PIL.TiffImagePlugin").addFilter(
        lambda record: not record.msg.startswith("More samples per pixel")
    )
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _read_array(path: str, channels: int, max_pixels: int, data: bytes | None = None) -> np.ndarray:
    """From a NumPy file, [H, W, C]."""
    # Mapped, only the header is read before the shape is known to be sound.
    array = _mapped(data) if data is not None else np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.kind not in "uifb":
        raise CorruptSampleError(path, f"holds {array.dtype}, numbers are read")
    if array.ndim == 2 and channels == 1:
        array = array[:, :, None]
    elif array.ndim == 3 and array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    elif array.ndim != 3 or array.shape[2] != channels:
        raise CorruptSampleError(
            path, f"has shape {list(array.shape)}, images.channels is {channels}"
        )
    check_size(path, array.shape[1], array.shape[0], max_pixels)
    return np.array(array, order="C")


def _mapped(data: bytes) -> np.ndarray:
    """The array of a NumPy file in memory, which it stays a view of."""
    stream = BytesIO(data)
    major, _ = np.lib.format.read_magic(stream)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if major not in read:
        raise ValueError(f"NumPy files of version {major} are not read")
    shape, is_fortran, dtype = read[major](stream)
    if dtype.hasobject:
        raise ValueError("holds Python objects")
    flat = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return flat.reshape(shape, order="F" if is_fortran else "C")


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


# --------------------------------------------------------------------------- channels
def _from_pil(
    image: Image,
    channels: int,
    name: str,
    values: Range | None = None,
    background: tuple[int, int, int] = WHITE,
) -> Tensor:
    if image.mode.startswith(("I", "F")):
        return _from_raster(Raster(np.asarray(image)[:, :, None]), channels, name, values)
    if channels in (1, 3):
        mode = "L" if channels == 1 else "RGB"
        if image.has_transparency_data:
            image = _over(image, background)
        return _planes(np.array(image if image.mode == mode else image.convert(mode)))
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        raise CorruptSampleError(name, f"is {image.mode}, of which {channels} channels mean little")
    bands = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}.get(image.mode, image.mode)
    if image.mode == "P":
        bands = "RGBA" if image.has_transparency_data else "RGB"
    stored = np.array(image if bands == image.mode else image.convert(bands))
    return _from_raster(Raster(stored if stored.ndim == 3 else stored[:, :, None]), channels, name)


def _over(image: Image, background: tuple[int, int, int]) -> Image:
    """A picture as it looks in front of a color."""
    from PIL import Image as pil

    behind = pil.new("RGBA", image.size, (*background, 255))
    return pil.alpha_composite(behind, image.convert("RGBA"))


def _from_raster(
    raster: Raster,
    channels: int,
    name: str,
    values: Range | None = None,
    background: tuple[int, int, int] = WHITE,
) -> Tensor:
    stored, bands = raster.values, raster.bands
    colors = bands - raster.has_alpha
    if channels not in (1, 3) or (bands == channels and not raster.has_alpha):
        if bands != channels:
            raise CorruptSampleError(
                name, f"has {bands} bands, images.channels is {channels}; none is made up"
            )
        return _planes(to_8_bits(name, stored, values))
    if colors not in (1, 3) and not (channels == 3 and colors == 4):
        raise CorruptSampleError(name, f"has {bands} bands, images.channels is {channels}")
    # Red, green and blue of a file with one band more, such as infrared.
    seen = to_8_bits(name, stored[:, :, : min(colors, 3)], values)
    if raster.has_alpha:
        opaque = to_8_bits(name, stored[:, :, -1:], None)
        seen = np.repeat(seen, 3, axis=2) if colors == 1 else seen
        seen = np.concatenate([seen, opaque], axis=2)
    return _from_pil(_pil(seen), channels, name, None, background)


def _pil(values: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def _planes(values: np.ndarray) -> Tensor:
    """[H, W] or [H, W, C] to [C, H, W], in memory of its own or that of ``values``."""
    planes = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes))


# --------------------------------------------------------------------------- what is lost
def lost(paths: Sequence[str], channels: int, max_pixels: int, given: Range | None) -> list[str]:
    """What of some image files, the first of a dataset, goes unused; in words, with the remedy."""
    spans, bands, counts = [], set(), True
    for path in paths:
        try:
            found = read_raster(path, channels, max_pixels)
        except Exception:  # what is broken is counted when it is read
            continue
        if not isinstance(found, Raster) and found.mode.startswith(("I", "F")):
            found = Raster(np.asarray(found)[:, :, None])
        if not isinstance(found, Raster):
            continue
        if channels < found.bands - found.has_alpha and channels == 3:
            bands.add(found.bands)
        if found.values.dtype != np.uint8 and found.values.size:
            spans.append((np.nanmin(found.values), np.nanmax(found.values)))
            counts &= found.values.dtype.kind in "ui"
    lines = []
    for count in sorted(bands):
        lines.append(f"files of {count} bands: 3 are read; images.channels = {count} reads all")
    if spans:
        least, most = float(min(low for low, _ in spans)), float(max(high for _, high in spans))
        low, high = given or (0.0, 65535.0)
        seen = f"the first {len(spans)} files of more than 8 bits hold {least:g} to {most:g}"
        if most - least < (high - low) / 4:
            remedy = "low and high"
            if counts and least >= 0:
                remedy = f"bits = {max(int(most).bit_length(), 8)}, or {remedy}"
            lines.append(
                f"{seen}, a fraction of {low:g} to {high:g}; state their range with {remedy}"
            )
        elif least < low or most > high:
            lines.append(f"{seen}; below {low:g} is black and above {high:g} white")
    return lines


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
    if not is_file and not (hasattr(picture, "convert") and hasattr(picture, "getexif")):
        raise DataError(
            "an image must be a path, a PIL image, a uint8 tensor [C, H, W] or a uint8 array "
            f"[H, W, C], is {type(picture).__name__}"
        )
    name = fspath(picture) if is_file else "a PIL image"
    try:
        if is_file:
            return read_image(name, channels)
        from PIL import ImageOps

        return _from_pil(ImageOps.exif_transpose(picture), channels, name)
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
