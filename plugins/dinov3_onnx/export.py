"""Write an ONNX model: the image goes in; tokens come out, or with a head, predictions."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from dinov3_framework import __version__
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError, summarize_names
from dinov3_framework.runtime.durable import no_room, written_aside
from dinov3_framework.weights.heads import LoadedHead
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.tensors import initial_tensors, not_finite
from dinov3_onnx.compare import Differs, compare, data_of
from dinov3_onnx.graph import Freedom, Untraceable, backbone_graph, graph_of
from dinov3_onnx.networks import Exportable, Predictions, Tokens

log = logging.getLogger("dinov3_framework.onnx")

# What tensors are stored as: half precisions are widened, which is exact.
STORED_AS = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.uint8: torch.uint8,
    torch.bool: torch.bool,
}
_LARGEST = 2**31 - 2**24  # bytes of weights in one file; a protobuf ends at 2 GiB
# Of the largest output. What a backbone computes in half precision the file computes in float32.
_TOKENS_APART, _PREDICTIONS_APART = 0.05, 0.01
_USUAL = 224  # pixels of images, where nothing says what a head was trained on
_PAGE = 4096  # bytes; tensors outside the model begin on pages, so that they can be mapped


def export_onnx(
    path: Path, backbone: Backbone, info: ComponentInfo, *, opset: int | None = None
) -> str:
    """Write ``backbone`` as one ``.onnx`` file; how it was compared with the backbone.

    The input is ``images``, normalized, float32 [batch, C, height, width]; the outputs are
    ``x_norm_clstoken`` [batch, D], ``x_norm_patchtokens`` [batch, patches, D] and, where there are
    storage tokens, ``x_storage_tokens`` [batch, R, D]. One file serves any batch and any height and
    width that are multiples of the patch size. The network computes in float32; weights of half
    precision are widened. ``info`` goes into the metadata; ``opset`` is the version of ONNX's
    operators, by default what torch takes for widely supported.

    Above 2 GiB, the limit of the format, weights are in a second file beside the first, named
    ``dinov3-<digest>.onnx.data`` by what is in it, which belongs to it. What was written is
    compared with the backbone before it gets its name (see :func:`compare.compare`).

    To be called by one process. Raises ``CheckpointError`` for a name that does not end in
    ``.onnx``, a missing library, an ``opset`` that does not exist, a backbone that cannot be
    traced, values that are missing, not finite or of a precision ONNX files do not keep, and where
    the file cannot be written or is not what was to be written; a file that was there then stays.
    """
    _check_name(path := Path(path))
    network = Tokens(backbone)
    _check_values(path, backbone.state_dict())
    freedom = Freedom(backbone.patch_size)
    model = backbone_graph(backbone, opset)
    _describe(model, info.component, info.to_metadata())
    return _write(path, network, model, freedom, _TOKENS_APART)


def export_predictions(
    path: Path,
    backbone: Backbone,
    info: ComponentInfo,
    head: LoadedHead,
    *,
    opset: int | None = None,
) -> str:
    """Write a head on a backbone as one ``.onnx`` file; how it was compared with them.

    The input is ``images`` as of :func:`export_onnx`. The outputs are what the head predicts for
    images of that size, by the names of targets: scores of classes [batch, classes], scores of each
    pixel's classes [batch, classes, height, width], values of pixels [batch, height, width]. Batch
    and sides are free where torch.export follows the head so: sides that are multiples of the patch
    size, of twice or of four times that; or else the size that it was trained on alone, and if
    need be one image at a time. The result says which, and so do the metadata: ``takes``, beside
    ``info``, ``head`` (its component and config) and ``targets`` (JSON: classes, unit, palette).

    Errors as of :func:`export_onnx`, also for a head whose predictions are no tensors.
    """
    _check_name(path := Path(path))
    network = Predictions(backbone, head.head)
    network.eval()
    _check_values(path, network.state_dict())
    schema = {name: attrs.asdict(target) for name, target in head.head.targets.items()}
    metadata = {
        **info.to_metadata(),
        "head": json.dumps({"use": head.component, **head.config}, sort_keys=True),
        "head_provenance": json.dumps(dict(head.provenance), sort_keys=True),
        "targets": json.dumps(schema),
    }
    reasons = []
    for freedom in _freedoms(backbone.patch_size, head.size or _USUAL):
        try:
            model = graph_of(network, freedom, opset)
            _describe(model, f"{info.component} {head.component}", metadata)
            model.metadata_props.add(key="takes", value=str(freedom))
            compared = _write(path, network, model, freedom, _PREDICTIONS_APART)
            return f"takes {freedom}; {compared}"
        except (Untraceable, Differs) as error:
            log.debug("%s: %s", freedom, error)
            reasons.append(str(error))
    raise CheckpointError(
        f"the head {head.component} cannot be written as ONNX, even for one image of a fixed size: "
        f"{reasons[-1]}"
    )


def _freedoms(patch: int, size: int) -> list[Freedom]:
    """The images that a graph may be for, from most to fewest."""
    whole = max(round(size / (4 * patch)), 1) * 4 * patch
    fixed = [Freedom(patch, (whole, whole)), Freedom(patch, (whole, whole), batch=1)]
    return [*(Freedom(patch * factor) for factor in (1, 2, 4)), *fixed]


def _check_name(path: Path) -> None:
    if path.suffix.lower() != ".onnx":
        raise CheckpointError(f"{path}: an ONNX model must be called something.onnx")


def _write(path: Path, network: Exportable, model: Any, freedom: Freedom, tolerance: float) -> str:
    """Write the graph with the network's tensors, and compare it with the network."""
    tensors = {network.file_name(name): each for name, each in network.state_dict().items()}
    used = {name for node in model.graph.node for name in node.input}
    tensors |= _computed(network, used - tensors.keys())
    values = {n: t.detach().to("cpu", STORED_AS[t.dtype]) for n, t in tensors.items()}
    # Runtimes warn of initializers without use, such as the mask token.
    stored = {name: tensor for name, tensor in values.items() if name in used}
    try:
        with _model_file(path, model, stored) as aside:
            compared = compare(aside, network, values, freedom, tolerance)
    except OSError as error:
        reason = no_room(error.errno, path.parent) or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}") from error
    versions = {each.domain: each.version for each in model.opset_import}
    log.info("%s: opset %d, %d nodes; %s", path, versions[""], len(model.graph.node), compared)
    return compared


def _check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    unknown = [f"{n}: {t.dtype}" for n, t in tensors.items() if t.dtype not in STORED_AS]
    known = {n: t for n, t in tensors.items() if not t.is_meta and t.dtype in STORED_AS}
    bad = [line for name, tensor in known.items() if (line := not_finite(name, tensor))]
    if empty or unknown or bad:
        raise CheckpointError(
            f"not exported to {path}:"
            + summarize_names("without values (on the meta device)", empty)
            + summarize_names("of a precision that is not kept; convert to float32 first", unknown)
            + summarize_names("with NaN or inf", bad)
        )


def _computed(network: Exportable, names: set[str]) -> dict[str, Tensor]:
    """Buffers that no state dict has, of those ``names`` in the file."""
    found: dict[str, Tensor] = {}
    for part, module in network.named_children():
        own = {n: b for n, b in module.named_buffers() if network.file_name(f"{part}.{n}") in names}
        # Whoever fills a network on the meta device may have left out what no file holds.
        own |= initial_tensors(module, [name for name in own if own[name].is_meta])
        found |= {network.file_name(f"{part}.{name}"): each for name, each in own.items()}
    return found


def _describe(model: Any, name: str, metadata: Mapping[str, str]) -> None:
    model.producer_name, model.producer_version = "dinov3_framework", __version__
    model.graph.name = name
    for key, value in metadata.items():
        if key != "format":  # what readers of safetensors ask for
            model.metadata_props.add(key=key, value=value)


# --------------------------------------------------------------------------- files
@contextmanager
def _model_file(path: Path, model: Any, tensors: Mapping[str, Tensor]) -> Iterator[Path]:
    """The written model, which becomes ``path`` at the end; on an error nothing stays."""
    size = model.ByteSize() + sum(tensor.nbytes for tensor in tensors.values())
    place = None if size <= _LARGEST else _Place(tensors)
    model.graph.initializer.extend(_proto(n, tensor, place) for n, tensor in tensors.items())
    data = None if place is None else path.with_name(place.location)
    was_there = data is not None and data.exists()
    try:
        if data is not None and place is not None:
            # First, so that a model is never without its weights.
            with written_aside(data) as aside, aside.open("wb") as file:
                file.writelines(place.content(tensors))
        with written_aside(path) as aside:
            aside.write_bytes(model.SerializeToString(deterministic=True))
            yield aside
    except BaseException:
        if data is not None and not was_there:
            data.unlink(missing_ok=True)
        raise


class _Place:
    """Where each tensor lies in a file of data beside the model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.offsets: dict[str, int] = {}
        end = 0
        for name, tensor in tensors.items():
            self.offsets[name] = -(-end // _PAGE) * _PAGE
            end = self.offsets[name] + tensor.nbytes
        digest = hashlib.blake2b(digest_size=8)
        for part in self.content(tensors):
            digest.update(part)
        self.location = f"dinov3-{digest.hexdigest()}.onnx.data"

    def content(self, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
        """The file's bytes, a tensor at a time."""
        end = 0
        for name, tensor in tensors.items():
            yield memoryview(bytes(self.offsets[name] - end))
            yield data_of(tensor)
            end = self.offsets[name] + tensor.nbytes


def _proto(name: str, tensor: Tensor, place: _Place | None) -> Any:
    import onnx

    dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
    proto = onnx.TensorProto(
        name=name,
        dims=list(tensor.shape),
        data_type=onnx.helper.np_dtype_to_tensor_dtype(dtype),
    )
    if place is None:
        proto.raw_data = bytes(data_of(tensor))
        return proto
    proto.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": place.location, "offset": place.offsets[name], "length": tensor.nbytes}
    for key, value in entries.items():
        proto.external_data.add(key=key, value=str(value))
    return proto
