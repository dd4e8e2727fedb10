"""The linear head: the class of each pixel from the patch tokens.

The letters in shapes: B images, C classes, D channels, h and w patches, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework.contracts.data import Target, choose_target
from dinov3_framework.contracts.networks import (
    FeatureInfo,
    FeatureNeeds,
    Head,
    HeadFeatures,
    LossResult,
)
from dinov3_framework.data.bilinear import bilinear_rows
from dinov3_framework.data.tokens import layers_complaint
from dinov3_framework.errors import UserError
from dinov3_framework.parallel.batch_norm import GlobalBatchNorm2d
from dinov3_segment.configs_linear import LinearSegmentationConfig
from dinov3_segment.pixel_losses import dice_loss, pixel_cross_entropy

_STD = 0.01  # of the first weights, as published


class LinearSegmentation(Head):
    """Tokens of some layers to logits [B, C, h, w], under the official names."""

    predicts_rows = True

    def __init__(
        self,
        config: LinearSegmentationConfig,
        *,
        features: Sequence[FeatureInfo],
        targets: Mapping[str, Target],
    ) -> None:
        super().__init__()
        target = choose_target(targets, config.target, "mask")
        if target.count is None:
            raise UserError(f"how many classes the target {config.target!r} has is not known")
        if complaint := layers_complaint(config.layers, len(features)):
            raise UserError(complaint)
        self.config, self.targets = config, {config.target: target}
        self.needs = FeatureNeeds(
            layers=config.layers, class_token=config.class_token, norm=config.norm
        )
        width = sum(features[layer].channels for layer in config.layers)
        width *= 2 if config.class_token else 1
        self.batchnorm_layer = GlobalBatchNorm2d(width) if config.batchnorm else nn.Identity()
        self.conv = nn.Conv2d(width, target.count, 1)
        self.dropout = nn.Dropout2d(config.dropout)
        self.init_weights()  # for whoever builds one without the trainer, as torch.hub does

    @torch.no_grad()
    def init_weights(self) -> None:
        if isinstance(self.batchnorm_layer, nn.BatchNorm2d):
            self.batchnorm_layer.reset_parameters()
        nn.init.normal_(self.conv.weight, std=_STD)
        nn.init.zeros_(self.conv.bias)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """All of them, as in the published training."""
        return True

    def forward(self, features: HeadFeatures) -> Tensor:
        grids = list(features.maps)
        if self.config.class_token:
            pairs = zip(grids, features.cls, strict=True)
            grids = [torch.cat([grid, _spread(cls, grid)], dim=1) for grid, cls in pairs]
        size = grids[0].shape[2:]
        alike = [grids[0], *(_resized(grid, size) for grid in grids[1:])]
        given = torch.cat(alike, dim=1).to(self.conv.weight.dtype)
        logits: Tensor = self.conv(self.batchnorm_layer(self.dropout(given)))
        return logits

    def loss(self, outputs: Tensor, targets: Mapping[str, Any]) -> LossResult:
        config, mask = self.config, targets[self.config.target].long()
        ignored = self.targets[config.target].ignore_index
        logits = _resized(outputs.float(), mask.shape[-2:])
        loss, metrics = logits.new_zeros(()), {}
        if config.ce_weight:
            ce = pixel_cross_entropy(logits, mask, ignored)
            loss, metrics["ce"] = loss + config.ce_weight * ce, ce.detach()
        if config.dice_weight:
            dice = dice_loss(logits, mask, ignored)
            loss, metrics["dice"] = loss + config.dice_weight * dice, dice.detach()
        known = torch.ones_like(mask, dtype=torch.bool) if ignored is None else mask != ignored
        right = (logits.detach().argmax(1) == mask) & known
        metrics["pixel_accuracy"] = right.sum() / known.sum().clamp(min=1)
        return LossResult(loss, metrics)

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        return {self.config.target: _resized(outputs.float(), size)}

    def predict_rows(
        self, outputs: Tensor, size: tuple[int, int], start: int, stop: int
    ) -> Mapping[str, Tensor]:
        return {self.config.target: bilinear_rows(outputs, size, start, stop)}


def _spread(cls: Tensor, grid: Tensor) -> Tensor:
    """Class tokens [B, D] beside each patch of a grid [B, D, h, w]."""
    return cls[:, :, None, None].expand_as(grid)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
