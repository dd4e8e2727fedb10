"""The layout of ImageNet-1k: names of files and folders, its index, and listing what is there.

The names, fields and types are those of the reference (facebookresearch/dinov3,
data/datasets/image_net.py), so that index files of either are read by the other.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from attrs import frozen

from dinov3_datasets.index_arrays import Progress
from dinov3_framework import DataError
from dinov3_framework.errors import first_few, printable

FULL = {"train": 1_281_167, "val": 50_000, "test": 100_000}  # images
FIELDS = {"actual_index": "u", "class_index": "u", "class_id": "U", "class_name": "U"}
NO_LABEL = np.iinfo(np.uint32).max  # the class_index of images of the test split

_IMAGES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_THREADS = 16  # what a disk over a network takes at a time; for a local one 2 are as good


def image_path(split: str, class_id: str, number: int) -> str:
    """The path of an image below the root; the class id of test is of no meaning."""
    if split == "train":
        return f"train/{class_id}/{class_id}_{number}.JPEG"
    folder = "test" if split == "test" else f"{split}/{class_id}"
    return f"{folder}/ILSVRC2012_{split}_{number:08d}.JPEG"


def index_paths(extra: Path, split: str) -> list[Path]:
    """The files of a split's index: class ids, class names, and last the entries."""
    names = ["entries"] if split == "test" else ["class-ids", "class-names", "entries"]
    return [extra / f"{name}-{split.upper()}.npy" for name in names]


# --------------------------------------------------------------------------- labels.txt
def read_labels(path: Path) -> dict[str, str]:
    """Class names by class id; raises ``DataError`` for a file that is missing or malformed."""
    names: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for line, row in enumerate(csv.reader(stream), 1):
                if len(row) != 2 or not row[0].strip() or row[0] in names:
                    raise DataError(
                        f"{path}, line {line}: must be a class id, a comma and a name in quotes if "
                        f"it has commas, each id once; is {printable(','.join(row), kept='')!r}"
                    )
                names[row[0]] = row[1]
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing\n    it names the classes, a line each: n01440764,tench"
        ) from None
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return names


def names_of(ids: Sequence[str], names: dict[str, str], path: Path) -> tuple[str, ...]:
    """Names of classes; raises ``DataError`` for one that ``path`` does not name."""
    if unknown := [each for each in ids if each not in names]:
        raise DataError(f"{path} does not name {first_few(unknown)}, of which there are folders")
    return tuple(names[each] for each in ids)


# --------------------------------------------------------------------------- listing
@frozen
class Listing:
    """What lies in the folder of a split."""

    class_ids: tuple[str, ...]  # names of the class folders, sorted; none for test
    numbers: tuple[np.ndarray, ...]  # uint32 [n] of each class, in the order of the file names
    others: int  # files that are no images


class TooManyImages(Exception):
    """There are more than somebody would wait for."""


def list_split(
    root: Path, split: str, progress: Progress | None = None, most: int | None = None
) -> Listing:
    """List the folders of a split, several at a time.

    Raises ``TooManyImages`` as soon as there are more than ``most``, and ``DataError`` for folders
    that are missing, empty or unreadable, and for images that are not named as ImageNet's.
    """
    top = root / split
    ids = tuple([""] if split == "test" else _class_folders(top))
    numbers, others = [], 0
    pool = ThreadPoolExecutor(_THREADS)
    try:
        jobs = [pool.submit(_numbers, top / each, _pattern(split, each)) for each in ids]
        for done, job in enumerate(jobs, 1):
            found, passed_over = job.result()
            numbers.append(found)
            others += passed_over
            if most is not None and sum(map(len, numbers)) > most:
                raise TooManyImages
            if progress is not None:
                progress(done, len(ids))
    finally:
        pool.shutdown(cancel_futures=True)
    if empty := [name for name, found in zip(ids, numbers, strict=True) if not len(found)]:
        what = f"{len(empty):,} class folders have" if split != "test" else "the folder has"
        names = f": {first_few(empty)}\n    remove them or fetch" if split != "test" else "; fetch"
        raise DataError(f"{top}: {what} no image{names} the images")
    return Listing(ids if split != "test" else (), tuple(numbers), others)


def _class_folders(top: Path) -> list[str]:
    names, images = [], 0
    try:
        with os.scandir(top) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    names.append(entry.name)
                images += entry.name.endswith(".JPEG")
    except FileNotFoundError:
        raise DataError(f"there is no folder {top}; root is the folder above it") from None
    except OSError as error:
        raise DataError(f"cannot read the folder {top}: {error.strerror}") from error
    if not names:
        what = f"{images:,} images lie in it" if images else "it is empty"
        raise DataError(
            f"{top} has no class folders (n01440764 and so on); {what}\n    move each image into "
            "the folder of its class"
        )
    return sorted(names)


def _pattern(split: str, class_id: str) -> re.Pattern[str]:
    """The one form of file names that gives a number from which the name can be made again."""
    if split == "train":
        return re.compile(rf"{re.escape(class_id)}_(0|[1-9][0-9]{{0,8}})\.JPEG")
    return re.compile(rf"ILSVRC2012_{split}_([0-9]{{8}})\.JPEG")


def _numbers(folder: Path, pattern: re.Pattern[str]) -> tuple[np.ndarray, int]:
    """Numbers of the images in a folder, uint32 [n], sorted by file name; and other files."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    match: Callable[[str], re.Match[str] | None] = pattern.fullmatch
    found = [match(name) for name in names]
    numbers = np.array([int(each[1]) for each in found if each is not None], dtype=np.uint32)
    others = 0
    if len(numbers) < len(names):
        strangers = [name for name, each in zip(names, found, strict=True) if each is None]
        for name in strangers:
            if name.lower().endswith(_IMAGES) and not name.startswith("."):
                raise DataError(
                    f"{printable(str(folder / name), kept='')} is not named as ImageNet's images "
                    f"are, {pattern.pattern}\n    remove or rename it; for folders with names of "
                    "their own there is the dataset image_folder"
                )
        others = sum(not name.startswith(".") for name in strangers)
    return numbers, others


# --------------------------------------------------------------------------- the table
def entries_of(listing: Listing, names: Sequence[str]) -> np.ndarray:
    """The index of what was listed, a row an image, as the reference writes it."""
    ids = listing.class_ids or ("",)
    names = names or ("",)
    dtype = np.dtype(
        [
            ("actual_index", "<u4"),
            ("class_index", "<u4"),
            ("class_id", f"<U{max(map(len, ids))}"),
            ("class_name", f"<U{max(map(len, names))}"),
        ]
    )
    entries = np.empty(sum(map(len, listing.numbers)), dtype)
    start = 0
    for label, numbers in enumerate(listing.numbers):
        rows = entries[start : start + len(numbers)]
        rows["actual_index"] = numbers
        rows["class_index"] = label if listing.class_ids else NO_LABEL
        rows["class_id"], rows["class_name"] = ids[label], names[label]
        start += len(numbers)
    return entries
