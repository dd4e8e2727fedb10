"""Images by a path, a pattern or a list, as a dataset."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dinov3_framework import CorruptSampleError, DataError, Dataset, Sample
from dinov3_framework.data.dense_config import DenseInferenceConfig
from dinov3_framework.data.dense_views import view_sizes
from dinov3_framework.data.pictures import MAX_PIXELS, lost, read_image

_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".avif", ".heic", ".jxl", ".bmp",
    ".gif", ".tga", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".npy",
)  # fmt: skip
_LOOKED_AT = 8  # files, for what is lost of them


class Images(Dataset):
    """The images of a folder, at any depth, one image, or those of a pattern or a list.

    A list is a ``.txt`` file with a path a line, seen from its folder. Samples are called by their
    path below the folder that all of them share. Raises ``DataError`` where there are none.
    """

    def __init__(self, place: str, *, channels: int) -> None:
        self.place, self.channels = place, channels
        path = Path(place).expanduser()
        if path.is_dir():
            self.paths = sorted(_below(path))
        elif path.suffix.lower() == ".txt" and path.is_file():
            self.paths = _listed(path)
        elif path.exists():
            self.paths = [path]
        else:
            found = sorted(glob.glob(str(path), recursive=True))
            self.paths = [Path(name) for name in found if Path(name).is_file()]
        if not self.paths:
            what = "is no image, folder, pattern of images, or list of them"
            if path.is_dir():
                what = f"holds no images, which end in {' '.join(_ENDINGS)}"
            raise DataError(f"images = {place!r} {what}")
        self.root = path if path.is_dir() else Path(_common(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_image(self.paths[range(len(self))[index]], self.channels))

    def name(self, index: int) -> str:
        path = self.paths[range(len(self))[index]]
        return os.path.relpath(os.path.abspath(path), os.path.abspath(self.root))

    def describe(self) -> str:
        return f"{self.place}, {len(self):,} images"

    def digest(self) -> str:
        return f"{len(self):,} images: {[self.name(index) for index in range(len(self))]}"

    def notes(self) -> Sequence[str]:
        return lost(
            [str(path) for path in self.paths[:_LOOKED_AT]], self.channels, MAX_PIXELS, None
        )


class Resizable(Dataset):
    """The samples of a dataset; one too thin to be resized counts as one that cannot be read."""

    def __init__(self, dataset: Dataset, inference: DenseInferenceConfig) -> None:
        self.dataset, self.inference = dataset, inference

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        height, width = sample.image.shape[-2:]
        try:
            view_sizes(height, width, self.inference)
        except DataError as error:
            raise CorruptSampleError(self.name(index), str(error)) from error
        return sample

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def describe(self) -> str:
        return self.dataset.describe()

    def notes(self) -> Sequence[str]:
        return self.dataset.notes()


def _common(paths: Sequence[Path]) -> str:
    return os.path.commonpath([os.path.abspath(each.parent) for each in paths])


def _below(root: Path) -> Iterator[Path]:
    """Images in a folder; each folder once, though links lead to it again."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in _ENDINGS:
                yield Path(folder, name)


def _listed(path: Path) -> list[Path]:
    """The files of a list, each once; the list's folder is where they are seen from."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8: {error.reason} at byte {error.start}") from error
    names = [line.strip() for line in lines]
    return list(dict.fromkeys(path.parent / Path(name).expanduser() for name in names if name))
