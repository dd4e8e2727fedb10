"""Reads the index of a sharded checkpoint, a pickle, into plain records of its own.

Unpickling into torch's classes would let a file call what they call, and set what they keep, even
if it is refused in the end. Here every class that a file names stands for a record made for this
one reading: nothing outside of it is ever called or changed.
"""

from __future__ import annotations

import gc
import io
import math
import pickle
import re
import struct
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dinov3_framework.checkpoints.manifest import is_plain_name, leads_out
from dinov3_framework.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
# What an index consists of: classes that are filled, and what is called with arguments.
_FILLED = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
_CALLED = {
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("pathlib", "PosixPath"),  # where torch's own writer had put the checkpoint
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class _Malformed(ValueError):
    """What is wrong with an index."""


def read_index(path: Path, files: Container[str], foreign: bool = False) -> Metadata:
    """The index of a checkpoint, with nothing in it but tensors in ``files``.

    Of a ``foreign`` one, what is not a tensor is left out; its bytes are never read. Raises
    ``CheckpointError`` for anything else.
    """
    _refuse_links([path])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        _scan(content)
        with _collecting_no_garbage():
            index = _index(_Unpickler(io.BytesIO(content)).load(), files, foreign)
    except Exception as error:  # a malformed pickle raises whatever it likes
        raise CheckpointError(
            f"{path}: refused, since this is not the index of a checkpoint that dinov3_framework "
            f"wrote, or of tensors alone: {error}"
        ) from error
    names = {place.relative_path for place in index.storage_data.values()}
    _refuse_links(path.with_name(name) for name in names)
    return index


def _refuse_links(files: Iterable[Path]) -> None:
    for file in files:
        if leads_out(file):
            raise CheckpointError(
                f"{file}: refused, since it is a link that leads out of its folder; put the file "
                "itself there"
            )


@contextmanager
def _collecting_no_garbage() -> Iterator[None]:
    """For millions of small objects, looking for circles among them takes half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# --------------------------------------------------------------------------- instructions
# By the bytes that follow them. Among those that are missing are all that fetch something by a
# number or a name of the file's choice (PERSID, EXT, INST), and PUT, whose number makes room.
_FIXED = re.compile(
    rb"(?:[()\]}\x81\x85-\x89\x8f-\x91\x93\x94NR0-2abestu]|[Khq\x80].|M..|[Jj].{4}|[G\x95].{8})*+",
    re.DOTALL,
)
# Strings, bytes and long integers: a length, and as many bytes.
_SIZED = {b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q", b"C": "<B", b"\x8a": "<B"}


def _scan(content: bytes) -> None:
    """Refuse instructions that an index has no use for, before any is followed."""
    place = 0
    while True:
        match = _FIXED.match(content, place)
        place = match.end() if match else place
        code = content[place : place + 1]
        if code == b".":
            return
        if code in _SIZED:
            form = _SIZED[code]
            place += 1 + struct.calcsize(form)
            (length,) = struct.unpack_from(form, content, place - struct.calcsize(form))
            place += length
        elif code == b"c":  # two names, each to the end of a line
            place = content.index(b"\n", content.index(b"\n", place) + 1) + 1
        elif code == b"r":
            (number,) = struct.unpack_from("<I", content, place + 1)
            if number > len(content):
                raise _Malformed("a number in it is out of bounds")
            place += 5
        else:
            raise _Malformed(f"byte {place:,} is no instruction of an index" if code else "it ends")


# --------------------------------------------------------------------------- records
class _Record:
    """An object that a file describes: the attributes it is given, and no behavior."""


class _Properties(_Record):
    """The one whose attributes come as a tuple, the first of which is the type."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


def _nothing(*_: Any) -> None:
    """In place of what a file calls and nobody asks for."""


def _size(numbers: Any = ()) -> torch.Size:
    for number in numbers:
        if type(number) is not int or number < 0:
            raise _Malformed(f"{number!r} is no size")
    return torch.Size(numbers)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        key = (module, name)
        if key in self._made:
            return self._made[key]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]  # without attributes of its own
        if key in _FILLED:
            base = _Properties if name == "TensorProperties" else _Record
            self._made[key] = type(name, (base,), {})
        elif key in _CALLED:
            # Made anew, so that what a file sets on it is gone with the file.
            self._made[key] = partial(_size if name == "Size" else _nothing)
        else:
            raise _Malformed(f"it asks for {module}.{name}")
        return self._made[key]


# --------------------------------------------------------------------------- what they mean
def _index(record: Any, files: Container[str], foreign: bool) -> Metadata:
    fields = _fields(record, "Metadata")
    names, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(names) is not dict or type(places) is not dict:
        raise _Malformed("it lacks the tables of tensors and places")
    tensors: dict[str, Any] = {}
    for name, entry in names.items():
        if type(name) is str and _is(entry, "TensorStorageMetadata"):
            tensors[name] = _tensor(entry)
        elif not foreign:
            raise _Malformed(f"{name!r} is not a tensor")
    stored = {}
    room: dict[Any, int] = dict.fromkeys(tensors, 0)
    for where, place in places.items():
        at = _fields(where, "MetadataIndex")
        name = at["fqn"]
        if name in tensors:
            info = _place(name, place, files)
            room[name] += info.length
            stored[MetadataIndex(name, at.get("offset"), at.get("index"))] = info
        elif not foreign:
            raise _Malformed(f"it has a place for {name!r}, which is not a tensor")
    for name, entry in tensors.items():
        if room[name] and room[name] < math.prod(entry.size) * entry.properties.dtype.itemsize:
            raise _Malformed(f"{name!r} is said to be larger than what is stored of it")
    return Metadata(tensors, storage_data=stored, storage_meta=StorageMeta())


def _tensor(record: Any) -> TensorStorageMetadata:
    fields = vars(record)
    dtype, size = _fields(fields["properties"], "TensorProperties")["dtype"], fields["size"]
    if not isinstance(dtype, torch.dtype) or type(size) is not torch.Size:
        raise _Malformed("a tensor has no type or size")
    chunks = []
    for chunk in fields["chunks"]:
        part = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = part["offsets"], part["sizes"]
        if type(offsets) is not torch.Size or type(sizes) is not torch.Size:
            raise _Malformed("a part of a tensor has no place in it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _place(name: str, record: Any, files: Container[str]) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    file, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if type(file) is not str or not is_plain_name(file):
        raise _Malformed(f"{name!r} lies at {file!r}, not in this folder")
    if file not in files:
        raise _Malformed(f"{name!r} lies in {file!r}, not a file of this checkpoint")
    if fields.get("transform_descriptors"):
        raise _Malformed(f"{name!r} is stored with a transformation")
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
        raise _Malformed(f"{name!r} lies nowhere")
    return _StorageInfo(file, offset, length)


def _is(record: Any, name: str) -> bool:
    return isinstance(record, _Record) and type(record).__name__ == name


def _fields(record: Any, name: str) -> dict[str, Any]:
    if not _is(record, name):
        raise _Malformed(f"it holds a {type(record).__name__}, not a {name}")
    found: dict[str, Any] = vars(record)
    return found
