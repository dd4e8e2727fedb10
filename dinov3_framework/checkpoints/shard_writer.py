"""Writes a process's shards of a checkpoint, and keeps the system's own word on what went wrong."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

INDEX = ".metadata"  # torch's name for the file that says which shard lies where


class ShardWriter(FileSystemWriter):
    """One file a process, brought to the disk, and the index.

    ``written`` names the files that this process wrote. Whatever fails is raised as an ``OSError``
    with its ``errno`` or as a ``RuntimeError``: both can be sent to the other processes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, overwrite=False)
        self._files = _AttentiveFiles()
        self.fs = self._files

    @property
    def written(self) -> list[str]:
        # The index is written under a temporary name that torch renames.
        return [name.removesuffix(".tmp") for name in self._files.written]

    def storage_meta(self) -> StorageMeta:
        # torch would store the path of the temporary folder, as an object that needs unpickling.
        return StorageMeta(save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with self._plain_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with self._plain_errors():
            super().finish(metadata, results)

    @contextmanager
    def _plain_errors(self) -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:
            cause = self._files.failure or error
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror) from error
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


class _AttentiveFiles(FileSystem):
    """Opens files for writing; remembers their names and the first error of a write."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        raw = _AttentiveFile(path, mode, self)
        self.written.append(Path(path).name)
        with io.BufferedWriter(raw, 1 << 20) as stream:
            yield stream


class _AttentiveFile(io.FileIO):
    """torch's archive writer turns a failed write into an error about positions; this keeps it."""

    def __init__(self, path: str | os.PathLike[str], mode: str, files: _AttentiveFiles) -> None:
        super().__init__(path, mode)
        self._files = files

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._files.failure = self._files.failure or error
            raise
