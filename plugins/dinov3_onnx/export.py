"""Writes a backbone as an ONNX model: the image goes in, tokens come out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_framework.runtime.durable import no_room, written_aside
from dinov3_framework.weights.filling import initial_values
from dinov3_framework.weights.info import BackboneInfo
from dinov3_onnx.files import NAMES, STORED_AS, TENSORS_KEY
from dinov3_onnx.graph import backbone_graph

log = logging.getLogger("dinov3_framework.onnx")

_LARGEST = 2**31 - 2**24  # bytes of weights in one file; a protobuf ends at 2 GiB
_PAGE = 4096  # bytes; tensors outside the model begin on pages, so that they can be mapped


def export_onnx(
    path: Path, backbone: Backbone, info: BackboneInfo, *, opset: int | None = None
) -> None:
    """Write ``backbone`` as one ``.onnx`` file, which :func:`load_backbone` also loads.

    The input is ``images``, normalised, float32 [batch, C, height, width]; the outputs are
    ``x_norm_clstoken`` [batch, D], ``x_norm_patchtokens`` [batch, patches, D] and, where there are
    storage tokens, ``x_storage_tokens`` [batch, R, D]. One file serves any batch and any height and
    width that are multiples of the patch size. The network computes in float32; weights of half
    precision are widened, exactly, and are what they were when loaded back. ``info`` goes into the
    metadata; ``opset`` is the version of ONNX's operators, by default what torch takes for widely
    supported.

    Above 2 GiB, the limit of the format, weights are in a second file beside the first, named
    ``dinov3-<digest>.onnx.data`` by what is in it, which belongs to it.

    To be called by one process. Raises ``CheckpointError`` for a name that does not end in
    ``.onnx``, a missing library, an ``opset`` that does not exist, a backbone that cannot be
    traced, values that are missing, not finite or of a precision ONNX files do not keep, and where
    the file cannot be written; a file that was there then stays.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise CheckpointError(f"{path}: an ONNX model must be called something.onnx")
    tensors = dict(backbone.state_dict())
    _check_values(path, tensors)
    model = backbone_graph(backbone, opset)
    _describe(model, info, tensors)
    used = {name for node in model.graph.node for name in node.input}
    stored = tensors | _computed(backbone, used - tensors.keys())
    try:
        if model.ByteSize() + sum(map(_size, stored.values())) <= _LARGEST:
            _fill(model, used, stored, None)
            _write(path, model)
        else:
            _write_apart(path, model, used, stored)
    except OSError as error:
        reason = no_room(error.errno, path.parent) or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}") from error
    versions = {each.domain: each.version for each in model.opset_import}
    log.info("%s: ONNX of opset %d, %d nodes", path, versions[""], len(model.graph.node))


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    empty, unknown, bad = [], [], []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            empty.append(name)
        elif tensor.dtype not in STORED_AS:
            unknown.append(f"{name}: {tensor.dtype}")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            bad.append(f"{name}: {count:,} of {tensor.numel():,} values")
    if empty or unknown or bad:
        raise CheckpointError(
            f"not exported to {path}:"
            + summarize_names("without values (on the meta device)", empty)
            + summarize_names("of a precision that is not kept; convert to float32 first", unknown)
            + summarize_names("with NaN or inf", bad)
        )


def _computed(backbone: Backbone, names: set[str]) -> dict[str, Tensor]:
    """Buffers that no state dict has, of those ``names``; of use to the graph alone."""
    found = {name: buffer for name, buffer in backbone.named_buffers() if name in names}
    # Whoever fills a backbone on the meta device may have left out what no file holds.
    empty = [name for name, buffer in found.items() if buffer.is_meta]
    return found | initial_values(backbone, empty)


def _describe(model: Any, info: BackboneInfo, tensors: Mapping[str, Tensor]) -> None:
    from dinov3_framework import __version__

    model.producer_name, model.producer_version = "dinov3_framework", __version__
    model.graph.name = info.component
    metadata = info.to_metadata()
    del metadata["format"]  # what readers of safetensors ask for
    metadata[TENSORS_KEY] = json.dumps({name: NAMES[t.dtype] for name, t in tensors.items()})
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)


# --------------------------------------------------------------------------- tensors
class _Place:
    """Where each tensor lies in a file of data beside the model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.offsets: dict[str, int] = {}
        end = 0
        for name, tensor in tensors.items():
            self.offsets[name] = -(-end // _PAGE) * _PAGE
            end = self.offsets[name] + _size(tensor)
        digest = hashlib.blake2b(digest_size=8)
        for part in self.content(tensors):
            digest.update(part)
        self.location = f"dinov3-{digest.hexdigest()}.onnx.data"

    def content(self, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
        """The file's bytes, a tensor at a time."""
        end = 0
        for name, tensor in tensors.items():
            yield memoryview(bytes(self.offsets[name] - end))
            data = _data(tensor)
            yield data
            end = self.offsets[name] + len(data)


def _fill(model: Any, used: set[str], tensors: Mapping[str, Tensor], place: _Place | None) -> None:
    """Give a graph its weights; those it does not use go where runtimes do not look."""
    unused = [name for name in tensors if name not in used]
    if unused:
        kept = model.training_info.add().initialization
        kept.name = "tensors that inference does not use"
        kept.initializer.extend(_proto(name, tensors[name], place) for name in unused)
    model.graph.initializer.extend(
        _proto(name, tensor, place) for name, tensor in tensors.items() if name in used
    )


def _proto(name: str, tensor: Tensor, place: _Place | None) -> Any:
    import onnx

    dtype = torch.empty(0, dtype=STORED_AS[tensor.dtype]).numpy().dtype
    proto = onnx.TensorProto(
        name=name,
        dims=list(tensor.shape),
        data_type=onnx.helper.np_dtype_to_tensor_dtype(dtype),
    )
    if place is None:
        proto.raw_data = bytes(_data(tensor))
        return proto
    proto.data_location = onnx.TensorProto.EXTERNAL
    entries = {
        "location": place.location,
        "offset": str(place.offsets[name]),
        "length": str(_size(tensor)),
    }
    for key, value in entries.items():
        proto.external_data.add(key=key, value=value)
    return proto


def _data(tensor: Tensor) -> memoryview:
    whole = tensor.to("cpu", STORED_AS[tensor.dtype]).contiguous().reshape(-1)
    return whole.view(torch.uint8).numpy().data


def _size(tensor: Tensor) -> int:
    return tensor.numel() * STORED_AS[tensor.dtype].itemsize


# --------------------------------------------------------------------------- files
def _write(path: Path, model: Any) -> None:
    with written_aside(path) as aside:
        aside.write_bytes(model.SerializeToString(deterministic=True))


def _write_apart(path: Path, model: Any, used: set[str], tensors: Mapping[str, Tensor]) -> None:
    """The file of data first: a model is never without its weights."""
    place = _Place(tensors)
    _fill(model, used, tensors, place)
    data = path.with_name(place.location)
    was_there = data.exists()
    try:
        with written_aside(data) as aside, aside.open("wb") as file:
            for part in place.content(tensors):
                file.write(part)
        _write(path, model)
    except BaseException:
        if not was_there:
            data.unlink(missing_ok=True)
        raise
