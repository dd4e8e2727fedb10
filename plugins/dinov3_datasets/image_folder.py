"""A folder of images as a dataset."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import compress, groupby
from pathlib import Path

import numpy as np

from dinov3_datasets.configs import ImageFolderConfig
from dinov3_datasets.decoding import pixel_options
from dinov3_datasets.file_stamps import files_stamp
from dinov3_datasets.listing import FileList, by_number, image_files
from dinov3_datasets.splits import choose_val, split_folders
from dinov3_framework import DataError, Dataset, Sample, Target
from dinov3_framework.data.pictures import lost, read_image
from dinov3_framework.errors import first_few, printable

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
        folders = None if config.split == "all" else split_folders(self.root)
        train = self.root
        if folders is not None:
            train, val = folders
            self.root = train if config.split == "train" else val
        for name in config.classes or ():
            if not (train / name).is_dir():
                raise DataError(f"image_folder: no class folder {name!r} in {train}")
        self.passed_over: Counter[str] = Counter()
        classes = config.classes
        if classes is not None and train != self.root:
            classes = tuple(name for name in classes if (self.root / name).is_dir())
        self.files = FileList(self._walk(self.root, classes, self.passed_over))
        self._check_files()
        self.labels = self._find_labels(train)
        self._split_words = ""
        if config.split != "all" and folders is None:
            self._keep_split()

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

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return self.files[range(len(self))[index]]

    def describe(self) -> str:
        kind = "no labels" if self.n_classes is None else f"{self.n_classes:,} classes"
        if self.stray:
            kind += f" ({self.stray} lies in no class folder)"
        return f"image_folder {self.root}: {len(self):,} images, {kind}{self._split_words}"

    def digest(self) -> str:
        return f"{len(self):,} images, their names {self.files.digest}"

    def version(self) -> str:
        """The digest, sizes and times of the files, the classes, and how values become 0..255."""
        classes = None if self.classes is None else list(self.classes)
        stamp = files_stamp(self.root, iter(self.files))
        options = pixel_options(self.config, self.channels)
        return f"{self.digest()}, files {stamp}, {options}, classes {classes}"

    def notes(self) -> list[str]:
        """What is no image or has none, and values and bands of the first images that are lost."""
        found = []
        if count := self.passed_over.total():
            by_ending = sorted(self.passed_over.items(), key=lambda each: (-each[1], each[0]))
            counts = (f"{n:,} {ending or 'without an ending'}" for ending, n in by_ending)
            found.append(f"{count:,} other files passed over: {first_few(counts, 6)}")
        if self.labels is not None:
            found += self._empty_classes(self.labels)
        if self.config.split == "all" and (folders := split_folders(self.root)):
            names = " and ".join(folder.name for folder in folders)
            found.append(f'images of {names} are taken together; split = "train" parts them')
        paths = [str(self.root / self.files[i]) for i in range(min(_LOOKED_AT, len(self)))]
        return [*found, *lost(paths, self.channels, self.config.max_pixels, self.config.values)]

    def _walk(
        self,
        root: Path,
        folders: Collection[str] | None = None,
        passed_over: Counter[str] | None = None,
    ) -> Iterator[str]:
        key = by_number if self.config.sort == "number" else None
        return image_files(root, self.config.extensions, folders, passed_over, key)

    def _check_files(self) -> None:
        endings = " ".join(self.config.extensions)
        if not len(self.files):
            raise DataError(
                f"image_folder: no images in {self.root} or below (looked for {endings}; names "
                "that start with a dot are ignored)"
            )

    def _find_labels(self, train: Path) -> np.ndarray | None:
        """The label of each file, int32 [N], from its first folder; sets the classes."""
        if self.config.labels == "none":
            return None
        # The listing goes folder by folder, so that each class is one run of files.
        runs = _runs(self.files)
        trained = runs
        if train != self.root and self.config.classes is None:
            trained = _runs(self._walk(train))
        for root, found in ((self.root, runs), (train, trained)):
            if stray := next((first for name, first, _ in found if not name), ""):
                if self.config.labels == "auto":
                    labeled = any(name for name, _, _ in found) or root != self.root
                    self.stray = stray if labeled else ""
                    return None
                raise DataError(
                    f'image_folder: labels = "folders", but {root / stray} lies in no class '
                    'folder; move it into one, or set labels = "none"'
                )
        classes = self.config.classes or tuple(name for name, _, _ in trained)
        label_of = {name: label for label, name in enumerate(classes)}
        if odd := [name for name, _, _ in runs if name not in label_of]:
            raise DataError(
                f"image_folder: {self.root} has classes that {train} lacks: {first_few(odd)}\n"
                "    labels are those of the training images; move these folders away, or name the "
                "classes to keep (classes)"
            )
        self.targets = {"label": Target("class", classes=classes)}
        labels = np.array([label_of[name] for name, _, _ in runs], dtype=np.int32)
        return np.repeat(labels, [count for _, _, count in runs])

    def _keep_split(self) -> None:
        """Leave the images of one side of a seeded split."""
        config = self.config
        chosen = choose_val(self.files, self.labels, config.val_fraction, config.split_seed)
        kept = chosen if config.split == "val" else ~chosen
        if not kept.any():
            raise DataError(f"image_folder: {len(kept)} images cannot be split; two are the least")
        shares = "of each class" if self.labels is not None else "of all"
        self._split_words = (
            f"; {config.split} of a seeded split, {config.val_fraction:g} {shares} for val (seed "
            f"{config.split_seed})"
        )
        self.files = FileList(compress(self.files, kept))
        self.labels = None if self.labels is None else self.labels[kept]

    def _empty_classes(self, labels: np.ndarray) -> list[str]:
        """Classes and folders that have no image here, in words."""
        classes = self.classes or ()
        counts = np.bincount(labels, minlength=len(classes))
        lines = []
        if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
            lines.append(f"{len(empty):,} of {len(classes):,} classes have no image here: ")
            lines[-1] += first_few(empty)
        if self.config.classes is None:
            with os.scandir(self.root) as entries:
                names = [each.name for each in entries if each.is_dir() and each.name[0] != "."]
            if others := sorted(set(names) - set(classes)):
                lines.append(f"folders without images are no classes: {first_few(others)}")
        return [printable(line, kept="") for line in lines]


def _runs(names: Iterable[str]) -> list[tuple[str, str, int]]:
    """(class folder, its first file, how many follow on each other) of a listing."""
    runs = []
    for folder, files in groupby(names, key=_class_folder):
        names_of = list(files)
        runs.append((folder, names_of[0], len(names_of)))
    return runs


def _class_folder(name: str) -> str:
    """The folder right below the root that a file lies in; empty for one in the root itself."""
    return name.partition("/")[0] if "/" in name else ""
