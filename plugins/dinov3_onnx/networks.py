"""What is written as ONNX: a backbone that gives its tokens, or with a head, its predictions."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone, Head
from dinov3_framework.data.tokens import head_features
from dinov3_framework.errors import CheckpointError

INPUT = "images"
CLASS, PATCHES, STORAGE = "x_norm_clstoken", "x_norm_patchtokens", "x_storage_tokens"

# Names of axes of predictions, by the kind of their target.
_AXES = {
    "class": ("batch", "classes"),
    "mask": ("batch", "classes", "height", "width"),
    "map": ("batch", "height", "width"),
    "number": ("batch",),
}


class Exportable(nn.Module, abc.ABC):
    """A network whose ``forward(images)`` gives a tuple of tensors: the file's outputs."""

    backbone: Backbone
    outputs: Mapping[str, tuple[str, ...]]  # names of axes by name, in order; the last may lack
    traced_on = "meta"

    def file_name(self, name: str) -> str:
        """What a tensor of this module is called in the file."""
        return name


class Tokens(Exportable):
    """A backbone whose output is a tuple of the tokens that it has, under its own names."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.outputs = {
            CLASS: ("batch", "channels"),
            PATCHES: ("batch", "patches", "channels"),
            STORAGE: ("batch", "storage", "channels"),
        }

    def file_name(self, name: str) -> str:
        return name.removeprefix("backbone.")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone.forward_features(images)
        storage = features[STORAGE]
        some = storage is not None and storage.shape[1] > 0
        return (features[CLASS], features[PATCHES], *([storage] if some else []))


class Predictions(Exportable):
    """A head on a backbone: predictions by the names of their targets, for the images' own size.

    Raises ``CheckpointError`` for a head that predicts what is no tensor.
    """

    traced_on = "cpu"  # constants that a head makes on the way must have values

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        for name, target in head.targets.items():
            if target.kind not in _AXES or target.per_object:
                raise CheckpointError(
                    f"the head predicts {name!r}, {target}, which is no single tensor; such heads "
                    "cannot be written as ONNX"
                )
        self.outputs = {name: _AXES[target.kind] for name, target in head.targets.items()}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = head_features(self.backbone, images, self.head.needs)
        size = (images.shape[-2], images.shape[-1])
        found = self.head.predict(self.head(features), size)
        if missing := sorted(self.outputs.keys() - found.keys()):
            raise CheckpointError(f"the head does not predict {missing[0]!r}, which is its target")
        return tuple(torch.as_tensor(found[name]) for name in self.outputs)
