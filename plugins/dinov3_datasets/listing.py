"""Finds the image files below a folder, in a fixed order and little memory."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_framework import DataError


class FileList:
    """Paths relative to a root, in one buffer: a few bytes a file more than the names.

    A list of a million str would take some 100 MB in every loader worker, and forked workers
    would copy it, page by page, just by counting references.
    """

    def __init__(self, names: Iterable[str]) -> None:
        buffer, ends = bytearray(), [0]
        offsets = []
        for name in names:
            buffer += os.fsencode(name)
            ends.append(len(buffer))
            if len(ends) > 65536:
                offsets.append(np.array(ends[:-1], dtype=np.int64))
                ends = ends[-1:]
        offsets.append(np.array(ends, dtype=np.int64))
        self._buffer, self._offsets = bytes(buffer), np.concatenate(offsets)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @cached_property
    def digest(self) -> str:
        """The beginning of a SHA-256 of all names in their order."""
        return hashlib.sha256(self._buffer + self._offsets.tobytes()).hexdigest()[:16]

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start, stop = self._offsets[index], self._offsets[index + 1]
        return os.fsdecode(self._buffer[start:stop])


def by_number(name: str) -> tuple[Any, ...]:
    """A key that sorts ``2`` before ``10``: digits in a row count as one number."""
    parts: list[Any] = re.split("([0-9]+)", name)
    parts[1::2] = map(int, parts[1::2])
    return tuple(parts), name  # 01 before 1


def image_files(
    root: Path,
    extensions: Collection[str],
    folders: Collection[str] | None = None,
    passed_over: Counter[str] | None = None,
    key: Callable[[str], Any] | None = None,
) -> Iterator[str]:
    """Paths relative to ``root`` of all image files below it, folder by folder, sorted by name.

    ``key`` sorts the names within a folder instead. With ``folders`` only these, right below
    ``root``, are walked, in the order given. Links are followed, but not one that leads back to a
    folder it lies in. ``passed_over`` counts other files by their ending. Raises ``DataError`` for
    a folder that cannot be read.
    """
    others: Counter[str] = Counter() if passed_over is None else passed_over
    endings = tuple(extensions)
    if folders is None:
        yield from _walk(root, "", endings, (), others, key)
    else:
        for folder in folders:
            yield from _walk(root, f"{folder}/", endings, (), others, key)


def _walk(
    root: Path,
    below: str,
    endings: tuple[str, ...],
    above: tuple[tuple[int, int], ...],
    passed_over: Counter[str],
    order: Callable[[str], Any] | None,
) -> Iterator[str]:
    """``below`` is a folder relative to ``root``; ``above`` identifies those that lead to it."""
    folder = root / below
    try:
        status = os.stat(folder)
        key = (status.st_dev, status.st_ino)
        if key in above:
            return
        # Names alone are kept, since entries of a large flat folder would take gigabytes.
        names, folders = [], set()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    folders.add(entry.name)
                elif not entry.name.lower().endswith(endings):
                    passed_over[os.path.splitext(entry.name.lower())[1]] += 1
                    continue
                elif not _is_file(entry):
                    passed_over["that are pipes, sockets or devices"] += 1
                    continue
                names.append(entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from error
    names.sort(key=order)
    for name in names:
        if name in folders:
            yield from _walk(root, f"{below}{name}/", endings, (*above, key), passed_over, order)
        else:
            yield below + name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, say
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    # A broken link counts: that its image is missing comes out when it is read.
    return os.path.isfile(entry.path) or (entry.is_symlink() and not os.path.exists(entry.path))
