"""Folders of small GeoTIFFs as GDAL writes them, read as images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rasterio")

from dinov3_datasets.configs import ImageFolderConfig
from dinov3_datasets.image_folder import ImageFolder
from scenes_support import noise, write_scene

LAYOUTS = [
    {"interleave": "pixel"},
    {"interleave": "band"},
    {"interleave": "band", "tiled": False},
    {"interleave": "pixel", "compress": "zstd"},
]


def read(root: Path, channels: int, **options: Any) -> np.ndarray:
    dataset = ImageFolder(ImageFolderConfig(root=str(root), **options), channels=channels)
    return dataset[0].image.numpy()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
@pytest.mark.parametrize("bands", [1, 3, 4, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_bands_and_bits_come_whole(
    tmp_path: Path, bands: int, dtype: str, layout: dict[str, Any]
) -> None:
    values = noise(bands, 32, 64, high=200).astype(dtype)
    profile = {key: value for key, value in layout.items() if key != "tiled"}
    if layout.get("tiled") is False:
        profile |= {"tiled": False, "blockysize": 8, "blockxsize": 64}
    write_scene(tmp_path / "a.tif", values, photometric="MINISBLACK", **profile)
    assert np.array_equal(read(tmp_path, bands, low=0.0, high=255.0), values)
    if bands == 4:
        assert np.array_equal(read(tmp_path, 3, low=0.0, high=255.0), values[:3])


def test_the_whole_range_of_16_bits(tmp_path: Path) -> None:
    values = noise(13, 32, 32, high=65535)
    write_scene(tmp_path / "a.tif", values)
    assert np.array_equal(read(tmp_path, 13), np.rint(values / 257))
    assert np.array_equal(read(tmp_path, 13, bits=12), np.rint(np.minimum(values / 4095, 1) * 255))


def test_many_bands_are_read_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    write_scene(tmp_path / "a.tif", noise(13, 32, 32))
    with caplog.at_level(logging.DEBUG):
        read(tmp_path, 13)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert capfd.readouterr().err == ""
