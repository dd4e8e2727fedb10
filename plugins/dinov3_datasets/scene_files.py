"""GeoTIFF scenes: what a file says of itself, and windows of it. rasterio reads them."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from attrs import frozen

from dinov3_framework import DataError
from dinov3_framework.errors import printable

# GDAL would keep 5 % of the memory full of blocks, in every loader worker. rasterio takes bytes,
# where the variable of GDAL's name takes megabytes.
_CACHE_BYTES = 64 * 2**20


class SceneError(Exception):
    """A file that cannot be read as a scene; the message says why."""


@frozen
class Scene:
    """What the header of a scene says."""

    height: int
    width: int
    dtype: np.dtype[Any]
    bands: tuple[int, ...]  # all but those for opacity
    count: int  # of all bands
    has_gaps: bool  # whether pixels may be without data
    scales: tuple[float, ...]  # of all bands
    offsets: tuple[float, ...]
    overviews: tuple[int, ...]  # their factors
    block: tuple[int, int]  # height and width of what is decoded at once

    @property
    def is_scaled(self) -> bool:
        return set(self.scales) != {1.0} or set(self.offsets) != {0.0}


def need_rasterio() -> Any:
    """The library, or a ``DataError`` that names the extra."""
    try:
        import rasterio
    except ImportError as error:
        raise DataError(
            "geotiff_scenes needs rasterio: pip install 'dinov3-framework[geo]'"
        ) from error
    return rasterio


@contextmanager
def reading() -> Iterator[None]:
    """While in it, GDAL caches little, and whatever goes wrong is a ``SceneError``."""
    rasterio = need_rasterio()
    options = {} if "GDAL_CACHEMAX" in os.environ else {"GDAL_CACHEMAX": _CACHE_BYTES}
    try:
        with rasterio.Env(**options):
            yield
    except SceneError:
        raise
    except MemoryError as error:
        raise SceneError("takes more memory than there is") from error
    except UnicodeEncodeError as error:
        raise SceneError("GDAL opens only names that are UTF-8; rename it") from error
    except Exception as error:  # GDAL's errors, and whatever odd headers lead to
        reason = str(error.__cause__ or error) or type(error).__name__
        raise SceneError(printable(reason, kept="")) from error


def open_scene(path: str, overview: int | None = None) -> Any:
    """rasterio's reader of a file, or of one of its overviews.

    No driver but that of GeoTIFFs: others, such as VRT, would open whatever else a file names.
    """
    rasterio = need_rasterio()
    options: dict[str, Any] = {} if overview is None else {"overview_level": overview}
    with warnings.catch_warnings():
        # A picture without a place on Earth serves as well.
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(os.path.abspath(path), driver="GTiff", sharing=False, **options)


def read_header(path: str) -> Scene:
    """What a scene is; raises ``SceneError``."""
    from rasterio.enums import ColorInterp, MaskFlags

    with reading(), open_scene(path) as source:
        dtypes = {np.dtype(name) for name in source.dtypes}
        if len(dtypes) > 1 or next(iter(dtypes)).kind not in "uif":
            raise SceneError(f"holds {', '.join(map(str, dtypes))}; numbers of one type are read")
        (dtype,) = dtypes
        is_alpha = [each == ColorInterp.alpha for each in source.colorinterp]
        bands = tuple(n for n, alpha in enumerate(is_alpha, 1) if not alpha)
        flags = [source.mask_flag_enums[band - 1] for band in bands]
        is_masked = any(MaskFlags.all_valid not in each for each in flags)
        return Scene(
            height=source.height,
            width=source.width,
            dtype=dtype,
            bands=bands,
            count=source.count,
            has_gaps=is_masked or dtype.kind == "f",
            scales=tuple(source.scales),
            offsets=tuple(source.offsets),
            overviews=tuple(source.overviews(1)),
            block=tuple(source.block_shapes[0]),
        )


class OpenScenes:
    """The scenes that a process used last, open.

    A forked or pickled one starts without any: two processes that share an open file would move
    each other's place in it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> int:
        return self.limit

    def __setstate__(self, limit: int) -> None:
        self.limit = limit
        self._open, self._process = OrderedDict(), os.getpid()

    def get(self, path: str) -> Any:
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if path not in self._open:
            while len(self._open) >= self.limit:
                self._open.popitem(last=False)[1].close()
            self._open[path] = open_scene(path)
        self._open.move_to_end(path)
        return self._open[path]


def read_pixels(
    source: Any, bands: Sequence[int], window: tuple[slice, slice] | None, nodata: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Stored values [C, h, w] of a window within a scene, and where they are data, bool [C, h, w].

    A value is none where the file's mask, alpha band or nodata tag says so, where it is ``nodata``,
    and where it is not finite.
    """
    indexes = list(bands)
    where = None if window is None else tuple((each.start, each.stop) for each in window)
    values: np.ndarray = source.read(indexes, window=where)
    valid: np.ndarray = source.read_masks(indexes, window=where) != 0
    if values.dtype.kind == "f":
        valid &= np.isfinite(values)
    if nodata is not None:
        # Compared as what is stored: 0.1 is no float32, and -9999 no uint16.
        with np.errstate(over="ignore", invalid="ignore"):
            stored = np.array(nodata).astype(values.dtype)
        if values.dtype.kind == "f" or stored == nodata:
            valid &= values != stored
    return values, valid
