"""ImageNet-1k (Russakovsky et al. 2015, arXiv:1409.0575) in the layout of the reference."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from dinov3_datasets.file_stamps import files_stamp
from dinov3_datasets.imagenet_configs import Imagenet1kConfig
from dinov3_datasets.imagenet_layout import (
    TooManyImages,
    entries_of,
    image_path,
    index_paths,
    list_split,
    names_of,
    read_labels,
)
from dinov3_datasets.imagenet_table import (
    COUNTED,
    Table,
    has_index,
    match_folders,
    read_index,
    read_real,
    size_note,
    table_of,
)
from dinov3_datasets.index_arrays import Progress, data_folder, index_command, save_array
from dinov3_framework import DataError, Dataset, Sample, Target
from dinov3_framework.data.pictures import read_image

log = logging.getLogger("dinov3_framework.datasets")


class Imagenet1k(Dataset):
    """A split of ImageNet-1k, uint8 [channels, H, W] each of its own size.

    Targets: ``label`` (not for test), and with ReaL ``labels``, all classes that are right.
    Raises ``DataError`` for folders or index files that are missing, or that do not agree.
    """

    def __init__(self, config: Imagenet1kConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels
        self.root = _root(config)
        self.table = self._open()
        self.real = None
        if config.real is not None:
            path = Path(config.real).expanduser()
            self.real, kept = read_real(path, self.table)
            note = f"left out: {int((~kept).sum()):,} images that ReaL has no label for"
            self.table = self.table.only(kept, *([] if kept.all() else [note]))
        if config.split != "test":
            names = self.table.names if config.classes == "names" else self.table.ids
            self.targets = {"label": Target("class", classes=names)}
            if self.real is not None:
                self.targets["labels"] = Target("class", classes=names, per_object=True)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]  # negative ones, and IndexError past the end
        image = read_image(self.root / self.name(index), self.channels, self.config.max_pixels)
        label = self.label(index)
        if label is None:
            return Sample(image)
        if self.real is None:
            return Sample(image, {"label": label})
        return Sample(image, {"label": label, "labels": torch.from_numpy(self.real[index].copy())})

    def label(self, index: int) -> int | None:
        """The label, without reading the image; None for test."""
        return int(self.table.labels[index]) if self.table.ids else None

    def name(self, index: int) -> str:
        index = range(len(self))[index]
        ids, number = self.table.ids, int(self.table.numbers[index])
        class_id = ids[self.table.labels[index]] if ids else ""
        return image_path(self.config.split, class_id, number)

    def describe(self) -> str:
        kind = f"{len(self.table.ids):,} classes" if self.table.ids else "no labels"
        real = ", labels of ReaL" if self.real is not None else ""
        return f"imagenet_1k {self.root}, {self.config.split}: {len(self):,} images, {kind}{real}"

    def digest(self) -> str:
        return f"{len(self):,} images, their names and labels {self._digest}"

    def version(self) -> str:
        stamp = files_stamp(self.root, map(self.name, range(len(self))))
        return f"{self.digest()}; at most {self.config.max_pixels} pixels, files {stamp}"

    def notes(self) -> Sequence[str]:
        return [*self.table.notes, *size_note(len(self), self.config.split)]

    @cached_property
    def _digest(self) -> str:
        found = hashlib.sha256("\n".join(self.table.ids).encode())
        found.update(self.table.keys().astype("<u8").tobytes())
        if self.real is not None:
            found.update(self.real.values.astype("<i8").tobytes())
            found.update(self.real.ends.astype("<i8").tobytes())
        return found.hexdigest()[:16]

    # ------------------------------------------------------------------ opening
    def _open(self) -> Table:
        config, extra, split = self.config, _extra(self.config), self.config.split
        labels_file = self.root / "labels.txt"
        if config.scan:
            return table_of(list_split(self.root, split), labels_file)
        if has_index(extra, split):
            mend = f"{_command(config, replace=True)} writes the index anew"
            table = read_index(extra, split, mend)
            return match_folders(table, self.root, split, config.subset, mend)
        try:
            return table_of(list_split(self.root, split, most=COUNTED), labels_file)
        except TooManyImages:
            raise DataError(
                f"imagenet_1k: {self.root / split} has no index in {extra}, and over {COUNTED:,} "
                f"images\n    {_command(config)} writes it; scan = true lists the folders at each "
                "start"
            ) from None

    # ------------------------------------------------------------------ the index
    @staticmethod
    def index_files(config: Imagenet1kConfig) -> list[Path]:
        """The files that :meth:`write_index` writes; raises ``DataError`` without the folder."""
        _root(config)
        return index_paths(_extra(config), config.split)

    @staticmethod
    def write_index(config: Imagenet1kConfig, progress: Progress | None = None) -> list[Path]:
        """List the folders of the split and write its index, each file whole.

        ``progress`` is called with class folders done and in all. Raises ``DataError`` for folders
        that are not as they should be, ``OutputError`` where nothing can be written.
        """
        root, labels_file = _root(config), _root(config) / "labels.txt"
        known = {} if config.split == "test" else read_labels(labels_file)
        listing = list_split(root, config.split, progress)
        names = names_of(listing.class_ids, known, labels_file)
        entries = entries_of(listing, names)
        arrays = [np.array(listing.class_ids), np.array(names)] if names else []
        log.info(
            "%s: %s images of %s classes, %s other files passed over",
            root / config.split, f"{len(entries):,}", f"{len(names):,}", f"{listing.others:,}",
        )  # fmt: skip
        paths = index_paths(_extra(config), config.split)
        for path, array in zip(paths, [*arrays, entries], strict=True):
            save_array(path, array)
        return paths


def _root(config: Imagenet1kConfig) -> Path:
    return data_folder("imagenet_1k", config.root, "train, val and labels.txt")


def _extra(config: Imagenet1kConfig) -> Path:
    return Path(config.extra or f"{config.root}/extra").expanduser()


def _command(config: Imagenet1kConfig, replace: bool = False) -> str:
    values = {"root": config.root, "extra": config.extra, "split": config.split}
    return index_command("imagenet_1k", values, replace)
