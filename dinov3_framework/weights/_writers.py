"""How weights are written in each of the framework's own formats and in those of layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.contracts.layouts import Layout, Rule
from dinov3_framework.errors import CheckpointError
from dinov3_framework.runtime.durable import sync
from dinov3_framework.weights.export import export_tensors
from dinov3_framework.weights.info import ComponentInfo
from dinov3_framework.weights.source import WeightSource
from dinov3_framework.weights.tensor_file import Specs
from dinov3_framework.weights.tensors import initial_tensors


@frozen
class Conversion:
    """A backbone's weights on their way to a file; tensors are read anew by each call."""

    source: WeightSource
    info: ComponentInfo
    backbone: nn.Module  # on the meta device
    layout: Layout | None  # None for the official names
    dtype: torch.dtype | None  # of the parameters; None: the source's

    def rules(self) -> dict[str, Rule]:
        """By official name; empty where the official names are written."""
        if self.layout is None:
            return {}
        names = list(self.backbone.state_dict())
        return {rule.official: rule for rule in self.layout.rules(self.source.config, names)}

    def settings(self) -> Mapping[str, Mapping[str, object]]:
        """JSON files that the layout puts beside the weights."""
        if self.layout is None:
            return {}
        return self.layout.settings(self.source.config, self.info.images, self.info.size)

    def official(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors under the official names."""
        parameters = {name for name, _ in self.backbone.named_parameters(remove_duplicate=False)}
        for name, tensor in self.source.tensors(self.backbone):
            cast = name in parameters and tensor.is_floating_point()
            yield name, tensor.to(self.dtype) if cast and self.dtype is not None else tensor

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors as the layout names and shapes them."""
        rules, written = self.rules(), set[str]()
        for name, tensor in self.official():
            pieces = {name: tensor}
            if name in rules:
                pieces = dict(rules[name].write(tensor, partial(self._initial, name)))
            # Two official names of one tensor share a place in the file.
            yield from ((n, t) for n, t in pieces.items() if n not in written)
            written |= pieces.keys()

    def _initial(self, name: str) -> Tensor:
        return initial_tensors(self.backbone, [name])[name]

    def filled(self) -> nn.Module:
        """The backbone with its values, in memory."""
        self.backbone.load_state_dict(dict(self.official()), strict=True, assign=True)
        return self.backbone


Writer = Callable[[Path, Conversion], None]


def own_file(path: Path, weights: Conversion) -> None:
    """One safetensors file whose metadata say what is in it."""
    _write_stream(path, weights.official, weights.info.to_metadata())


def state_dict(path: Path, weights: Conversion) -> None:
    """Meta's format: a PyTorch file with the official names."""
    _save(path, dict(weights.stored()))


def training_checkpoint(path: Path, weights: Conversion) -> None:
    """The form of the reference's teacher checkpoints, without heads."""
    _save(path, {"teacher": {f"backbone.{name}": t for name, t in weights.official()}})


def sharded_checkpoint(path: Path, weights: Conversion) -> None:
    """A folder with one checkpoint of this framework, at step 0, of the teacher's backbone."""
    tensors = {f"teacher.backbone.{name}": tensor for name, tensor in weights.official()}
    CheckpointStore(path).save(0, tensors, {"backbone": weights.info.to_metadata()})


def folder(path: Path, weights: Conversion) -> None:
    """``model.safetensors`` in the layout's names, with its settings as JSON beside it."""
    path.mkdir()
    specs = _write_stream(path / "model.safetensors", weights.stored, {"format": "pt"})
    floating = [dtype for dtype, _ in specs.values() if dtype.is_floating_point]
    dtype = reduce(torch.promote_types, floating)
    for name, content in weights.settings().items():
        if "dtype" in content:
            content = {**content, "dtype": str(dtype).removeprefix("torch.")}
        (path / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _write_stream(
    path: Path, tensors: Callable[[], Iterator[tuple[str, Tensor]]], metadata: Mapping[str, str]
) -> Specs:
    # Types are known once tensors were seen: the first of two passes, neither of which keeps any.
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors()}
    export_tensors(path, specs, tensors(), metadata)
    return specs


def _save(path: Path, content: object) -> None:
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch's archive writer says of a failed write that its position is wrong.
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    sync(path)


# By format; those of layouts not named here are folders.
WRITERS: Mapping[str, Writer] = {
    "dinov3_framework": own_file,
    "meta": state_dict,
    "reference": training_checkpoint,
    "checkpoint": sharded_checkpoint,
}
