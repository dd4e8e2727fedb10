"""Where the members of a tar lie."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np
from attrs import frozen

from dinov3_framework import DataError
from dinov3_framework.errors import printable

BLOCK = 512  # bytes; headers take one, and what follows fills whole ones


@frozen(eq=False)
class Members:
    """The regular files of a tar: their names, and where header, content and padding lie."""

    names: tuple[str, ...]
    starts: np.ndarray  # int64 [n], of the header
    ends: np.ndarray  # int64 [n]

    def without(self, name: str) -> Members:
        """All others."""
        if name not in self.names:
            return self
        kept = [place for place, each in enumerate(self.names) if each != name]
        names = tuple(self.names[place] for place in kept)
        return Members(names, self.starts[kept], self.ends[kept])


def read_members(path: Path) -> Members:
    """Read all headers of an uncompressed tar.

    Raises ``DataError`` for a tar that is damaged or cut off: one that ends otherwise than with a
    block of zeros. The tarfile module takes a file that is cut within a header, or has a damaged
    one, for whole.
    """
    names, starts, ends = [], [], []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    names.append(member.name)
                    starts.append(member.offset_data - BLOCK)
                    blocks = -(-member.size // BLOCK)
                    ends.append(member.offset_data + blocks * BLOCK)
            file.seek(tar.offset)
            last = file.read(BLOCK)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (tarfile.TarError, ValueError, OverflowError) as error:  # of sizes and names, say
        raise _damaged(path, str(error)) from error
    if len(last) < BLOCK:
        raise _damaged(path, "it is cut off")
    if last.strip(b"\0"):
        raise _damaged(path, f"no header where one should be, at byte {tar.offset:,}")
    return Members(tuple(names), np.array(starts, np.int64), np.array(ends, np.int64))


_LINE = re.compile(r"block ([0-9]{1,12}): (.*)")
_NULS = "** Block of NULs **"


def read_block_log(log: Path, tar: Path) -> Members:
    """The same from the output of ``tar -tRf``, without reading the tar, which must be as long.

    Raises ``DataError``.
    """
    names, blocks = [], []
    try:
        text = log.read_text(encoding="utf-8", errors="surrogateescape")
        size = tar.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        found = _LINE.fullmatch(line)
        if found is None:
            raise DataError(
                f"{log}, line {number}: is no line of tar -tRf: {printable(line[:80], kept='')!r}"
            )
        blocks.append(int(found[1]))
        names.append(found[2])
    offsets = np.array(blocks, np.int64) * BLOCK
    ordered = bool((np.diff(offsets) > 0).all())
    if not names or names[-1] != _NULS or _NULS in names[:-1] or not ordered:
        raise DataError(f"{log} is not whole: it must end with {_NULS!r}\n    remove it")
    if size < offsets[-1] + BLOCK:
        raise _damaged(tar, f"it is cut off, or {log} is of another one")
    kept = [place for place, name in enumerate(names[:-1]) if not name.endswith("/")]
    chosen = tuple(names[place] for place in kept)
    return Members(chosen, offsets[:-1][kept], offsets[1:][kept])


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}\n    fetch it again")
