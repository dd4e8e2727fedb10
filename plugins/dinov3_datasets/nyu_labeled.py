"""The labeled set of NYU Depth v2: one MATLAB file of all images and their depth."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from dinov3_datasets.depth_configs import NyuDepthConfig
from dinov3_datasets.depth_values import DepthReader
from dinov3_datasets.file_stamps import files_stamp
from dinov3_framework import CorruptSampleError, DataError, Dataset, Sample, Target
from dinov3_framework.data.pictures import as_tensor

LABELED = "nyu_depth_v2_labeled.mat"
SPLITS = "splits.mat"
_KEYS = {"filled": "depths", "raw": "rawDepths"}
_INDICES = {"train": "trainNdxs", "test": "testNdxs"}
_NEEDED = "pip install 'dinov3-framework[dense]'"


class NyuLabeled(Dataset):
    """Images uint8 [channels, 480, 640] with the target ``depth`` in meters, float32.

    A MATLAB file of version 7.3 is HDF5, whose axes run the other way: images are [N, 3, W, H] in
    it and depth [N, W, H]. Samples are read one by one; each process opens the file for itself.
    Raises ``DataError``.
    """

    def __init__(self, config: NyuDepthConfig, channels: int, path: Path) -> None:
        self.config, self.channels, self.path = config, channels, path
        self.targets = {"depth": Target("map", unit="m")}
        self.reader = DepthReader(config.max_pixels)
        self._opened: tuple[int, Any] | None = None  # of this process
        key, shapes = _KEYS[config.depth], {}
        with _open(path) as file:
            for name in ("images", key):
                if name not in file:
                    raise DataError(f"nyu_depth: {path} has no {name}; it has {sorted(file)}")
                shapes[name] = file[name].shape
        images, depths = shapes["images"], shapes[key]
        if len(images) != 4 or images[1] != 3 or (images[0], *images[2:]) != depths:
            raise DataError(
                f"nyu_depth: {path} holds images {list(images)} and {key} {list(depths)}, not "
                "[N, 3, W, H] and [N, W, H]"
            )
        self.indices = self._chosen(images[0])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        place = int(self.indices[index])
        try:
            file = self._file()
            image = np.ascontiguousarray(file["images"][place].transpose(0, 2, 1))
            depth = np.ascontiguousarray(file[_KEYS[self.config.depth]][place].T)
        except OSError as error:
            raise CorruptSampleError(f"{self.path.name}, image {place + 1}", str(error)) from error
        return Sample(
            as_tensor(torch.from_numpy(image), self.channels),
            {"depth": tv_tensors.Mask(self.reader.of(depth))},
        )

    def name(self, index: int) -> str:
        """The image's number in the file, from 1 as MATLAB counts."""
        return f"{int(self.indices[index]) + 1:04d}"

    def describe(self) -> str:
        return (
            f"nyu_depth {self.path}: {len(self):,} images ({self.config.split}); depth: map in m, "
            f"{self.config.depth}"
        )

    def digest(self) -> str:
        return f"{len(self):,} images of the labeled set: {self.config.split}"

    def version(self) -> str:
        stamp = files_stamp(self.path.parent, iter([self.path.name, SPLITS]))
        return (
            f"{self.digest()}, depth {self.config.depth}, {self.channels} channels, files {stamp}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _file(self) -> Any:
        """The file, opened by this process: HDF5 does not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _open(self.path)
        return self._opened[1]

    def _chosen(self, count: int) -> np.ndarray:
        """The places in the file of the split's images, increasing."""
        if self.config.split == "all":
            return np.arange(count)
        path = self.path.with_name(SPLITS)
        if not path.is_file():
            raise DataError(
                f"nyu_depth: {path} is missing, which says which images are for training; fetch it "
                'from where the labeled set is from, or set split = "all"'
            )
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise DataError(f"nyu_depth: {SPLITS} is read by scipy: {_NEEDED}") from error
        key = _INDICES[self.config.split]
        try:
            found = np.unique(loadmat(path)[key].ravel().astype(np.int64)) - 1
        except Exception as error:  # scipy raises nearly anything for what is no MATLAB file
            raise DataError(f"nyu_depth: {path} cannot be read: {error!r}") from error
        if not len(found) or found[0] < 0 or found[-1] >= count:
            raise DataError(
                f"nyu_depth: {key} of {path} are not numbers of 1 to {count}, the images of "
                f"{self.path.name}"
            )
        return found


def _open(path: Path) -> Any:
    """The HDF5 file; raises ``DataError``."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(f"nyu_depth: {path.name} is read by h5py: {_NEEDED}") from error
    if not path.is_file():
        raise DataError(f"nyu_depth: {path} does not exist")
    try:
        return h5py.File(path, "r", locking="best-effort")  # some network storage has no locks
    except OSError as error:
        raise DataError(f"nyu_depth: {path} cannot be read as HDF5: {error}") from error
