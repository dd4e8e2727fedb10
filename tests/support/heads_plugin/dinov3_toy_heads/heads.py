"""Two small heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_framework import (
    FeatureInfo,
    FeatureNeeds,
    Head,
    HeadFeatures,
    LossResult,
    Target,
    UserError,
)
from dinov3_framework.contracts.data import choose_target
from dinov3_toy_heads import LinearClassifierConfig, LinearSegmentationConfig


class LinearClassifier(Head):
    """Class token and mean patch of each layer, normalized, to scores."""

    def __init__(
        self,
        config: LinearClassifierConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__()
        self.target = config.target
        chosen = choose_target(targets, config.target, "class")
        if chosen.count is None:
            raise UserError(f"the target {config.target!r} does not say how many classes it has")
        self.targets = {config.target: chosen}
        self.needs = FeatureNeeds(layers=config.layers, class_token=True)
        width = 2 * sum(
            features[layer].channels for layer in config.layers if layer < len(features)
        )
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, chosen.count)

    @torch.no_grad()
    def init_weights(self) -> None:
        self.norm.reset_parameters()
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: HeadFeatures) -> Tensor:
        means = [grid.mean((2, 3)) for grid in features.maps]
        scores: Tensor = self.linear(self.norm(torch.cat([*features.cls, *means], dim=1)))
        return scores

    def loss(self, outputs: Tensor, targets: Mapping[str, Any]) -> LossResult:
        labels = targets[self.target]
        right = (outputs.argmax(1) == labels).float().mean()
        return LossResult(F.cross_entropy(outputs.float(), labels), {"train_accuracy": right})

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Any]:
        return {self.target: outputs.float()}


class LinearSegmentation(Head):
    """Batch-normalized patches to scores by pixel."""

    def __init__(
        self,
        config: LinearSegmentationConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__()
        self.target = config.target
        chosen = choose_target(targets, config.target, "mask")
        self.targets = {config.target: chosen}
        self.needs = FeatureNeeds(layers=config.layers)
        width = sum(features[layer].channels for layer in config.layers)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, chosen.count or 0, 1)

    @torch.no_grad()
    def init_weights(self) -> None:
        self.norm.reset_parameters()
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: HeadFeatures) -> Mapping[str, Tensor]:
        grid = torch.cat(list(features.maps), dim=1).movedim(1, -1)
        return {"scores": self.conv(self.norm(grid).movedim(-1, 1))}

    def loss(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Any]) -> LossResult:
        mask = targets[self.target].long()
        scores = self._resized(outputs, (mask.shape[-2], mask.shape[-1]))
        ignored = self.targets[self.target].ignore_index
        loss = F.cross_entropy(scores, mask, ignore_index=-100 if ignored is None else ignored)
        return LossResult(loss)

    def predict(self, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Mapping[str, Any]:
        return {self.target: self._resized(outputs, size)}

    @staticmethod
    def _resized(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        return F.interpolate(outputs["scores"].float(), size, mode="bilinear", align_corners=False)
