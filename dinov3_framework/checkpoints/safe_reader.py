"""Reads the shards of a checkpoint without running anything that is in them.

torch's reader unpickles the index of a checkpoint freely, follows any path in it and unpickles
every item that is not a tensor: whoever can write a checkpoint can run code where it is loaded.
Here the index is read without running anything (:mod:`index_reader`), shards lie in the
checkpoint's own folder, and items are tensors.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from dinov3_framework.checkpoints.index_reader import read_index
from dinov3_framework.checkpoints.shard_writer import INDEX
from dinov3_framework.errors import CheckpointError, summarize_names


class SafeReader(FileSystemReader):
    """torch's reader with an index that was read safely.

    ``files`` holds the names of the files that may be read; a ``foreign`` checkpoint, which torch
    wrote without this framework, may hold other things than tensors, which are left out. Raises
    ``CheckpointError`` where the index asks for anything else.
    """

    def __init__(self, folder: Path, files: Container[str], foreign: bool = False) -> None:
        super().__init__(folder)
        self.index = read_index(folder / INDEX, files, foreign)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def tensors(self) -> Mapping[str, TensorStorageMetadata]:
        """Shape, dtype and chunks of every tensor, by name."""
        return self.index.state_dict_metadata  # type: ignore[return-value]


class TensorsOnly(DefaultLoadPlanner):
    """Plans the loading of tensors; every name must be there, and nothing else is unpickled."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn!r} is not a tensor")


def check_fit(
    folder: Path, saved: Mapping[str, TensorStorageMetadata], wanted: Mapping[str, Tensor]
) -> None:
    """Raise ``CheckpointError`` unless names, shapes and dtypes of both are the same."""
    missing = [f"{name} {_shape(t.shape)}" for name, t in wanted.items() if name not in saved]
    unexpected = [f"{name} {_shape(e.size)}" for name, e in saved.items() if name not in wanted]
    both = [(name, saved[name], tensor) for name, tensor in wanted.items() if name in saved]
    shapes = [
        f"{name}: {_shape(entry.size)} in the checkpoint, {_shape(tensor.shape)} here"
        for name, entry, tensor in both
        if entry.size != tensor.shape
    ]
    dtypes = [
        f"{name}: {entry.properties.dtype} in the checkpoint, {tensor.dtype} here"
        for name, entry, tensor in both
        if entry.size == tensor.shape and entry.properties.dtype != tensor.dtype
    ]
    sections = [
        summarize_names("tensors not in the checkpoint", missing),
        summarize_names("tensors in the checkpoint but not in this run", unexpected),
        summarize_names("tensors of another shape", shapes),
        summarize_names("tensors of another dtype", dtypes),
    ]
    if any(sections):
        raise CheckpointError(
            f"{folder} does not fit this run:{''.join(sections)}\n"
            "restore it with the recipe it was made with, or start in another output folder"
        )


def _shape(shape: Iterable[int]) -> str:
    return str(list(shape))
