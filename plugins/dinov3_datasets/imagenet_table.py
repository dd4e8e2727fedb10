"""The images of a split of ImageNet-1k, from its index files or from its folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attrs import evolve, frozen

from dinov3_datasets.imagenet_layout import (
    FIELDS,
    FULL,
    Listing,
    index_paths,
    list_split,
    names_of,
    read_labels,
)
from dinov3_datasets.index_arrays import check_class_ids, check_labels, in_chunks, load_array
from dinov3_framework import DataError
from dinov3_framework.errors import first_few

COUNTED = 50_000  # images that are worth listing at each start


@frozen(eq=False)
class Table:
    """Which images there are, in their order: a few bytes for each."""

    numbers: np.ndarray  # uint32 [n], those in the file names
    labels: np.ndarray  # uint32 [n], places in ``ids``; of no meaning for test
    ids: tuple[str, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def only(self, kept: np.ndarray, *notes: str) -> Table:
        """Some of the images, with the labels that they had; ``kept`` is bool [n]."""
        return evolve(
            self,
            numbers=self.numbers[kept],
            labels=self.labels[kept],
            notes=(*self.notes, *notes),
        )

    def keys(self) -> np.ndarray:
        """What tells each image from all others of the split, uint64 [n]."""
        keys: np.ndarray = self.labels.astype(np.uint64) << np.uint64(32) | self.numbers
        return keys


# --------------------------------------------------------------------------- from index files
def has_index(extra: Path, split: str) -> bool:
    """Whether at least one of the index files is there."""
    return any(path.exists() for path in index_paths(extra, split))


def read_index(extra: Path, split: str, mend: str) -> Table:
    """The table that index files hold; raises ``DataError``, which ends with ``mend``."""
    *lists, path = index_paths(extra, split)
    ids, names = (load_array(each, None, mend) for each in lists) if lists else ((), ())
    entries = load_array(path, FIELDS, mend)
    # All that is needed of a table of some 300 MB: 8 bytes a row.
    numbers = np.concatenate([rows["actual_index"] for rows in in_chunks(entries)] or [_NONE])
    labels = np.concatenate([rows["class_index"] for rows in in_chunks(entries)] or [_NONE])
    table = Table(numbers, labels, tuple(map(str, ids)), tuple(map(str, names)))
    if not len(table):
        raise DataError(f"{path} names no image\n    {mend}")
    if not lists:
        return evolve(table, labels=np.zeros_like(labels))
    if len(ids) != len(names):
        raise DataError(
            f"{lists[0]} has {len(ids):,} classes, {lists[1].name} {len(names):,}\n    {mend}"
        )
    check_class_ids(table.ids, lists[0], mend)
    check_labels(labels, table.ids, path, mend)
    known = np.asarray(ids)
    if any((known[rows["class_index"]] != rows["class_id"]).any() for rows in in_chunks(entries)):
        raise DataError(
            f"{path} gives classes other ids than {lists[0].name}: they are of two indexes\n"
            f"    {mend}"
        )
    return table


_NONE = np.zeros(0, np.uint32)


# --------------------------------------------------------------------------- from folders
def table_of(listing: Listing, labels_file: Path) -> Table:
    """The table of listed folders; without a labels.txt, classes are named by their ids."""
    ids = listing.class_ids
    names = ids
    if ids and labels_file.exists():
        names = names_of(ids, read_labels(labels_file), labels_file)
    counts = [len(each) for each in listing.numbers]
    labels = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    notes = [f"{listing.others:,} other files passed over"] if listing.others else []
    return Table(np.concatenate(listing.numbers), labels, ids, names, tuple(notes))


def match_folders(table: Table, root: Path, split: str, subset: bool, mend: str) -> Table:
    """The same table once it is known to be of these folders.

    With ``subset`` the images that are there; otherwise the class folders have to be the index's,
    and where there are few images, their number, too. Raises ``DataError``.
    """
    if not subset and len(table) > COUNTED:
        _match_classes(table, _folders(root / split), root / split, mend)
        return table
    listing = list_split(root, split)
    _match_classes(table, listing.class_ids, root / split, mend, subset)
    label_of = {name: label for label, name in enumerate(table.ids)}
    places = [label_of.get(name, 0) for name in listing.class_ids or ("",)]
    counts = [len(each) for each in listing.numbers]
    there = Table(
        np.concatenate(listing.numbers),
        np.repeat(np.array(places, dtype=np.uint32), counts),
        table.ids,
        table.names,
    )
    kept = np.isin(table.keys(), there.keys())
    if not subset and (not kept.all() or len(there) != len(table)):
        lacking = int((~kept).sum())
        raise DataError(
            f"{root / split} holds {len(there):,} images, its index {len(table):,}; {lacking:,} of "
            f"those are not there\n    with subset = true the others are read; {mend}"
        )
    if not kept.any():
        raise DataError(f"{root / split} holds none of the images of its index\n    {mend}")
    if kept.all():
        return table
    lost = int((~kept).sum())
    return table.only(kept, f"left out: {lost:,} of {len(table):,} images of the index, not here")


def _folders(top: Path) -> tuple[str, ...]:
    try:
        return tuple(entry.name for entry in top.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"cannot read the folder {top}: {error.strerror}\n    root is the folder above it"
        ) from error


def _match_classes(
    table: Table, found: Sequence[str], top: Path, mend: str, subset: bool = False
) -> None:
    lacking = sorted(set(table.ids) - set(found))
    strange = sorted(set(found) - set(table.ids)) if len(table) <= COUNTED or subset else []
    if lacking and not subset:
        raise DataError(
            f"{top} lacks the folders of {len(lacking):,} of {len(table.ids):,} classes of its "
            f"index: {first_few(lacking)}\n    with subset = true the others are read; {mend}"
        )
    if strange:
        raise DataError(
            f"{top} has {len(strange):,} class folders that its index does not know: "
            f"{first_few(strange)}\n    {mend}"
        )


def size_note(count: int, split: str) -> list[str]:
    """How much of the split this is, if not all of it."""
    full = FULL[split]
    return [] if count == full else [f"{count:,} images; the whole split has {full:,}"]


# --------------------------------------------------------------------------- ReaL
@frozen(eq=False)
class RealLabels:
    """The classes that are right for each image, in one array."""

    values: np.ndarray  # int64, of all images one after another
    ends: np.ndarray  # int64 [n + 1]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]


def read_real(path: Path, table: Table) -> tuple[RealLabels, np.ndarray]:
    """ReaL labels of the images that have any, and which those are, bool [n].

    The file holds a list for each number of a val image, from 1. Raises ``DataError``.
    """
    try:
        lists = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"real = {str(path)!r} does not exist\n    it is real.json of reassessed-imagenet"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(lists, list) or not all(_are_labels(each) for each in lists):
        raise DataError(f"{path} is not real.json: it must hold a list of lists of labels")
    if len(table) and not 1 <= int(table.numbers.min()) <= int(table.numbers.max()) <= len(lists):
        raise DataError(
            f"{path} has labels of the images 1 to {len(lists):,}, val has images "
            f"{int(table.numbers.min()):,} to {int(table.numbers.max()):,}"
        )
    chosen = [lists[number - 1] for number in table.numbers.tolist()]
    kept = np.array([bool(each) for each in chosen], dtype=bool)
    values = np.array([label for each in chosen for label in each], dtype=np.int64)
    if not len(values):
        raise DataError(f"{path} has no label for any of the {len(table):,} images")
    if int(values.max()) >= len(table.ids):
        raise DataError(
            f"{path}: labels out of range: {int(values.max())} where val has {len(table.ids):,} "
            "classes; ReaL is for all 1,000 of them, a smaller folder goes by the index of them "
            "all and subset = true"
        )
    counts = [len(each) for each in chosen if each]
    return RealLabels(values, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)), kept


def _are_labels(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
