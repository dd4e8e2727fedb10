"""One file of weights, opened by the reader of its kind, under the names that it has there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.errors import CheckpointError
from dinov3_framework.weights import looks
from dinov3_framework.weights.pickles import read_pickle

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class Stored(Protocol):
    """One tensor in an open file."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, start: int | None, stop: int | None) -> Tensor:
        """Some rows, or all where both are None; possibly the file's own memory."""
        ...


@frozen
class Contained:
    """What one file holds, under the names it has there."""

    tensors: Sequence[tuple[str, Stored]]
    metadata: Mapping[str, str] = {}
    ignored: Sequence[str] = ()


def open_file(path: Path, stack: ExitStack) -> tuple[str, Contained]:
    """What a file is, in words, and what it holds, until ``stack`` closes.

    Here every container finds its reader. Raises ``CheckpointError`` for a file without weights.
    """
    container = looks.container(path)
    if container is None:
        raise looks.not_weights(path)
    if container == "onnx":
        # Here, not above: it builds on what this module defines.
        from dinov3_onnx.files import open_onnx

        return "an ONNX file", open_onnx(path)
    if container == "safetensors":
        return "a safetensors file", _open_safetensors(path, stack)
    return "a PyTorch file", _open_pickle(path)


# --------------------------------------------------------------------------- PyTorch files
@frozen
class _Pickled:
    tensor: Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def rows(self, start: int | None, stop: int | None) -> Tensor:
        return self.tensor if start is None else self.tensor[start:stop]


def _open_pickle(path: Path) -> Contained:
    content = read_pickle(path)
    return Contained([(n, _Pickled(t)) for n, t in content.tensors], ignored=content.ignored)


# --------------------------------------------------------------------------- safetensors files
@frozen
class _Mapped:
    handle: Any  # of safetensors.safe_open
    name: str
    shape: Shape
    dtype: torch.dtype

    def rows(self, start: int | None, stop: int | None) -> Tensor:
        if start is None:
            return self.handle.get_tensor(self.name)  # type: ignore[no-any-return]
        return self.handle.get_slice(self.name)[start:stop]  # type: ignore[no-any-return]


def _open_safetensors(path: Path, stack: ExitStack) -> Contained:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a safetensors file; to read it: pip install safetensors"
        ) from error
    try:
        handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
    except SafetensorError as error:
        fault = looks.looks_cut(path, path.stat().st_size) or f"its header is malformed ({error})"
        raise CheckpointError(
            f"{path} is a damaged safetensors file: {fault}\ndownload or copy it again"
        ) from error
    tensors = []
    for name in handle.keys():  # noqa: SIM118  # a handle is no mapping
        entry = handle.get_slice(name)
        dtype = entry.get_dtype()
        if dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name!r} is of type {dtype}, which is not read here")
        shape = tuple(int(size) for size in entry.get_shape())
        tensors.append((name, _Mapped(handle, name, shape, _DTYPES[dtype])))
    return Contained(tensors, metadata=dict(handle.metadata() or {}))
