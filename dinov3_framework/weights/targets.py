"""How weights are written in each format; called with a path that nobody looks at yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.contracts.layouts import Layout, Shape
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import CheckpointError
from dinov3_framework.kinds import BackboneConfig
from dinov3_framework.runtime.durable import sync
from dinov3_framework.weights.export import export_tensors
from dinov3_framework.weights.info import BackboneInfo

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


@frozen
class Weights:
    """A backbone's weights on their way to a file; tensors are read anew by each call."""

    config: BackboneConfig
    info: BackboneInfo
    backbone: Backbone  # on the meta device
    layout: Layout | None  # None for the official names
    shapes: Mapping[str, Shape]  # of the official tensors
    official: Tensors  # under the official names
    stored: Tensors  # as the layout names and shapes them
    lost: Sequence[str]
    silent_of_images: bool  # whether the file will not say what images it was trained on
    not_written: frozenset[str]  # official names that the layout has no place for


Target = Callable[[Path, Weights], None]


def own_file(path: Path, weights: Weights) -> None:
    """One safetensors file whose metadata say what is in it."""
    _write_stream(path, weights.official, weights.info.to_metadata())


def state_dict(path: Path, weights: Weights) -> None:
    """Meta's format: a PyTorch file with the official names."""
    _save(path, dict(weights.stored()))


def training_checkpoint(path: Path, weights: Weights) -> None:
    """The form of the reference's teacher checkpoints, without heads."""
    _save(path, {"teacher": {f"backbone.{name}": t for name, t in weights.official()}})


def sharded_checkpoint(path: Path, weights: Weights) -> None:
    """A folder with one checkpoint of this framework, at step 0, of the teacher's backbone."""
    tensors = {f"teacher.backbone.{name}": tensor for name, tensor in weights.official()}
    CheckpointStore(path).save(0, tensors, {"backbone": weights.info.to_metadata()})


def folder(path: Path, weights: Weights) -> None:
    """``model.safetensors`` in the layout's names, with its settings as JSON beside it."""
    if weights.layout is None:
        raise TypeError("a folder needs a layout")
    path.mkdir()
    settings = weights.layout.settings(weights.config, weights.info.images, weights.info.size)
    for name, content in settings.items():
        (path / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    _write_stream(path / "model.safetensors", weights.stored, {"format": "pt"})


def onnx_file(path: Path, weights: Weights) -> None:
    """A network in the exchange format, with the image as its only input."""
    from dinov3_onnx.export import export_onnx

    backbone = weights.backbone
    backbone.load_state_dict(dict(weights.official()), strict=True, assign=True)
    export_onnx(path, backbone, weights.info)


def _write_stream(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    # Types are known once tensors were seen: the first of two passes, none of which keeps any.
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors()}
    export_tensors(path, specs, tensors(), metadata)


def _save(path: Path, content: object) -> None:
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch's archive writer says of a failed write that its position is wrong.
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    sync(path)


TARGETS: Mapping[str, Target] = {
    "dinov3_framework": own_file,
    "meta": state_dict,
    "reference": training_checkpoint,
    "checkpoint": sharded_checkpoint,
    "folder": folder,
    "onnx": onnx_file,
}
