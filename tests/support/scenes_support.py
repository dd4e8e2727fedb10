"""Small GeoTIFFs, written by rasterio."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from dinov3_datasets.geotiff_scenes import GeotiffScenes
from dinov3_datasets.scene_configs import GeotiffScenesConfig


def write_scene(
    path: Path,
    values: np.ndarray,
    *,
    overviews: tuple[int, ...] = (),
    scales: tuple[float, ...] = (),
    offsets: tuple[float, ...] = (),
    mask: np.ndarray | None = None,
    **profile: Any,
) -> Path:
    """A file of the values [bands, H, W], in tiles of 32 pixels."""
    import rasterio
    from rasterio.enums import Resampling

    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    profile = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": values.dtype,
        "tiled": True,
        "blockxsize": 32,
        "blockysize": 32,
        "compress": "deflate",
        **profile,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) as file:
            file.write(values)
            if scales:
                file.scales = scales
            if offsets:
                file.offsets = offsets
            if mask is not None:
                file.write_mask(mask)
            if overviews:
                file.build_overviews(overviews, Resampling.average)
    return path


def noise(*shape: int, low: int = 1, high: int = 3000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint16)


def scenes(root: Path, channels: int = 3, **options: Any) -> GeotiffScenes:
    options = {"tile": 16, **options}
    return GeotiffScenes(GeotiffScenesConfig(root=str(root), **options), channels=channels)
