"""NYU Depth v2 from split files and from the labeled set."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from dinov3_datasets.depth_configs import NyuDepthConfig
from dinov3_datasets.nyu_depth import open_nyu_depth
from mask_trees import write_nyu_files
from scipy.io import savemat

from dinov3_framework import DataError, Dataset
from dinov3_framework.testing import DatasetSuite

COUNT, HEIGHT, WIDTH = 5, 6, 8


def build(root: Path, channels: int = 3, **options: Any) -> Dataset:
    return open_nyu_depth(NyuDepthConfig(root=str(root), **options), channels=channels)


def write_labeled(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """The labeled set as MATLAB leaves it, and images [N, H, W, 3] and depth [N, H, W]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, HEIGHT, WIDTH, 3)).astype(np.uint8)
    depth = rng.uniform(0.7, 9.9, (COUNT, HEIGHT, WIDTH)).astype(np.float32)
    raw = depth.copy()
    raw[:, 0, :3] = 0
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"], file["rawDepths"] = depth.transpose(0, 2, 1), raw.transpose(0, 2, 1)
    splits = {"trainNdxs": np.array([[5], [1], [2]]), "testNdxs": np.array([[3], [4]])}
    savemat(root / "splits.mat", splits)
    return images, depth


class TestFiles(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path) -> None:
        self.config = NyuDepthConfig(root=str(write_nyu_files(tmp_path)))


class TestLabeled(DatasetSuite):
    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path) -> None:
        write_labeled(tmp_path)
        self.config = NyuDepthConfig(root=str(tmp_path))


# --------------------------------------------------------------------------- files
def test_split_files_are_read_in_the_order_of_their_sorted_lines(tmp_path: Path) -> None:
    dataset = build(write_nyu_files(tmp_path))
    assert [dataset.name(i) for i in range(3)] == [f"train_room/rgb_{i}.jpg" for i in range(3)]
    depth = dataset[1].targets["depth"]
    assert depth.dtype == torch.float32
    assert depth[0, 0].isnan()
    assert depth[0, 1].item() == np.float32(1.234)
    assert set(depth[1:].unique().tolist()) == {2.0}
    assert dataset.targets["depth"].unit == "m"
    assert build(tmp_path, split="test").name(0) == "test_room/rgb_0.jpg"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg b.png", r"nyu_train\.txt, line 2: 'a.jpg b.png' is not the paths of an image and"),
        ("a.jpg b.png far", "line 2: "),
        ("a.jpg train_room/sync_depth_0.png 518.8", r"1 of 2 images that nyu_train\.txt lists are"),
        ("train_room/rgb_1.jpg None 518.8", r"1 of 2 depth maps .* are missing in .*: None"),
    ],
)
def test_split_files_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    write_nyu_files(tmp_path)
    first = "train_room/rgb_0.jpg train_room/sync_depth_0.png 518.8579"
    (tmp_path / "nyu_train.txt").write_text(f"{first}\n{line}\n")
    with pytest.raises(DataError, match=message):
        build(tmp_path)


def test_folders_that_hold_neither(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has neither nyu_train\.txt nor nyu_depth_v2_labeled\.mat"
    ):
        build(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        build(tmp_path / "gone")
    write_nyu_files(tmp_path)
    with pytest.raises(DataError, match="files have two splits"):
        build(tmp_path, split="all", source="files")


# --------------------------------------------------------------------------- the labeled set
def test_the_labeled_set_is_turned_and_split(tmp_path: Path) -> None:
    images, depth = write_labeled(tmp_path)
    dataset = build(tmp_path)
    assert [dataset.name(i) for i in range(len(dataset))] == ["0001", "0002", "0005"]
    sample = dataset[2]
    assert np.array_equal(sample.image.permute(1, 2, 0), images[4])
    assert np.array_equal(sample.targets["depth"], depth[4])
    raw = build(tmp_path, depth="raw", split="test")
    assert len(raw) == 2
    assert raw[0].targets["depth"][0, :3].isnan().all()
    assert np.array_equal(raw[0].targets["depth"][1:], depth[2, 1:])
    assert raw.version() != build(tmp_path, split="test").version()
    assert build(tmp_path, channels=1)[0].image.shape == (1, HEIGHT, WIDTH)
    assert len(build(tmp_path / "nyu_depth_v2_labeled.mat", split="all")) == COUNT


def test_without_its_splits(tmp_path: Path) -> None:
    write_labeled(tmp_path)
    splits = tmp_path / "splits.mat"
    savemat(splits, {"trainNdxs": np.array([[1], [6]])})
    with pytest.raises(DataError, match=r"trainNdxs of .* are not numbers of 1 to 5"):
        build(tmp_path)
    with pytest.raises(DataError, match=r"splits\.mat cannot be read: .*testNdxs"):
        build(tmp_path, split="test")
    splits.write_bytes(b"no MATLAB file")
    with pytest.raises(DataError, match=r"splits\.mat cannot be read"):
        build(tmp_path)
    splits.unlink()
    with pytest.raises(DataError, match=r'splits\.mat is missing.*split = "all"'):
        build(tmp_path)
    assert len(build(tmp_path, split="all")) == COUNT


def test_files_that_are_not_the_labeled_set(tmp_path: Path) -> None:
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        build(tmp_path)
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((2, 3, 4, 5), np.uint8)
    with pytest.raises(DataError, match=r"has no depths; it has \['images'\]"):
        build(tmp_path)
    with h5py.File(path, "a") as file:
        file["depths"] = np.zeros((2, 5, 4), np.float32)
    with pytest.raises(DataError, match=r"holds images \[2, 3, 4, 5\] and depths \[2, 5, 4\], not"):
        build(tmp_path)


def test_a_dataset_that_was_read_from_goes_to_workers(tmp_path: Path) -> None:
    """An open file of h5py can neither be pickled nor be used after a fork."""
    _, depth = write_labeled(tmp_path)
    dataset = build(tmp_path, split="all")
    assert np.array_equal(dataset[0].targets["depth"], depth[0])
    with get_context("fork").Pool(1) as pool:  # pickled on its way there
        (found,) = pool.map(depth_of, [dataset])
    assert np.array_equal(found, depth)


def depth_of(dataset: Dataset) -> np.ndarray:
    """All depth, in a worker."""
    return np.stack([sample.targets["depth"].numpy() for sample in dataset])
