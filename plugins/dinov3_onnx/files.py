"""ONNX files that this framework wrote, read back as weights.

Initializers of the graph carry the official names; tensors that the graph does not use, such as the
mask token, are initializers of the file's training information, which runtimes skip. The metadata
hold what ``info`` says of any file of ours, and under ``tensors`` (JSON) each tensor's name and the
precision it had: the network itself is float32, which holds the half precisions exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.contracts.layouts import Shape
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_framework.weights.containers import Contained
from dinov3_framework.weights.info import FORMAT_KEY

TENSORS_KEY = "tensors"
MISSING_LIBRARY = "install it with: pip install 'dinov3-framework[onnx]'"

# What is kept in a file, by what it was before: half precisions as float32.
STORED_AS = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.uint8: torch.uint8,
    torch.bool: torch.bool,
}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in STORED_AS}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}


def open_onnx(path: Path) -> Contained:
    """The weights in an ONNX file of this framework's, under their official names.

    Raises ``CheckpointError`` for an ONNX file of another origin, one that is damaged or was
    changed after it was written, and where the onnx library is missing.
    """
    model = _parsed(path)
    metadata = {each.key: each.value for each in model.metadata_props}
    if FORMAT_KEY not in metadata:
        raise CheckpointError(
            f"{path} is an ONNX model of another origin, a network that runs by itself, and not a "
            "state dict\ngive the weights that it was exported from"
        )
    initializers = {each.name: each for each in model.graph.initializer}
    for training in model.training_info:
        initializers |= {each.name: each for each in training.initialization.initializer}
    dtypes = _dtypes(path, metadata)
    if missing := summarize_names("missing", dtypes.keys() - initializers.keys()):
        raise CheckpointError(
            f"{path} was changed after it was exported; give the weights that it was exported "
            f"from{missing}"
        )
    tensors = [(name, _stored(path, initializers[name], dtype)) for name, dtype in dtypes.items()]
    return Contained(tensors, metadata=metadata)


def _parsed(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise CheckpointError(
            f"{path} is an ONNX model; reading it needs the onnx library\n{MISSING_LIBRARY}"
        ) from error
    try:
        # Whatever lies outside the file is opened here, under rules of our own.
        return onnx.load_model(path, load_external_data=False)
    except DecodeError as error:
        raise CheckpointError(
            f"{path} is an ONNX model that is truncated or damaged; copy or export it again"
        ) from error


def _dtypes(path: Path, metadata: Mapping[str, str]) -> dict[str, torch.dtype]:
    try:
        return {name: _DTYPES[dtype] for name, dtype in json.loads(metadata[TENSORS_KEY]).items()}
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its metadata do not say which tensors it holds "
            f"({type(error).__name__}: {error})"
        ) from error


# --------------------------------------------------------------------------- tensors
@frozen
class _Initializer:
    """One tensor, in the model's file or in the file of data beside it; a ``Stored``."""

    path: Path
    proto: Any  # onnx.TensorProto
    shape: Shape
    dtype: torch.dtype
    data: Path | None  # None: inside the model
    offset: int

    def rows(self, start: int | None, stop: int | None) -> Tensor:
        stored = self._inside() if self.data is None else self._mapped(self.data)
        tensor = stored.reshape(self.shape)
        return (tensor if start is None else tensor[start:stop]).to(self.dtype)

    def _inside(self) -> Tensor:
        raw = bytearray(self.proto.raw_data)
        stored_as = STORED_AS[self.dtype]
        return torch.frombuffer(raw, dtype=stored_as) if raw else torch.empty(0, dtype=stored_as)

    def _mapped(self, data: Path) -> Tensor:
        size = self.offset + _bytes(self.shape, self.dtype)
        mapped = torch.from_file(str(data), shared=False, size=size, dtype=torch.uint8)
        own = mapped[self.offset :]
        stored_as = STORED_AS[self.dtype]
        # Ours begin on pages; whoever wrote the file anew may see it otherwise.
        return (own.clone() if self.offset % stored_as.itemsize else own).view(stored_as)


def _stored(path: Path, proto: Any, dtype: torch.dtype) -> _Initializer:
    """Checks all but values. Raises ``CheckpointError`` for anything we would not have written."""
    import onnx

    shape = tuple(int(size) for size in proto.dims)
    if min(shape, default=0) < 0:
        raise CheckpointError(f"{path}: {proto.name!r} has the shape {list(shape)}")
    expected = onnx.helper.np_dtype_to_tensor_dtype(
        torch.empty(0, dtype=STORED_AS[dtype]).numpy().dtype
    )
    if proto.data_type != expected:
        given = onnx.TensorProto.DataType.Name(proto.data_type)
        raise CheckpointError(
            f"{path}: {proto.name!r} became {given} after it was exported; give the weights that "
            "it was exported from"
        )
    wanted = _bytes(shape, dtype)
    data, offset, length = None, 0, len(proto.raw_data)
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        data, offset, length = _place(path, proto)
    if length != wanted:
        raise CheckpointError(
            f"{path}: {proto.name!r} {list(shape)} has {length:,} bytes instead of {wanted:,}; "
            "copy or export the file again"
        )
    return _Initializer(path, proto, shape, dtype, data, offset)


def _place(path: Path, proto: Any) -> tuple[Path, int, int]:
    """Where a tensor lies that is not in the model's file: a file beside it, offset and length."""
    entries = {each.key: each.value for each in proto.external_data}
    location = entries.get("location", "")
    # A path could lead out of the folder, to any file of this machine.
    if location in ("", ".", "..") or set(location) & set("/\\\0"):
        raise CheckpointError(f"{path}: {proto.name!r} lies at {location!r}, not in this folder")
    data = path.with_name(location)
    if not data.is_file():
        raise CheckpointError(
            f"{path}: its weights are in {location}, which is not beside it; copy both files"
        )
    try:
        offset, length = int(entries["offset"]), int(entries["length"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {proto.name!r} lies at no clear place") from error
    size = data.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise CheckpointError(
            f"{path}: {proto.name!r} ends at byte {offset + length:,} of {location}, which has "
            f"{size:,}; copy it again"
        )
    return data, offset, length


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * STORED_AS[dtype].itemsize
