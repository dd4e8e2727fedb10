"""Reads masks and maps: numbers by pixel as they are stored, with the upper side up.

What decoders do to pictures is wrong for ids and depth, and undone or avoided here: palettes become
colors, gray values of 2 and 4 bits are spread over 0..255, white-is-zero TIFFs are inverted, values
of 32 bits without a sign wrap (all seen in Pillow 13). Orientation in EXIF data is applied as it is
to images.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3_framework.data.pictures import MAX_PIXELS, blaming, read_raster
from dinov3_framework.data.rasters import Raster
from dinov3_framework.errors import CorruptSampleError

if TYPE_CHECKING:
    from PIL.Image import Image

# Endings of files that keep numbers: not JPEG, which changes them.
MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".npy", ".bmp", ".gif", ".pgm")

_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 258, 262, 274, 339  # tags of a TIFF
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2  # sample formats
_LOSSY = ("JPEG", "MPO")
_NUMBERS = ("1", "L", "F", "I", "I;16", "I;16L", "I;16B", "I;16N")  # modes of one channel
_PNG_BITS = 24  # where the bits of a channel stand in a PNG


def read_mask(
    path: str | PathLike[str],
    max_pixels: int = MAX_PIXELS,
    *,
    colors: bool = False,
    data: bytes | None = None,
) -> np.ndarray:
    """Ids of a mask, integers [H, W]; or uint8 [H, W, 3] where the file holds colors.

    A palette's indices are ids, unless ``colors`` asks for what they look like. ``data`` are the
    file's bytes, if they are in memory. Raises ``CorruptSampleError``.
    """
    path = fspath(path)
    with blaming(path):
        found = read_raster(path, 1, max_pixels, data)
        if isinstance(found, Raster):
            stored = _single(path, found.values, "a mask")
        elif found.format in _LOSSY:
            raise CorruptSampleError(path, "is a JPEG, which changes ids; keep masks as PNG")
        elif found.mode in ("RGB", "RGBA", "RGBX", "LA", "PA") or (colors and found.mode == "P"):
            return np.array(found.convert("RGB"))
        else:
            stored = _numbers(found, path, data)
        if stored.dtype == np.bool_:
            return stored.astype(np.uint8)
        if stored.dtype.kind not in "ui":
            raise CorruptSampleError(path, f"holds {stored.dtype}, ids are whole numbers")
        return stored


def read_map(
    path: str | PathLike[str], max_pixels: int = MAX_PIXELS, *, data: bytes | None = None
) -> np.ndarray:
    """Numbers by pixel as they are stored, such as depth: integers or floats [H, W].

    Raises ``CorruptSampleError``, for files with colors too.
    """
    path = fspath(path)
    with blaming(path):
        found = read_raster(path, 1, max_pixels, data)
        if isinstance(found, Raster):
            return _single(path, found.values, "a map")
        if found.format in _LOSSY or found.mode not in _NUMBERS:
            what = "a JPEG" if found.format in _LOSSY else f"a picture ({found.mode})"
            raise CorruptSampleError(
                path, f"is {what}; a map is one channel of numbers: PNG of 16 bits, TIFF, .npy"
            )
        return _numbers(found, path, data)


def orientation_of(path: str | PathLike[str]) -> int:
    """EXIF's ``Orientation`` of a picture, 1 to 8; 1 where it says none."""
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    with blaming(fspath(path)):
        try:
            with pil.open(path) as image:
                return int(image.getexif().get(_ORIENTATION, 1))
        except UnidentifiedImageError:  # NumPy's files, and TIFFs that Pillow does not know
            return 1


def _single(path: str, values: np.ndarray, what: str) -> np.ndarray:
    """[H, W] of [H, W, 1]."""
    if values.shape[2] != 1:
        raise CorruptSampleError(
            path, f"has {values.shape[2]} bands of {values.dtype}; {what} has one"
        )
    return np.ascontiguousarray(values[:, :, 0])


def _numbers(image: Image, path: str, data: bytes | None) -> np.ndarray:
    """What is stored in a single channel, [H, W]."""
    stored = np.array(image)
    tags: dict[int, Any] = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if image.mode in ("1", "L") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        stored = ~stored  # Pillow shows them as they look
    if image.mode == "L" and (bits := _bits(image.format, tags, path, data)) in (2, 4):
        stored //= 255 // (2**bits - 1)  # and spreads them over 0..255
    kind = int(np.ravel(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)))[0])
    if image.mode == "L" and kind == _SIGNED:
        stored = stored.view(np.int8)
    if image.mode == "I" and tags and kind == _UNSIGNED and _bits("TIFF", tags, path, data) == 32:
        stored = stored.view(np.uint32)
    return stored


def _bits(file_format: str | None, tags: dict[int, Any], path: str, data: bytes | None) -> int:
    """Bits of a value of a PNG or TIFF; 8 of others."""
    if file_format == "TIFF":
        return int(np.ravel(tags.get(_BITS, (1,)))[0])
    if file_format != "PNG":
        return 8
    if data is None:
        with open(path, "rb") as stream:
            data = stream.read(_PNG_BITS + 1)
    return data[_PNG_BITS]
