"""Images by a path or a pattern, as a dataset."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from dinov3_framework import DataError, Dataset, Sample
from dinov3_framework.data.pictures import read_image

_ENDINGS = frozenset(
    ".jpg .jpeg .png .webp .tif .tiff .bmp .gif .jp2 .avif .heic .jxl .ppm .pgm .npy".split()  # noqa: SIM905
)


class Images(Dataset):
    """The images of a folder, at any depth, one image, or those that a pattern means.

    Raises ``DataError`` where there are none.
    """

    def __init__(self, place: str, *, channels: int) -> None:
        self.channels = channels
        path = Path(place).expanduser()
        if path.is_dir():
            self.root, found = path, sorted(_below(path))
        else:
            names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
            found = [Path(name) for name in names if Path(name).is_file()]
            parents = [os.path.abspath(each.parent) for each in found]
            self.root = Path(os.path.commonpath(parents)) if parents else path
        self.paths = found
        if not found:
            what = "holds no images" if path.is_dir() else "is no image, folder, or pattern of any"
            raise DataError(f"images = {place!r} {what}; known are {', '.join(sorted(_ENDINGS))}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(read_image(self.paths[range(len(self))[index]], self.channels))

    def name(self, index: int) -> str:
        path = self.paths[range(len(self))[index]]
        return os.path.relpath(os.path.abspath(path), os.path.abspath(self.root))

    def describe(self) -> str:
        return f"{self.root}: {len(self):,} images"

    def digest(self) -> str:
        return f"{len(self):,} images: {[self.name(index) for index in range(len(self))]}"


def _below(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in _ENDINGS:
                yield Path(folder, name)
