"""Images that a file lists."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov3_datasets.decoding import pixel_options
from dinov3_datasets.labels import Classes, Labels, Value, number_labels
from dinov3_datasets.list_config import ImageListConfig
from dinov3_datasets.list_file import ListFile, read_list
from dinov3_datasets.listing import FileList
from dinov3_framework import DataError, Dataset, Sample, Target
from dinov3_framework.data.pictures import read_image
from dinov3_framework.errors import first_few, printable


class ImageList(Dataset):
    """Images by the lines of a list, uint8 [channels, H, W] each of its own size.

    Raises ``DataError`` for a list that cannot be read, columns that are not there, lines without
    what they should have, files that are missing, and labels that are no class.
    """

    def __init__(self, config: ImageListConfig, *, channels: int) -> None:
        self.config, self.channels = config, channels
        listed = read_list(config.path)
        image = listed.column("image", config.image, config.image)
        label = listed.column("label", config.label, "label")
        labels = listed.column("labels", config.labels, "labels")
        text = listed.column("text", config.text, "text")
        self.root = listed.path.parent if config.root is None else Path(config.root).expanduser()
        self.names = FileList(_texts(listed, str(image), "the path of an image"))
        self.state = self._look_at(listed)
        self.targets: dict[str, Target] = {}
        self.labels: Labels | None = None
        self.several: tuple[Labels, np.ndarray] | None = None
        self.texts: FileList | None = None
        classes = Classes.of(config)
        if label is not None:
            values = [_value(listed, index, label) for index in range(len(listed.rows))]
            self.labels = number_labels(
                values, classes, f"{listed.path}, column {label}", self.name
            )
            self.targets["label"] = self.labels.target
        if labels is not None:
            self.several = self._number_several(listed, labels, classes)
            target = self.several[0].target
            self.targets["labels"] = Target(
                "class", n_classes=target.n_classes, classes=target.classes, per_object=True
            )
        if text is not None:
            self.texts = FileList(_texts(listed, text, "a text", may_be_empty=True))
            self.targets["text"] = Target("text")

    def _look_at(self, listed: ListFile) -> str:
        """A hash of the sizes and times of all files; ``DataError`` counts those missing."""
        missing, hashed = [], hashlib.sha256()
        for index, name in enumerate(self.names):
            try:
                status = os.stat(self.root / name)
            except (OSError, ValueError):  # a name with a zero byte
                status = None
            if status is None or not stat.S_ISREG(status.st_mode):
                missing.append(f"{printable(name)} (line {listed.lines[index]})")
                continue
            hashed.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        if missing:
            start = "" if self.config.root is not None else "; state root if paths start elsewhere"
            raise DataError(
                f"{listed.path}: {len(missing):,} of {len(self.names):,} files are missing below "
                f"{self.root}: {first_few(missing)}{start}"
            )
        return hashed.hexdigest()[:16]

    def _number_several(
        self, listed: ListFile, column: str, classes: Classes
    ) -> tuple[Labels, np.ndarray]:
        """All labels of all images, and where those of each begin and end, int64 [n + 1]."""
        values: list[Value] = []
        ends, owners = [0], list[int]()
        for index in range(len(listed.rows)):
            found = _values(listed, index, column)
            values += found
            owners += [index] * len(found)
            ends.append(len(values))
        found_labels = number_labels(
            values, classes, f"{listed.path}, column {column}", lambda i: self.name(owners[i])
        )
        return found_labels, np.array(ends, dtype=np.int64)

    # ------------------------------------------------------------------ the dataset
    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        targets: dict[str, Any] = {}
        if self.labels is not None:
            targets["label"] = int(self.labels.values[index])
        if self.several is not None:
            labels, ends = self.several
            start, end = ends[index : index + 2].tolist()
            targets["labels"] = torch.from_numpy(labels.values[start:end].copy())
        if self.texts is not None:
            targets["text"] = self.texts[index]
        image = read_image(
            self.root / self.names[index],
            self.channels,
            self.config.max_pixels,
            values=self.config.values,
            background=self.config.background,
        )
        return Sample(image, targets)

    def label(self, index: int) -> int | None:
        return None if self.labels is None else self.labels.label(index)

    def name(self, index: int) -> str:
        return self.names[range(len(self))[index]]

    def describe(self) -> str:
        found = [f"{name}: {target}" for name, target in self.targets.items()]
        targets = "; ".join(found) or "no labels"
        return f"image_list {self.config.path}: {len(self):,} images, {targets}"

    def digest(self) -> str:
        hashes = [f"their names {self.names.digest}"]
        if self.labels is not None:
            hashes.append(f"label {self.labels.digest}")
        if self.several is not None:
            labels, ends = self.several
            spread = hashlib.sha256(ends.tobytes()).hexdigest()[:8]
            hashes.append(f"labels {labels.digest} {spread}")
        if self.texts is not None:
            hashes.append(f"text {self.texts.digest}")
        return ", ".join([f"{len(self):,} images", *hashes])

    def version(self) -> str:
        return f"{self.digest()}, files {self.state}, {pixel_options(self.config, self.channels)}"


# --------------------------------------------------------------------------- cells
def _texts(listed: ListFile, column: str, what: str, may_be_empty: bool = False) -> Iterator[str]:
    for index, row in enumerate(listed.rows):
        value = row.get(column, "" if may_be_empty else None)
        if not isinstance(value, str) or not (value or may_be_empty):
            raise listed.wrong(index, f"{column} is {value!r}, not {what}")
        yield value


def _value(listed: ListFile, index: int, column: str) -> Value:
    value = listed.rows[index].get(column)
    if isinstance(value, bool) or not isinstance(value, Value) or value == "":
        raise listed.wrong(index, f"{column} is {value!r}, not a whole number and not a name")
    return value


def _values(listed: ListFile, index: int, column: str) -> list[Value]:
    """Several labels of an image: a list, or in a text a JSON list or parts between semicolons."""
    found = listed.rows[index].get(column, [])
    if isinstance(found, str) and found.strip().startswith("["):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise listed.wrong(index, f"{column} is no JSON list: {error}") from error
    elif isinstance(found, str):
        found = [part.strip() for part in found.split(";") if part.strip()]
    elif isinstance(found, int) and not isinstance(found, bool):
        found = [found]
    is_list = isinstance(found, list)
    if not is_list or any(isinstance(x, bool) or not isinstance(x, Value) for x in found):
        raise listed.wrong(index, f"{column} is {found!r}, not a list of labels")
    values: list[Value] = list(dict.fromkeys(found))
    return values
