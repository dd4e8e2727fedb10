"""A backbone of one convolution, heads of masks and maps on it, and the straightforward way to
predict with them: a whole accumulator, to which every window is added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors

from dinov3_framework import (
    Backbone,
    Dataset,
    FeatureNeeds,
    Head,
    HeadFeatures,
    ImagesConfig,
    LossResult,
    Model,
    Sample,
    Target,
)
from dinov3_framework.data.bilinear import bilinear_rows
from dinov3_framework.data.tokens import head_features

PATCH = 4
CLASSES = 5


class Patches(Backbone):
    """A token for each patch: a convolution of its pixels; n_calls counts the images."""

    embed_dim, patch_size, in_chans = 8, PATCH, 3

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, self.embed_dim, PATCH, stride=PATCH)
        self.n_calls = 0
        self.init_weights()

    def init_weights(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed.reset_parameters()

    def forward_features(self, images: Any, masks: Any = None) -> dict[str, Tensor]:
        self.n_calls += 1
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": tokens.mean(1), "x_norm_patchtokens": tokens}


class PixelHead(Head):
    """Scores of classes by pixel, linear in the tokens."""

    needs = FeatureNeeds()

    def __init__(self, target: Target, rows: bool = True) -> None:
        super().__init__()
        self.targets, self.predicts_rows = {"it": target}, rows
        channels = target.count or 1
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv = nn.Conv2d(Patches.embed_dim, channels, 1)

    def init_weights(self) -> None:
        pass

    def forward(self, features: HeadFeatures) -> Tensor:
        return 20 * self.conv(features.maps[0])

    def loss(self, outputs: Any, targets: Mapping[str, Any]) -> LossResult:
        raise NotImplementedError

    def _squeezed(self, scores: Tensor) -> dict[str, Tensor]:
        return {"it": scores[:, 0] if self.targets["it"].kind == "map" else scores}

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        return self._squeezed(F.interpolate(outputs, size, mode="bilinear", align_corners=False))

    def predict_rows(
        self, outputs: Tensor, size: tuple[int, int], start: int, stop: int
    ) -> Mapping[str, Tensor]:
        return self._squeezed(bilinear_rows(outputs, size, start, stop))


def pixel_model(
    kind: str = "mask", rows: bool = True, size: int | None = 16, classes: str = "abcde"
) -> Model:
    target = Target("map", unit="m")
    if kind == "mask":
        target = Target("mask", classes=tuple(classes), ignore_index=255)
    return Model(Patches().eval(), ImagesConfig(), PixelHead(target, rows).eval(), size)


class Drawn(Dataset):
    """Images of noise of several sizes, with masks; ``corrupt`` are those that do not decode."""

    targets: Mapping[str, Target]

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes
        self.targets = {"it": Target("mask", n_classes=CLASSES, ignore_index=255)}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        height, width = self.sizes[index]
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        mask = torch.from_numpy(rng.integers(0, CLASSES, (height, width), dtype=np.uint8))
        return Sample(image, {"it": tv_tensors.Mask(mask)})

    def name(self, index: int) -> str:
        return f"folder/{index}.png"


def straightforward(
    model: Model,
    views: list[Tensor],
    size: tuple[int, int],
    *,
    window: int | None,
    stride: int,
    flip: bool,
) -> Tensor:
    """Scores [classes, H, W] as the definition has them, float64."""
    assert model.head is not None
    mask = model.head.targets["it"].kind == "mask"
    found = []
    for mirrored in (False, True) if flip else (False,):
        for view in views:
            image = view.flip(-1) if mirrored else view
            scores = _slid(model, image, window, stride)
            scores = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
            scores = scores.flip(-1) if mirrored else scores
            found.append(scores.softmax(0) if mask else scores)
    return torch.stack(found).mean(0)


@torch.no_grad()
def _slid(model: Model, image: Tensor, window: int | None, stride: int) -> Tensor:
    height, width = image.shape[1:]
    tall, wide = (height, width) if window is None else (min(window, height), min(window, width))
    total: Tensor | None = None
    count = torch.zeros(height, width, dtype=torch.float64)
    for y in range(math.ceil((height - tall) / stride) + 1):
        for x in range(math.ceil((width - wide) / stride) + 1):
            top, left = min(y * stride, height - tall), min(x * stride, width - wide)
            crop = image[:, top : top + tall, left : left + wide]
            whole = [-(-side // PATCH) * PATCH for side in crop.shape[1:]]
            padded = torch.zeros(3, *whole)
            padded[:, :tall, :wide] = crop
            head: Any = model.head
            features = head_features(model.backbone, padded[None], head.needs)
            scores = F.interpolate(head(features).double(), tuple(whole), mode="bilinear")
            scores = scores[0, :, :tall, :wide]
            if total is None:
                total = torch.zeros(len(scores), height, width, dtype=torch.float64)
            total[:, top : top + tall, left : left + wide] += scores
            count[top : top + tall, left : left + wide] += 1
    assert total is not None
    assert count.min() > 0
    return total / count
