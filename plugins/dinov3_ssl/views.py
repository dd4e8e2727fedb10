"""What networks say of crops, in the shapes that losses get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_framework.contracts.losses import ViewFeatures


def features_of(backbone: Any, crops: Tensor) -> ViewFeatures:
    """The features of normalized crops [G, B, C, H, W], in one pass."""
    return unflattened(backbone.forward_features(crops.flatten(0, 1)), crops, backbone.patch_size)


def unflattened(output: Mapping[str, Tensor], crops: Tensor, patch_size: int) -> ViewFeatures:
    """A backbone's output for crops [G, B, C, H, W] that were flattened to [G * B, C, H, W]."""
    sizes = crops.shape[:2]
    height, width = crops.shape[-2:]
    return ViewFeatures(
        cls=output["x_norm_clstoken"].unflatten(0, sizes),
        storage=output["x_storage_tokens"].unflatten(0, sizes),
        patches=output["x_norm_patchtokens"].unflatten(0, sizes),
        grid=(height // patch_size, width // patch_size),
    )


@torch.no_grad()
def on_grid(features: ViewFeatures, grid: tuple[int, int]) -> ViewFeatures:
    """The same with patches on another grid, by bilinear interpolation with low-pass filtering."""
    if features.grid == grid:
        return features
    crops, samples, _, dim = features.patches.shape
    maps = features.patches.float().mT.reshape(crops * samples, dim, *features.grid)
    resized = F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
    patches = resized.to(features.patches.dtype).view(crops, samples, dim, -1).mT
    return attrs.evolve(features, patches=patches, grid=grid)
