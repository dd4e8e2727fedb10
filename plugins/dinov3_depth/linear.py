"""Depth by one linear layer on patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_depth.configs_heads import LinearDepthConfig
from dinov3_depth.depth_head import DepthHead
from dinov3_framework.contracts.data import Target
from dinov3_framework.contracts.networks import FeatureInfo, FeatureNeeds, HeadFeatures
from dinov3_framework.parallel.batch_norm import GlobalBatchNorm2d


class LinearDepth(DepthHead):
    """Scores of bins at the first layer's resolution; other layers are resized to it."""

    config: LinearDepthConfig

    def __init__(
        self,
        config: LinearDepthConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__(config, targets)
        width = sum(features[layer].channels for layer in config.layers)
        width *= 2 if config.class_token else 1
        self.needs = FeatureNeeds(
            layers=tuple(config.layers), class_token=config.class_token, norm=config.norm
        )
        self.batchnorm_layer = GlobalBatchNorm2d(width) if config.batch_norm else nn.Identity()
        self.conv_depth = nn.Conv2d(width, config.bins, 1)

    def init_weights(self) -> None:
        if isinstance(self.batchnorm_layer, GlobalBatchNorm2d):
            self.batchnorm_layer.reset_parameters()
        nn.init.normal_(self.conv_depth.weight, std=0.01)
        nn.init.zeros_(self.conv_depth.bias)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return True  # all of them, as published

    def forward(self, features: HeadFeatures) -> Tensor:
        grids = list(features.maps)
        if self.config.class_token:
            pairs = zip(grids, features.cls, strict=True)
            grids = [
                torch.cat([grid, cls[:, :, None, None].expand_as(grid)], 1) for grid, cls in pairs
            ]
        size = grids[0].shape[-2:]
        grids = [
            grid if grid.shape[-2:] == size else F.interpolate(grid, size, mode="bilinear")
            for grid in grids
        ]
        patches = torch.cat(grids, 1).to(self.conv_depth.weight.dtype)
        return self.conv_depth(self.batchnorm_layer(patches))  # type: ignore[no-any-return]
