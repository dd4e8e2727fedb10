"""A folder of images as a dataset."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np

from dinov3_datasets.configs import ImageFolderConfig
from dinov3_datasets.listing import FileList, image_files
from dinov3_framework import DataError, Dataset, Sample, Target
from dinov3_framework.data.pictures import lost, read_image
from dinov3_framework.errors import first_few

_LOOKED_AT = 8  # images, by a check


class ImageFolder(Dataset):
    """Images below a folder, uint8 [channels, H, W] each of its own size.

    ``n_classes`` and ``classes`` (names, by label) are None without labels. Raises ``DataError``
    for a folder that is missing, empty, or has not the layout that ``labels`` asks for.
    """

    stray = ""  # the picture beside class folders that keeps them from giving labels

    def __init__(self, config: ImageFolderConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels
        self.root = Path(config.root).expanduser()
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise DataError(
                f"image_folder: root = {config.root!r} {what}\n"
                "    root is the folder of your images, at any depth; relative to where you start"
            )
        for name in config.classes or ():
            if not (self.root / name).is_dir():
                raise DataError(f"image_folder: no class folder {name!r} in {self.root}")
        self.passed_over: Counter[str] = Counter()
        names = image_files(self.root, config.extensions, config.classes, self.passed_over)
        self.files = FileList(names)
        self._check_files()
        self.labels = self._find_labels()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]  # negative ones, and IndexError past the end
        path, config = self.root / self.files[index], self.config
        image = read_image(
            path,
            self.channels,
            config.max_pixels,
            values=config.values,
            background=config.background,
        )
        return Sample(image, {} if self.labels is None else {"label": int(self.labels[index])})

    def name(self, index: int) -> str:
        return self.files[range(len(self))[index]]

    def describe(self) -> str:
        kind = "no labels" if self.n_classes is None else f"{self.n_classes:,} classes"
        if self.stray:
            kind += f" ({self.stray} lies in no class folder)"
        return f"image_folder {self.root}: {len(self):,} images, {kind}"

    def digest(self) -> str:
        return f"{len(self):,} images, their names {self.files.digest}"

    def notes(self) -> list[str]:
        """Files that are no images, and values and bands of the first images that are lost."""
        found = []
        if count := self.passed_over.total():
            by_ending = sorted(self.passed_over.items(), key=lambda each: (-each[1], each[0]))
            counts = (f"{n:,} {ending or 'without an ending'}" for ending, n in by_ending)
            found.append(f"{count:,} other files passed over: {first_few(counts, 6)}")
        paths = [str(self.root / self.files[i]) for i in range(min(_LOOKED_AT, len(self)))]
        return [*found, *lost(paths, self.channels, self.config.max_pixels, self.config.values)]

    def _check_files(self) -> None:
        endings = " ".join(self.config.extensions)
        if not len(self.files):
            raise DataError(
                f"image_folder: no images in {self.root} or below (looked for {endings}; names "
                "that start with a dot are ignored)"
            )

    def _find_labels(self) -> np.ndarray | None:
        """The label of each file, int32 [N], from its first folder; sets the classes."""
        if self.config.labels == "none":
            return None
        # The listing goes folder by folder, so that each class is one run of files.
        runs = [(name, sum(1 for _ in run)) for name, run in groupby(self.files, key=_class_folder)]
        if any(name == "" for name, _ in runs):
            stray = next(name for name in self.files if not _class_folder(name))
            if self.config.labels == "auto":
                self.stray = stray if any(name for name, _ in runs) else ""
                return None
            raise DataError(
                f'image_folder: labels = "folders", but {self.root / stray} lies in no class '
                'folder; move it into one, or set labels = "none"'
            )
        classes = self.config.classes or tuple(name for name, _ in runs)
        self.targets = {"label": Target("class", classes=classes)}
        label_of = {name: label for label, name in enumerate(classes)}
        labels = np.array([label_of[name] for name, _ in runs], dtype=np.int32)
        return np.repeat(labels, [count for _, count in runs])


def _class_folder(name: str) -> str:
    """The folder right below the root that a file lies in; empty for one in the root itself."""
    return name.partition("/")[0] if "/" in name else ""
