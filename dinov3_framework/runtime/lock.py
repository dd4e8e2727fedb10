"""Who holds an output folder: one run, for as long as its process lives.

The lock belongs to an open file, not to a process as a POSIX lock does, which is dropped when
anything in the process closes the file. Forked children close their copy, so that loader workers
which outlive a killed run do not keep it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov3_framework.errors import OutputError
from dinov3_framework.runtime.durable import unwritable

LOCK = ".lock"
_WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class _FolderLock:
    def __init__(self, folder: Path) -> None:
        self.name, self.folder = folder, Path(os.path.abspath(folder))
        self._path = self.folder / LOCK
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._owner = f"process {os.getpid()} on host {socket.gethostname()} since {since}\n"
        self.file = self._acquire()
        self._inode = _inode(self.folder)

    def _acquire(self) -> int:
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise unwritable(error, self.name) from error
            try:
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, _WHOLE_FILE)
                if _inode(file) == _inode(self._path):  # nobody removed it in between
                    os.ftruncate(file, 0)
                    os.pwrite(file, self._owner.encode(), 0)
                    os.fsync(file)
                    return file
            except (BlockingIOError, PermissionError):
                complaint = _in_use(self.name, file)
                os.close(file)
                raise complaint from None
            except OSError as error:
                os.close(file)
                raise OutputError(
                    f"{self.name / LOCK} cannot be locked ({error.strerror or error}), so another "
                    "run might write there too; choose an --output-dir on a file system that knows "
                    "locks"
                ) from error
            os.close(file)

    def verify(self) -> None:
        """Raise ``OutputError`` unless the folder is still where it was, and this run's."""
        try:
            if _inode(self._path) == _inode(self.file):
                return
            owner = _read_owner(self._path)
        except OSError as error:
            if error.errno not in _GONE:
                return
            if self._is_there():  # the file alone was removed
                removed, self.file = self.file, self._acquire()
                os.close(removed)
                return
            owner = ""
        raise OutputError(
            f"{self.name} was {f'taken over by {owner}' if owner else 'removed or renamed'} while "
            "this run wrote to it; the run ends here. What it has saved goes on, wherever it is, "
            "with the same command and that --output-dir"
        )

    def _is_there(self) -> bool:
        try:
            return _inode(self.folder) == self._inode
        except OSError:
            return False


_held: list[_FolderLock] = []


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the folder; a second run into it is refused while the first lives."""
    lock = _FolderLock(output_dir)
    _held.append(lock)
    try:
        yield
    finally:
        _held.remove(lock)
        os.close(lock.file)


def refuse_in_use(output_dir: Path) -> None:
    """Raise ``OutputError`` if a run holds the folder; takes and writes nothing."""
    try:
        file = os.open(output_dir / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _WHOLE_FILE)
        if struct.unpack_from("h", found)[0] != fcntl.F_UNLCK:
            raise _in_use(output_dir, file)
    finally:
        os.close(file)


def _in_use(folder: Path, file: int) -> OutputError:
    owner = _read_owner(file)
    return OutputError(
        f"{folder} is in use by {owner}; wait for it, or choose another --output-dir"
    )


def verify_held() -> None:
    """Raise ``OutputError`` if a folder that this process holds is not its own any more."""
    for lock in _held:
        lock.verify()


def _let_go() -> None:
    while _held:
        os.close(_held.pop().file)


os.register_at_fork(after_in_child=_let_go)


def _inode(file: int | Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_dev, found.st_ino


def _read_owner(file: int | Path) -> str:
    """What the holder has written of itself."""
    try:
        found = os.pread(file, 200, 0) if isinstance(file, int) else file.read_bytes()[:200]
    except OSError:
        found = b""
    text = found.decode(errors="replace").strip()
    return text if text.isprintable() and text else "another run"
