"""A backbone with a head of masks on it, as one module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.tokens import head_features
from dinov3_segment.mask2former import Mask2Former
from dinov3_segment.mask_head import class_scores


class Segmentor(nn.Module):
    """Normalized images [B, C, H, W] to masks and their classes.

    Outputs are ``pred_logits`` [B, Q, K + 1], the last for nothing, ``pred_masks`` [B, Q, h, w],
    logits, and ``aux_outputs``, the same of earlier layers.
    """

    def __init__(self, backbone: Backbone, head: Mask2Former) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> dict[str, Any]:
        return self.head(head_features(self.backbone, images, self.head.needs))  # type: ignore[no-any-return]

    @torch.no_grad()
    def predict(self, images: Tensor, rescale_to: tuple[int, int] = (512, 512)) -> dict[str, Any]:
        """The outputs with masks at another size, bilinear."""
        outputs = self(images)
        masks = F.interpolate(outputs["pred_masks"], rescale_to, mode="bilinear")
        return {**outputs, "pred_masks": masks}

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Scores [B, K, H, W] of classes at the images' size."""
        return class_scores(self(images), (images.shape[-2], images.shape[-1]))
