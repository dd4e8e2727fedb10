"""Linear heads: of the class token, and of each patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_example_plugin import LinearClassConfig, LinearMaskConfig
from dinov3_framework import (
    FeatureInfo,
    FeatureNeeds,
    Head,
    HeadFeatures,
    LossResult,
    Target,
    UserError,
    choose_target,
)


class _Linear(Head):
    """What both have in common: one linear layer to the classes of one target."""

    def __init__(self, target: Target, name: str, channels: int) -> None:
        super().__init__()
        if target.count is None:
            raise UserError(f"how many classes the target {name!r} has is not known")
        self.target, self.targets = name, {name: target}
        self.linear = nn.Linear(channels, target.count)

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)


class LinearClass(_Linear):
    """Class tokens [B, D] to logits [B, classes]."""

    needs = FeatureNeeds(class_token=True)

    def __init__(
        self,
        config: LinearClassConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        target = choose_target(targets, config.target, "class")
        super().__init__(target, config.target, features[-1].channels)

    def forward(self, features: HeadFeatures) -> Tensor:
        logits: Tensor = self.linear(features.cls[0])
        return logits

    def loss(self, outputs: Tensor, targets: Mapping[str, Any]) -> LossResult:
        wanted = targets[self.target]
        right = (outputs.argmax(1) == wanted).float().mean()
        return LossResult(F.cross_entropy(outputs.float(), wanted), {"accuracy": right})

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        return {self.target: outputs.float().softmax(1)}


class LinearMask(_Linear):
    """Patches [B, D, h, w] to logits [B, classes, h, w], which are enlarged to the image."""

    def __init__(
        self,
        config: LinearMaskConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        target = choose_target(targets, config.target, "mask")
        if not -len(features) <= config.layer < len(features):
            raise UserError(f"layer = {config.layer}: the backbone has {len(features)} layers")
        super().__init__(target, config.target, features[config.layer].channels)
        self.needs = FeatureNeeds(layers=(config.layer,))
        self.ignore = -100 if target.ignore_index is None else target.ignore_index

    def forward(self, features: HeadFeatures) -> Tensor:
        logits: Tensor = self.linear(features.maps[0].movedim(1, -1)).movedim(-1, 1)
        return logits

    def loss(self, outputs: Tensor, targets: Mapping[str, Any]) -> LossResult:
        wanted = targets[self.target].long()
        logits = self._enlarged(outputs, wanted.shape[-2:])
        return LossResult(F.cross_entropy(logits, wanted, ignore_index=self.ignore))

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        return {self.target: self._enlarged(outputs, size).softmax(1)}

    @staticmethod
    def _enlarged(outputs: Tensor, size: Any) -> Tensor:
        return F.interpolate(outputs.float(), size=tuple(size), mode="bilinear")
