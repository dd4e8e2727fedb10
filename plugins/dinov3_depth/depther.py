"""A backbone with a depth head on it, as one module."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_depth.bins import depth_of_scores
from dinov3_depth.depth_head import DepthHead
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.tokens import head_features


class Depther(nn.Module):
    """Normalized images [B, C, H, W] to depth [B, 1, h, w].

    Sides that are no multiples of the patch size are padded evenly on both sides with the mean
    color; h and w are those of the padded image, for a DPT head on patches of 16 pixels.
    """

    def __init__(self, backbone: Backbone, head: DepthHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        patch = self.backbone.patch_size
        bottom, right = (-side % patch for side in images.shape[-2:])
        around = (right // 2, right - right // 2, bottom // 2, bottom - bottom // 2)
        features = head_features(self.backbone, F.pad(images, around), self.head.needs)
        return depth_of_scores(self.head.config, self.head(features))[:, None]
