"""Folders of images and depth: formats, units, what is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from dinov3_datasets.depth_configs import DepthFolderConfig
from dinov3_datasets.image_depth_folder import ImageDepthFolder
from mask_trees import write_image, write_mask

from dinov3_framework import CorruptSampleError, DataError, InvalidOption
from dinov3_framework.errors import WrongTargetError
from dinov3_framework.testing import DatasetSuite

nan = float("nan")


def build(root: Path, **options: Any) -> ImageDepthFolder:
    config = DepthFolderConfig(images=str(root / "images"), depth=str(root / "depth"), **options)
    return ImageDepthFolder(config, channels=3)


def write(root: Path, values: Any, ending: str = "npy", name: str = "a") -> Path:
    """An image and its depth [H, W]."""
    stored = np.array(values)
    write_image(root / f"images/{name}.jpg", size=stored.shape[::-1])
    path = root / f"depth/{name}.{ending}"
    path.parent.mkdir(exist_ok=True)
    if ending == "npy":
        np.save(path, stored)
    elif ending == "tif":
        tifffile.imwrite(path, stored)
    else:
        write_mask(path, stored)
    return root


def depth(dataset: ImageDepthFolder, index: int = 0) -> list[list[float]]:
    found = dataset[index].targets["depth"]
    assert found.dtype == torch.float32
    return found.tolist()


def same(one: Any, other: Any) -> bool:
    return np.array_equal(np.float32(one), np.float32(other), equal_nan=True)


class TestContract(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path) -> None:
        for number in range(3):
            write(tmp_path, np.full((4, 5), number * 700, np.uint16), "png", f"{number}")
        self.config = DepthFolderConfig(
            images=str(tmp_path / "images"), depth=str(tmp_path / "depth"), scale=0.001
        )


@pytest.mark.parametrize("ending", ["png", "tif", "npy"])
def test_integers_have_a_scale(tmp_path: Path, ending: str) -> None:
    write(tmp_path, np.array([[0, 1234], [65535, 1]], np.uint16), ending)
    assert same(depth(build(tmp_path, scale=0.001)), [[nan, 1.234], [65.535, 0.001]])
    with pytest.raises(
        DataError, match=r"a\.\w+: holds uint16; state what a stored 1 is \(scale\)"
    ):
        build(tmp_path)


@pytest.mark.parametrize("ending", ["tif", "npy"])
def test_floats_are_in_the_unit(tmp_path: Path, ending: str) -> None:
    write(tmp_path, np.array([[0.5, nan, np.inf], [-1, 0, 80]], np.float32), ending)
    dataset = build(tmp_path)
    assert same(depth(dataset), [[0.5, nan, nan], [nan, nan, 80]])
    assert (dataset.targets["depth"].kind, dataset.targets["depth"].unit) == ("map", "m")
    assert same(depth(build(tmp_path, scale=2)), [[1, nan, nan], [nan, nan, 160]])


def test_values_that_mean_nothing_are_stated(tmp_path: Path) -> None:
    write(tmp_path, np.array([[0.0, -9999], [-3, 12]]))
    heights = build(tmp_path, invalid=(-9999,), negative=True, unit="m above ground")
    assert same(depth(heights), [[0, nan], [-3, 12]])
    assert "in m above ground" in heights.describe()
    assert heights.version() != build(tmp_path).version()


def test_one_file_of_another_type_is_told(tmp_path: Path) -> None:
    write(tmp_path, np.ones((2, 3), np.float32))
    write(tmp_path, np.ones((2, 3), np.uint16), name="b")
    dataset = build(tmp_path)
    assert same(depth(dataset), np.ones((2, 3)))
    with pytest.raises(WrongTargetError, match=r"b\.npy: holds uint16"):
        dataset[1]


def test_what_is_no_depth(tmp_path: Path) -> None:
    write(tmp_path, np.ones((2, 3)))
    write(tmp_path, np.zeros((2, 3, 3), np.uint8)[:, :, 0], name="size")
    np.save(tmp_path / "depth/size.npy", np.ones((3, 3)))
    write_image(tmp_path / "images/viewed.jpg", size=(3, 2))
    write_image(tmp_path / "depth/viewed.png", size=(3, 2))
    dataset = build(tmp_path)
    with pytest.raises(WrongTargetError, match=r"is 3 x 3 pixels, its image size\.jpg 3 x 2"):
        dataset[1]
    with pytest.raises(CorruptSampleError, match=r"is a picture \(RGB\); a map is one channel"):
        dataset[2]


def test_suffixes_and_partners(tmp_path: Path) -> None:
    for name in ("a_rgb", "b_rgb"):
        write_image(tmp_path / f"images/{name}.jpg", size=(3, 2))
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth/a_d.npy", np.ones((2, 3)))
    suffixes = {"image_suffix": "_rgb", "depth_suffix": "_d"}
    with pytest.raises(DataError, match=r"1 images have no file of depth: b_rgb\.jpg"):
        build(tmp_path, **suffixes)
    assert len(build(tmp_path, **suffixes, skip_unpaired=True)) == 1
    with pytest.raises(DataError, match="depth_suffix"):
        build(tmp_path)
    with pytest.raises(InvalidOption, match="scale: must be above 0"):
        build(tmp_path, scale=0)
