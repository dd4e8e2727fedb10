"""Write tensors to files piece by piece: safetensors and NumPy files larger than the memory.

The safetensors library wants all tensors of a file in memory at once. Reading is the library's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dinov3_framework.contracts.layouts import Shape

# What safetensors calls torch's types.
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Specs = Mapping[str, tuple[torch.dtype, Shape]]


def write_tensor_file(
    path: Path,
    specs: Specs,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file in place: ``tensors`` in any order, as ``specs`` announces them.

    A tensor may come in pieces along its first axis, under its name each. Equal input gives equal
    bytes, in whatever order it comes. Raises ``OSError`` where the file cannot be written,
    ``ValueError`` for a tensor that is not as announced or never comes whole. Write aside and
    rename, as ``durable.written_aside`` does, where half a file would be mistaken for a whole one.
    """
    header, missing = _header(specs, metadata)
    with path.open("wb") as file:
        _reserve(file, len(header) + max((stop for _, stop in missing.values()), default=0))
        file.write(header)
        for name, piece in tensors:
            if name not in missing:
                raise ValueError(f"{name!r} was not announced, or comes twice")
            start, stop = missing.pop(name)
            if not _is_piece(piece, *specs[name], stop - start):
                given = f"{piece.dtype} {list(piece.shape)}"
                raise ValueError(f"{name!r} is {given}, not {specs[name]} or what is left of it")
            file.seek(len(header) + start)
            start += file.write(_bytes(piece))
            if start < stop:
                missing[name] = (start, stop)
    if missing:
        raise ValueError(f"announced and never given: {', '.join(sorted(missing))}")


def write_array_file(
    path: Path, dtype: torch.dtype, shape: Shape, pieces: Iterable[Tensor]
) -> None:
    """Write one tensor as a NumPy file, from pieces along its first axis.

    Raises as :func:`write_tensor_file` does, and ``TypeError`` for bfloat16, which NumPy lacks.
    """
    described = torch.empty(0, dtype=dtype).numpy().dtype.str
    left = dtype.itemsize * math.prod(shape)
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": described, "fortran_order": False, "shape": tuple(shape)}
        )
        _reserve(file, file.tell() + left)
        for piece in pieces:
            if not _is_piece(piece, dtype, shape, left):
                raise ValueError(f"{piece.dtype} {list(piece.shape)} is no piece of {list(shape)}")
            left -= file.write(_bytes(piece))
    if left:
        raise ValueError(f"{left:,} bytes of {dtype} {list(shape)} never came")


def _reserve(file: BinaryIO, size: int) -> None:
    """Take all of the space at once: a disk that is too small says so now, not hours later."""
    os.posix_fallocate(file.fileno(), 0, size)


def _is_piece(piece: Tensor, dtype: torch.dtype, shape: Shape, left: int) -> bool:
    alike = piece.dtype == dtype and piece.ndim == len(shape)
    return alike and tuple(piece.shape[1:]) == tuple(shape[1:]) and piece.nbytes <= left


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _header(specs: Specs, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file's beginning, and where each tensor's bytes lie after it: (start, stop), in order."""
    # The widest types first, so that every tensor is aligned to its own.
    order = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places = {}
    stop = 0
    for name in order:
        dtype, shape = specs[name]
        start, stop = stop, stop + dtype.itemsize * math.prod(shape)
        places[name] = (start, stop)
        table[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(math.ceil(len(text) / 8) * 8)
    return len(text).to_bytes(8, "little") + text, places
