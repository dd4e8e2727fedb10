"""Reads the members of tar files, and groups them into samples as WebDataset does.

Nothing is extracted, and names are never used as paths. Headers are parsed by ``tarfile``, but not
walked by it: ``TarFile.next`` takes a damaged header for the end of the archive.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from attrs import field, frozen

from dinov3_framework import DataError
from dinov3_framework.errors import printable

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_HEADER = 1 << 20  # bytes of a long name or of pax records, which are read at once
_LONGEST_NAME = 4096
_REST = 1 << 16  # bytes after the end that are looked at; tar files are padded by 10 KiB or so
_MOST_MEMBERS = 256  # of one key
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_HIDDEN = "hidden or without an ending"
_LINKS = "that are links, folders or devices"

# The key is the path up to the first dot of the file name.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)


@frozen
class Member:
    """A file in a tar file, and where its bytes begin."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header is."""
        return self.offset + -(-self.size // _BLOCK) * _BLOCK


@frozen
class Group:
    """Consecutive members of one key, by ending, and where the next header is."""

    key: str
    members: dict[str, Member]
    end: int
    repeated: str = ""  # an ending that several of them have

    def first(self, endings: Iterable[str]) -> Member | None:
        """The member of the first of some endings that there is."""
        return next((self.members[each] for each in endings if each in self.members), None)


@frozen
class _Bounded:
    """A file for ``tarfile`` that is not read in large pieces, whatever a header declares."""

    file: BinaryIO

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise ValueError(f"a header declares {size:,} bytes")
        return self.file.read(size)

    def seek(self, place: int) -> int:
        return self.file.seek(place)

    def tell(self) -> int:
        return self.file.tell()


@frozen
class TarReader:
    """The regular files of a tar file; errors name it."""

    path: Path
    passed_over: Counter[str] = field(factory=Counter)

    def members(self, file: BinaryIO, start: int = 0) -> Iterator[Member]:
        """From a header on; links, folders and devices are counted and passed over.

        Raises ``DataError`` for what is no tar file, is damaged, or ends within a member.
        """
        size = os.fstat(file.fileno()).st_size
        self._check_beginning(file, size)
        bounded, place = _Bounded(file), start
        tar: tarfile.TarFile | None = None
        while True:
            block = os.pread(file.fileno(), _BLOCK, place)
            if len(block) < _BLOCK and block:
                raise self._truncated(size)
            if not any(block):
                return self._check_rest(file, place)
            try:
                bounded.seek(place)
                if tar is None:
                    tar = _parser(bounded)
                    bounded.seek(place)
                tar.offset = place
                info = tarfile.TarInfo.fromtarfile(tar)
            except Exception as error:  # garbage raises nearly anything
                raise self._damaged(place, str(error) or type(error).__name__) from error
            place_after = tar.offset
            if info.size < 0 or info.offset_data <= place or len(info.name) > _LONGEST_NAME:
                raise self._damaged(place, "its size or name is impossible")
            if place_after > size:  # the last block is whole, too
                raise self._truncated(size, info.name)
            if info.isreg() and not info.issparse():
                yield Member(_normal(info.name), info.offset_data, info.size)
            else:
                self.passed_over[_LINKS] += 1
            place = place_after

    def groups(self, file: BinaryIO, start: int = 0) -> Iterator[Group]:
        """Samples from a header on."""
        return self.grouped(self.members(file, start))

    def grouped(self, members: Iterable[Member]) -> Iterator[Group]:
        """Members of one key that come one after another, as one."""
        key, found, end, repeated = "", dict[str, Member](), 0, ""
        for member in members:
            parsed = _NAME.fullmatch(member.name)
            if parsed is None or _is_meta(member.name):
                self.passed_over[_HIDDEN] += 1
                continue
            other, ending = parsed[1], parsed[2].lower()
            if found and other != key:
                yield Group(key, found, end, repeated)
                found, repeated = {}, ""
            key = other
            if ending in found:
                repeated = ending
            found[ending] = member
            end = member.end
            if len(found) > _MOST_MEMBERS:
                raise DataError(
                    f"{self.path}: more than {_MOST_MEMBERS} members have the key "
                    f"{printable(key)!r}\n    in WebDataset a key ends at the first dot of the "
                    "file name: use names such as 000017.jpg and 000017.cls"
                )
        if found:
            yield Group(key, found, end, repeated)

    def check_end(self) -> str:
        """What is odd about the end of the file, "" if nothing; ``DataError`` if it is cut off.

        Headers are only read where the file does not end as tar files do.
        """
        with open_shard(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            self._check_beginning(file, size)
            if size >= _BLOCK and not any(os.pread(file.fileno(), _BLOCK, size - _BLOCK)):
                return ""
            for _ in self.members(file):
                pass
        return f"{self.path} ends without the blocks that end a tar file: is it whole?"

    def _check_beginning(self, file: BinaryIO, size: int) -> None:
        if size == 0:
            raise DataError(f"{self.path} is an empty file, no tar file")
        if os.pread(file.fileno(), 6, 0).startswith(_PACKED):
            raise DataError(
                f"{self.path} is compressed, and no place in it can be gone to; unpack it to a "
                ".tar file (images gain nothing from it)"
            )

    def _check_rest(self, file: BinaryIO, end: int) -> None:
        """Complain of what comes after the end of the archive, which nobody would read."""
        if any(os.pread(file.fileno(), _REST, end)):
            raise DataError(
                f"{self.path} goes on after the end of its archive, at byte {end:,}: tar files "
                "that were put one after another?\n    give them as shards of their own"
            )

    def _damaged(self, place: int, reason: str) -> DataError:
        if place == 0:
            return DataError(f"{self.path} is no tar file: {printable(reason)}")
        return DataError(
            f"{self.path} is damaged: no header at byte {place:,} ({printable(reason)})\n"
            "    copy or make this shard again, or take it out of shards"
        )

    def _truncated(self, size: int, name: str = "") -> DataError:
        where = f"within {printable(name)!r}" if name else "within a header"
        return DataError(
            f"{self.path} is cut off {where}: it ends at byte {size:,}\n"
            "    copy or make this shard again, or take it out of shards"
        )


def open_shard(path: Path, size: int | None = None) -> BinaryIO:
    """Open a shard; ``DataError`` if it is no regular file, or not of the ``size`` that it had."""
    try:
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}")
        file = path.open("rb")
        now = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if size not in (None, now):
        file.close()
        raise DataError(f"{path} had {size:,} bytes when this run began, now it has {now:,}")
    return file


def _parser(file: _Bounded) -> tarfile.TarFile:
    """What ``TarInfo.fromtarfile`` reads from; it tries the first header, whose errors come up."""
    return tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]


def _normal(name: str) -> str:
    """``./dir/x`` and ``dir/x`` are one."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _is_meta(name: str) -> bool:
    """Names that WebDataset keeps for what is no sample."""
    return name.startswith("__") and name.endswith("__")
