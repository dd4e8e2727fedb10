"""Reads the shards of a checkpoint without running anything that is in them.

torch's reader unpickles the index of a checkpoint freely, follows any path in it and unpickles
every item that is not a tensor: whoever can write a checkpoint can run code where it is loaded.
Here the index may name only what an index consists of, shards lie in the checkpoint's own folder,
and items are tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from dinov3_framework.checkpoints.manifest import is_plain_name
from dinov3_framework.checkpoints.shard_writer import INDEX
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_framework.runtime.durable import open_file

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = frozenset(
    {
        (_METADATA, "BytesStorageMetadata"),  # harmless itself; refused by name further down
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("pathlib", "PosixPath"),  # where torch's own writer had put the checkpoint
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
    }
)


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
        raise _refusal(Path(INDEX), f"{read_item.dest_index.fqn!r} is not a tensor")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_index(path: Path, files: Container[str], foreign: bool = False) -> Metadata:
    """The index of a checkpoint, with nothing in it but tensors in ``files``."""
    try:
        with open_file(path) as stream:
            index = _IndexUnpickler(stream).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a malformed pickle raises whatever it likes
        raise _refusal(path, f"{error}") from error
    if foreign and type(index) is Metadata:
        _keep_tensors(index)
    _check(path, index, files)
    index.storage_meta = StorageMeta()
    return index  # type: ignore[no-any-return]


def _keep_tensors(index: Metadata) -> None:
    """Forget what is not a tensor; its bytes are never read."""
    names, places = index.state_dict_metadata, index.storage_data
    if isinstance(names, dict) and isinstance(places, dict):
        kept = {n: entry for n, entry in names.items() if type(entry) is TensorStorageMetadata}
        index.state_dict_metadata = dict(kept)
        index.storage_data = {
            where: place for where, place in places.items() if getattr(where, "fqn", None) in kept
        }


def _check(path: Path, index: Any, files: Container[str]) -> None:
    if type(index) is not Metadata:
        raise _refusal(path, f"it holds a {type(index).__name__}")
    names, places = index.state_dict_metadata, index.storage_data
    if not isinstance(names, dict) or not isinstance(places, dict):
        raise _refusal(path, "it lacks the tables of tensors and places")
    for name, entry in names.items():
        if not isinstance(name, str) or type(entry) is not TensorStorageMetadata:
            raise _refusal(path, f"{name!r} is not a tensor")
    for where, place in places.items():
        if type(where) is not MetadataIndex or type(place) is not _StorageInfo:
            raise _refusal(path, "its table of places is malformed")
        file = place.relative_path
        if not is_plain_name(file):
            raise _refusal(path, f"{where.fqn!r} lies at {file!r}, not in this folder")
        if file not in files:
            raise _refusal(path, f"{where.fqn!r} lies in {file!r}, not a file of this checkpoint")
        if place.transform_descriptors:
            raise _refusal(path, f"{where.fqn!r} is stored with a transformation")


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused, since this is not the index of a checkpoint that dinov3_framework "
        f"wrote, or of tensors alone: {reason}"
    )


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
