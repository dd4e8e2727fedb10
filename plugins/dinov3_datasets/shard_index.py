"""Index files of shards: where the members of a tar file are, so that its headers are read once.

``SHARD.idx.npy`` holds a structured array, a row a member: ``name``, ``offset`` and ``size`` in
bytes, and the ``number`` that a member ``.cls`` holds, -1 in others. The first row says what it is
an index of: the format in place of the name, the shard's size, its time of modification in ns, and
how many links and the like were passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from attrs import frozen

from dinov3_datasets.index_arrays import Progress, save_array
from dinov3_datasets.labels import NONE, whole_number
from dinov3_datasets.tars import Member, TarReader, open_shard

_FORMAT = b"dinov3 index 1"
_COLUMNS = ("name", "offset", "size", "number")
_LONGEST_NUMBER = 32  # bytes of a member .cls


@frozen(eq=False)
class TarIndex:
    """The rows of an index, without the first one, and what that says."""

    rows: np.ndarray
    size: int  # of the shard, and when it was modified
    time: int
    passed_over: int  # links, folders and devices

    def members(self) -> Iterator[Member]:
        """Members in their order."""
        columns = (self.rows[name].tolist() for name in ("name", "offset", "size"))
        for name, offset, size in zip(*columns, strict=True):
            yield Member(name.decode("utf-8", "surrogateescape"), offset, size)

    @property
    def numbers(self) -> dict[int, int]:
        """The numbers that members hold, by the offsets of these."""
        rows = self.rows[self.rows["number"] != NONE]
        return dict(zip(rows["offset"].tolist(), rows["number"].tolist(), strict=True))


def index_path(shard: Path) -> Path:
    """Where the index of a shard is."""
    return shard.with_name(f"{shard.name}.idx.npy")


def scan(shard: Path) -> TarIndex:
    """The index of a shard, from its headers; errors as of ``TarReader.members``."""
    reader = TarReader(shard)
    names, numbers, places = [], [], []
    with open_shard(shard) as file:
        status = os.fstat(file.fileno())
        for member in reader.members(file):
            names.append(member.name.encode("utf-8", "surrogateescape"))
            places.append((member.offset, member.size))
            numbers.append(_number(file, member))
    width = max(map(len, names), default=1)
    rows = np.zeros(len(names), dtype=_dtype(width))
    rows["name"], rows["number"] = names, numbers
    if places:
        rows["offset"], rows["size"] = np.array(places, dtype=np.int64).T
    passed_over = reader.passed_over.total()
    return TarIndex(rows, status.st_size, status.st_mtime_ns, passed_over)


def load(shard: Path) -> TarIndex | str:
    """The index beside a shard, or in a few words why it cannot be used; "" if there is none."""
    path = index_path(shard)
    if not path.is_file():
        return ""
    try:
        rows = np.load(path, allow_pickle=False)
        status = os.stat(shard)
    except (OSError, ValueError, EOFError) as error:
        return f"cannot be read ({error})"
    if (
        rows.ndim != 1
        or not len(rows)
        or rows.dtype.names != _COLUMNS
        or rows["name"][0] != _FORMAT
    ):
        return "is not of this format"
    if rows.dtype != _dtype(rows.dtype["name"].itemsize):
        return "is not of this format"
    first, rows = rows[0], rows[1:]
    if (first["offset"], first["size"]) != (status.st_size, status.st_mtime_ns):
        return "is of another state of the shard"
    offsets, sizes = rows["offset"], rows["size"]
    if not bool(((offsets >= 0) & (sizes >= 0) & (sizes <= status.st_size - offsets)).all()):
        return "names places beyond the shard"
    return TarIndex(rows, status.st_size, status.st_mtime_ns, int(first["number"]))


def save(shard: Path, index: TarIndex) -> Path:
    """Write an index beside its shard, whole or not at all; raises ``OutputError``."""
    width = max(index.rows.dtype["name"].itemsize, len(_FORMAT))
    rows = np.zeros(len(index.rows) + 1, dtype=_dtype(width))
    rows[0] = (_FORMAT, index.size, index.time, index.passed_over)
    rows[1:] = index.rows.astype(rows.dtype)
    return save_array(index_path(shard), rows)


def is_indexed(shard: Path) -> bool:
    """Whether a shard has an index file that can be used."""
    return isinstance(load(shard), TarIndex)


def index_shards(shards: Sequence[Path], progress: Progress | None = None) -> list[Path]:
    """Write the index file of each shard that has none, or that of another state of it.

    ``progress`` is called with how many shards are done, and of how many. Returns the paths of the
    files written.
    """
    paths = []
    for done, shard in enumerate(shards, 1):
        if not is_indexed(shard):
            paths.append(save(shard, scan(shard)))
        if progress is not None:
            progress(done, len(shards))
    return paths


def _dtype(width: int) -> np.dtype:
    whole = [(name, "<i8") for name in _COLUMNS[1:]]
    return np.dtype([("name", f"S{max(width, 1)}"), *whole])


def _number(file: BinaryIO, member: Member) -> int:
    if not member.name.lower().endswith(".cls") or member.size > _LONGEST_NUMBER:
        return NONE
    text = os.pread(file.fileno(), member.size, member.offset).decode("latin-1")
    number = whole_number(text)
    return NONE if number is None or number < 0 else number
