"""Which files a folder or a pattern means, and what identifies them."""

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
from dinov3_framework.errors import first_few, printable

_URL = re.compile(r"(pipe:|[A-Za-z][\w+.-]*://)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # files


def place_complaint(value: str) -> str | None:
    """Why a value is no folder and no pattern of files; None if it may be one."""
    if _URL.match(value):
        return (
            f"{value!r} is a URL or a command, files here are local; copy them, or mount the "
            "storage as a folder"
        )
    return None if value else "must be a folder or a pattern of files"


def find_files(key: str, value: str, ending: str) -> list[Path]:
    """All files of a folder with an ending, or those that a pattern means, sorted by name.

    Braces stand for numbers, ``{000..127}``, or for alternatives, ``{a,b}``; ``*``, ``?`` and
    ``[]`` are as in a shell. ``key`` is the option that has the value. Raises ``DataError`` where
    there are none, or some are missing.
    """
    place = Path(value).expanduser()
    if place.is_dir():
        found = sorted(path for path in place.glob(f"*{ending}") if not path.name.startswith("."))
        if not found:
            others = sorted(path.name for path in place.iterdir())
            held = f"it holds {printable(first_few(others))}" if others else "it is empty"
            raise DataError(f"{key} = {value!r}: no *{ending} file in this folder; {held}")
        return found
    if place.exists():
        return [place]
    expanded = list(itertools.islice(_expanded(str(place)), _MOST + 1))
    if len(expanded) > _MOST:
        raise DataError(f"{key} = {value!r} means more than {_MOST:,} files")
    found, missing = [], []
    for each in expanded:
        matches = sorted(glob.glob(each)) if glob.has_magic(each) else [each]
        matches = [match for match in matches if os.path.exists(match)]
        found += [Path(match) for match in matches]
        if not matches:
            missing.append(each)
    if missing and expanded != [str(place)]:
        raise DataError(
            f"{len(missing):,} of the {len(expanded):,} files of {key} = {value!r} are missing: "
            f"{first_few(missing)}"
        )
    if missing:
        what = "matches no file" if glob.has_magic(str(place)) else "does not exist"
        raise DataError(f"{key} = {value!r} {what}")
    if not found:
        raise DataError(f"{key} = {value!r} means no file: braces count up, as in {{000..127}}")
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
class Files:
    """Files, their sizes, and when they were modified in ns."""

    paths: Sequence[Path]
    sizes: Sequence[int]
    times: Sequence[int]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Files:
        """The files as they are now; ``DataError`` if one cannot be looked at."""
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
