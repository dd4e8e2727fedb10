"""Which tar files a folder or a pattern of shards means."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrs import frozen

from dinov3_framework import DataError
from dinov3_framework.errors import first_few

_URL = re.compile(r"(pipe:|[A-Za-z][\w+.-]*://)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # shards


def shards_complaint(value: str) -> str | None:
    """Why a value of ``shards`` is none; None if it may be one."""
    if _URL.match(value):
        return (
            f"{value!r} is a URL or a command, shards are local files; copy them here, or mount "
            "the storage as a folder"
        )
    return None if value else "must be a folder or a pattern of tar files"


def find_shards(shards: str) -> list[Path]:
    """All tar files of a folder, or those that a pattern means, in the order of their names.

    Braces stand for numbers, ``{000..127}``, or for alternatives, ``{a,b}``; ``*``, ``?`` and
    ``[]`` are as in a shell. Raises ``DataError`` where there are none, or some are missing.
    """
    place = Path(shards).expanduser()
    if place.is_dir():
        found = sorted(path for path in place.glob("*.tar") if not path.name.startswith("."))
        if not found:
            others = sorted(path.name for path in place.iterdir())
            held = f"it holds {first_few(others)}" if others else "it is empty"
            raise DataError(f"no *.tar file in the folder {place} of shards; {held}")
        return found
    if place.exists():
        return [place]
    expanded = list(itertools.islice(_expanded(str(place)), _MOST + 1))
    if len(expanded) > _MOST:
        raise DataError(f"shards = {shards!r} are more than {_MOST:,} files")
    found, missing = [], []
    for each in expanded:
        matches = sorted(glob.glob(each)) if glob.has_magic(each) else [each]
        found += [Path(match) for match in matches if os.path.exists(match)]
        if not any(map(os.path.exists, matches)):
            missing.append(each)
    if missing:
        if expanded == [str(place)]:
            what = "matches no file" if glob.has_magic(str(place)) else "does not exist"
            raise DataError(f"shards = {shards!r} {what}")
        raise DataError(
            f"{len(missing):,} of the {len(expanded):,} shards of {shards!r} are missing: "
            f"{first_few(missing)}"
        )
    if not found:
        raise DataError(f"shards = {shards!r} means no file: braces count up, as in {{000..127}}")
    return list(dict.fromkeys(found))


def _expanded(pattern: str) -> Iterator[str]:
    """A pattern's braces, from left to right."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    for choice in _choices(braces[1]):
        for rest in _expanded(after):
            yield before + choice + rest


def _choices(text: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        yield from text.split(",")
        return
    first, last = numbers.groups()
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{width}}"


@frozen
class ShardFiles:
    """Shards, and what identifies them by size and time."""

    paths: Sequence[Path]
    sizes: Sequence[int]
    times: Sequence[int]  # of modification, in ns

    @classmethod
    def find(cls, shards: str) -> ShardFiles:
        """Errors as of :func:`find_shards`."""
        paths = find_shards(shards)
        try:
            status = [os.stat(path) for path in paths]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        return cls(paths, [each.st_size for each in status], [each.st_mtime_ns for each in status])

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def contents(self) -> str:
        """The beginning of a SHA-256 of names and sizes."""
        return _hash(f"{p.name} {s}" for p, s in zip(self.paths, self.sizes, strict=True))

    @property
    def state(self) -> str:
        """The same with times."""
        rows = zip(self.paths, self.sizes, self.times, strict=True)
        return _hash(f"{path.name} {size} {time}" for path, size, time in rows)


def _hash(lines: Iterator[str]) -> str:
    text = "\n".join(lines)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
