"""Image files that Pillow would cut: more than 4 bands, more than 8 bits a band."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from attrs import frozen

from dinov3_framework.errors import CorruptSampleError

if TYPE_CHECKING:
    from PIL.Image import Image

Range = tuple[float, float]  # the values that become 0 and 255

# Tags of a TIFF.
_BITS, _SAMPLES, _ORIENTATION, _PLANAR, _EXTRA = 258, 277, 274, 284, 338
_ALPHA = (1, 2)  # kinds of extra samples in a TIFF


@frozen(eq=False)
class Raster:
    """What is stored in a file, with the upper side up."""

    values: np.ndarray  # [H, W, bands], as stored
    has_alpha: bool = False  # the last band says how opaque a pixel is

    @property
    def bands(self) -> int:
        return int(self.values.shape[2])


def to_8_bits(name: str, values: np.ndarray, given: Range | None) -> np.ndarray:
    """Values of any type as uint8: linear from a range, rounded, cut at its ends.

    Left out, the range is 0 to 255 of 8 and 0 to 65,535 of 16 bits without a sign; others have none
    that goes without saying. NaN, which rasters have where nothing is known, counts as its low end.
    """
    if values.dtype == np.bool_:
        raise CorruptSampleError(name, "holds bool, numbers are read")
    if given is None:
        if values.dtype == np.uint8:
            return values
        if values.dtype != np.uint16 and (_is_float(values) or not _fits_16_bits(values)):
            raise CorruptSampleError(
                name, f"holds {values.dtype}: give the range of its values (low and high)"
            )
        given = (0, 65535)
    low, high = given
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
    rounded: np.ndarray = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return rounded


def _is_float(values: np.ndarray) -> bool:
    return bool(np.issubdtype(values.dtype, np.floating))


def _fits_16_bits(values: np.ndarray) -> bool:
    """Whether integers are those of 16 bits in a wider type, as some decoders give them."""
    return not values.size or (int(values.min()) >= 0 and int(values.max()) <= 65535)


# --------------------------------------------------------------------------- Pillow's limits
def is_cut(image: Image, channels: int) -> bool:
    """Whether Pillow, which has opened an image, would give fewer bands or bits than it has."""
    if image.format == "PNG":
        return image.mode in ("RGB", "RGBA", "LA") and _png_bits(image) == 16
    if image.format != "TIFF":
        return False
    tags = image.tag_v2  # type: ignore[attr-defined]
    samples, bits = int(tags.get(_SAMPLES, 1)), tags.get(_BITS, (1,))
    bands = len(image.getbands())
    pages = channels not in (1, 3, bands)  # may be what is wanted
    # Pillow 13 fails on one band of 16 bits too where GDAL tagged it as a plane of its own.
    planes = samples > 1 or tags.get(_PLANAR) == 2
    return pages or samples > bands or (planes and max(bits) > 8)


def _png_bits(image: Image) -> int:
    """The bits of a channel, from the header, which stands at a fixed place."""
    stream = image.fp  # type: ignore[attr-defined]
    place = stream.tell()
    stream.seek(24)
    found = stream.read(1)
    stream.seek(place)
    return found[0] if found else 0


def read_png(path: str, orientation: int, data: bytes | None = None) -> Raster:
    """A PNG of 16 bits, all of them."""
    import torch
    from torchvision.io import ImageReadMode, decode_image

    with warnings.catch_warnings():
        # torchvision 0.29 announces that decoding will move to torchcodec.
        warnings.simplefilter("ignore", DeprecationWarning)
        stored = path if data is None else torch.frombuffer(bytearray(data), dtype=torch.uint8)
        values = decode_image(stored, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    return Raster(upright(values, orientation), has_alpha=values.shape[2] in (2, 4))


def read_tiff(path: str, channels: int, max_pixels: int, data: bytes | None = None) -> Raster:
    """A TIFF of any bands: those of a page, or its pages where each has one band."""
    try:
        import tifffile
    except ImportError as error:
        raise CorruptSampleError(
            path,
            "a TIFF of more bands or bits than Pillow reads; to read it: "
            "pip install 'dinov3-framework[tiff]'",
        ) from error
    with tifffile.TiffFile(path if data is None else BytesIO(data)) as file:
        series, page = file.series[0], file.pages[0]
        shape, axes = tuple(series.shape), series.axes
        bands = _band_axis(path, shape, axes, channels)
        height, width = (size for axis, size in enumerate(shape) if axis != bands)
        check_size(path, width, height, max_pixels)
        values: np.ndarray = series.asarray()
        tags = page.tags  # type: ignore[union-attr]
        extra = tags.valueof(_EXTRA, default=())
        turned = int(tags.valueof(_ORIENTATION, default=1))
    values = np.expand_dims(values, 2) if bands is None else np.moveaxis(values, bands, 2)
    return Raster(upright(values, turned), has_alpha=bool(extra) and int(extra[-1]) in _ALPHA)


def _band_axis(path: str, shape: tuple[int, ...], axes: str, channels: int) -> int | None:
    """The axis of bands. Pages are bands where there are as many as are wanted."""
    if len(shape) == 2:
        return None
    if len(shape) == 3 and "S" in axes:
        return axes.index("S")
    fitting = [axis for axis, size in enumerate(shape) if axis != 1 and size == channels]
    if len(shape) == 3 and len(fitting) == 1:
        return fitting[0]
    raise CorruptSampleError(
        path,
        f"is a TIFF of shape {list(shape)} (axes {axes}), images.channels is {channels}; write its "
        "bands into one page (tifffile: planarconfig and photometric='minisblack')",
    )


# --------------------------------------------------------------------------- both
def check_size(path: str, width: int, height: int, max_pixels: int) -> None:
    """Raise ``CorruptSampleError`` for no pixels, and for more than are allowed."""
    if width * height > max_pixels:
        raise CorruptSampleError(
            path, f"{width} x {height} pixels are more than max_pixels = {max_pixels:,}"
        )
    if width * height == 0:
        raise CorruptSampleError(path, f"{width} x {height} pixels")


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, bands] turned as EXIF's ``Orientation`` (1 to 8) says, as every viewer does."""
    if orientation in (5, 6, 7, 8):
        values = values.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(values[::rows, ::columns])
