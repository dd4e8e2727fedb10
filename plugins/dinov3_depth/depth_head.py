"""What depth heads have in common: their target, their loss, their prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dinov3_depth.bins import depth_of_scores
from dinov3_depth.configs_heads import BinsConfig
from dinov3_depth.losses import depth_loss
from dinov3_framework.contracts.data import Target, choose_target
from dinov3_framework.contracts.networks import Head, LossResult


class DepthHead(Head):
    """Puts out scores of bins [B, K, h, w]."""

    def __init__(self, config: BinsConfig, targets: Mapping[str, Target]) -> None:
        super().__init__()
        self.config = config
        self.targets = {config.target: choose_target(targets, config.target, "map")}

    def loss(self, outputs: Tensor, targets: Mapping[str, Any]) -> LossResult:
        depth = depth_of_scores(self.config, outputs)
        return depth_loss(self.config, depth, targets[self.config.target])

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        """Depth [B, H, W], bilinear between where it was predicted, cut off at the range's ends."""
        depth = depth_of_scores(self.config, outputs)[:, None]
        resized = F.interpolate(depth, size, mode="bilinear", align_corners=False)
        # Bins stay within it by themselves, regression does not.
        within = resized[:, 0].clamp(self.config.min_depth, self.config.max_depth)
        return {self.config.target: within}
