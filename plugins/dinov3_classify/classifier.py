"""A backbone with a classifier on it, as one module."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone, Head
from dinov3_framework.data.tokens import head_features


class Classifier(nn.Module):
    """Normalized images [B, C, H, W] to logits [B, classes]."""

    def __init__(self, backbone: Backbone, linear_head: Head) -> None:
        super().__init__()
        self.backbone, self.linear_head = backbone, linear_head

    def forward(self, images: Tensor) -> Tensor:
        features = head_features(self.backbone, images, self.linear_head.needs)
        return cast(Tensor, self.linear_head(features))
