"""Writes safetensors files one tensor at a time.

The safetensors library wants all tensors of a file in memory at once; here a file may be larger
than the memory. Reading is the library's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

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
    """Write ``path`` in place: ``tensors`` in any order, as ``specs`` announces them.

    Equal input gives equal bytes, in whatever order it comes. Raises ``OSError`` where the file
    cannot be written, ``ValueError`` for a tensor that is not as announced or never comes. Write
    aside and rename, as ``durable.written_aside`` does, where half a file would be mistaken for a
    whole one.
    """
    header, places = file_header(specs, metadata)
    waiting = dict(places)
    with path.open("wb") as file:
        # All of the space at once: a disk that is too small says so now, not hours later.
        size = len(header) + max((stop for _, stop in places.values()), default=0)
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)
        for name, tensor in tensors:
            if name not in waiting:
                raise ValueError(f"{name!r} was not announced, or comes twice")
            if (tensor.dtype, tuple(tensor.shape)) != specs[name]:
                given = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name!r} is {given}, not {specs[name]}")
            start, _ = waiting.pop(name)
            file.seek(len(header) + start)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
    if waiting:
        raise ValueError(f"announced and never given: {', '.join(sorted(waiting))}")


def file_header(
    specs: Specs, metadata: Mapping[str, str]
) -> tuple[bytes, Mapping[str, tuple[int, int]]]:
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
