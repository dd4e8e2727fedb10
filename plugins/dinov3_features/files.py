"""Tensors to files piece by piece: safetensors and NumPy, of any length in little memory.

The layout of a safetensors file is that of https://huggingface.co/docs/safetensors: the length of
the header, the header in JSON, the tensors' bytes. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.errors import OutputError
from dinov3_framework.weights.tensor_file import CODES, file_header

_CHUNK = 16 * 2**20  # bytes copied at a time
_LONGEST_HEADER = 100 * 10**6  # bytes; safetensors refuses to read more

_TYPES = {code: dtype for dtype, code in CODES.items()}
_NUMPY = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}


@frozen
class TensorSpec:
    """Type, as safetensors calls it, and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _TYPES[self.dtype].itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(CODES[tensor.dtype], tuple(tensor.shape))


@frozen
class TensorFile:
    """A safetensors file as its header describes it."""

    path: Path
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    starts: Mapping[str, int]  # bytes from the beginning of the file

    @classmethod
    def opened(cls, path: Path) -> TensorFile:
        """Raises ``OutputError`` where it is not whole."""
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > _LONGEST_HEADER:
                    raise ValueError(f"a header of {length:,} bytes")
                header: dict[str, Any] = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            specs = {k: TensorSpec(v["dtype"], tuple(v["shape"])) for k, v in header.items()}
            starts = {k: 8 + length + v["data_offsets"][0] for k, v in header.items()}
            wanted = 8 + length + sum(spec.nbytes for spec in specs.values())
            found = path.stat().st_size
            if found != wanted:
                raise ValueError(f"{found:,} bytes instead of {wanted:,}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} is damaged ({error}); delete it and run again, it will be made anew"
            ) from error
        return cls(path, specs, metadata, starts)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor."""
        with self.path.open("rb") as stream:
            stream.seek(self.starts[name])
            left = self.specs[name].nbytes
            while left:
                chunk = stream.read(min(left, _CHUNK))
                if not chunk:
                    raise OutputError(f"{self.path} became shorter while it was read")
                left -= len(chunk)
                yield chunk

    def tensor(self, name: str) -> Tensor:
        """A tensor of integers, whole, in memory."""
        spec = self.specs[name]
        data = bytearray(b"".join(self.chunks(name)))
        if not data:
            return torch.empty(spec.shape, dtype=torch.int64)
        return torch.frombuffer(data, dtype=torch.int64).reshape(spec.shape)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the CPU, in row-major order."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[bytes]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file whose tensors come in pieces; ``chunks(name)`` gives a tensor's bytes."""
    head, places = file_header(
        {name: (_TYPES[spec.dtype], spec.shape) for name, spec in specs.items()}, metadata
    )
    with path.open("xb") as stream:
        # All of the room at once: a disk that is too small says so now, not hours later.
        size = len(head) + max((stop for _, stop in places.values()), default=0)
        os.posix_fallocate(stream.fileno(), 0, size)
        stream.write(head)
        for name in places:
            _copy(stream, chunks(name), specs[name])


def write_npy(path: Path, spec: TensorSpec, chunks: Iterable[bytes]) -> None:
    """Write one tensor as a NumPy file; NumPy knows no bfloat16."""
    described = {"descr": _NUMPY[spec.dtype], "fortran_order": False, "shape": spec.shape}
    with path.open("xb") as stream:
        np.lib.format.write_array_header_2_0(stream, described)
        os.posix_fallocate(stream.fileno(), 0, stream.tell() + spec.nbytes)
        _copy(stream, chunks, spec)


def _copy(stream: BinaryIO, chunks: Iterable[bytes], spec: TensorSpec) -> None:
    written = sum(stream.write(chunk) for chunk in chunks)
    if written != spec.nbytes:
        raise RuntimeError(f"{written:,} bytes came for a tensor of {spec.nbytes:,}")
