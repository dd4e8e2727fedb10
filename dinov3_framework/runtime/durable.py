"""Files that are whole or not there: written aside, brought to the disk, then renamed."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from dinov3_framework.errors import OutputError

_log = logging.getLogger(__name__)

_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}")  # names of what is being written
_IRREGULAR = "is no regular file (a pipe, a socket or a device)"
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def open_file(path: Path) -> BufferedReader:
    """Open a file to read its bytes.

    Raises ``OSError`` for what is no regular one, too: a pipe would be waited for without end.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder, open says so
        raise OSError(errno.EINVAL, _IRREGULAR, str(path))
    return path.open("rb")


def read_file(path: Path) -> bytes:
    """The bytes of a file; errors as of :func:`open_file`."""
    with open_file(path) as stream:
        return stream.read()


def parse_json(text: str | bytes) -> Any:
    """What JSON holds; ``ValueError`` for what is none, or is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested too deep ({error})") from error


def irregular(folder: Path) -> str:
    """What in a folder, or one level below, is neither a file nor a folder; "" if nothing is."""
    for path in sorted((*folder.glob("*"), *folder.glob("*/*"))):
        if path.exists() and not path.is_file() and not path.is_dir():
            return f"{path} {_IRREGULAR}; remove it"
    return ""


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a new file and bring its bytes to the disk; the folder's entry is the caller's."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it becomes ``path`` at the end and vanishes on an error.

    Makes the folder. Until the last moment a file that ``path`` already names stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def clear_aside(folder: Path) -> None:
    """Remove what :func:`written_aside` left in a folder, or one level below, when it was killed.

    For who holds the folder alone.
    """
    for pattern in (".*", "*/.*"):
        for path in folder.glob(pattern):
            try:
                if _ASIDE.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                    path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("cannot remove %s, left by an interrupted run: %s", path, error)


def unwritable(error: OSError, path: Path) -> OutputError:
    """What to say when ``path`` cannot be written."""
    reason = no_room(error.errno, path.parent)
    if reason is not None:
        return OutputError(f"{path} cannot be written: {reason}; make room and run again")
    return OutputError(f"{path} cannot be written: {error.strerror or error}")


def no_room(number: int | None, folder: Path) -> str | None:
    """What to say of an ``errno`` that means "no room left"; None for any other."""
    if number not in NO_ROOM:
        return None
    try:
        free = f"{shutil.disk_usage(_existing(folder)).free / 2**20:,.1f} MiB free"
    except OSError:  # the message must come through whatever state the disk is in
        free = "free space unknown"
    return f"disk full ({os.strerror(number)}; {free} in {folder})"


def _existing(folder: Path) -> Path:
    return next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
