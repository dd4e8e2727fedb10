"""What heads have in common that classify masks: their target, their loss, their prediction.

The letters in shapes: B images, Q queries, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_framework.contracts.data import Target, choose_target
from dinov3_framework.contracts.networks import Head, LossResult
from dinov3_framework.data.bilinear import bilinear_rows
from dinov3_framework.errors import UserError
from dinov3_segment.configs_masks import MaskClassificationConfig
from dinov3_segment.criterion import MaskCriterion


class MaskHead(Head):
    """Puts out Q masks of an image and the class of each, as ``MaskCriterion`` takes them."""

    predicts_rows = True

    def __init__(self, config: MaskClassificationConfig, targets: Mapping[str, Target]) -> None:
        super().__init__()
        target = choose_target(targets, config.target, "mask")
        if target.count is None:
            raise UserError(f"how many classes the target {config.target!r} has is not known")
        self.config, self.classes, self.targets = config, target.count, {config.target: target}
        self.ignore_index = target.ignore_index
        self._criterion = MaskCriterion(config)

    def loss(self, outputs: Mapping[str, Any], targets: Mapping[str, Any]) -> LossResult:
        return self._criterion(outputs, targets[self.config.target], self.ignore_index)

    def predict(self, outputs: Mapping[str, Any], size: tuple[int, int]) -> Mapping[str, Tensor]:
        """Scores [B, K, H, W] from 0; those of a pixel sum to what queries claim it, not to 1."""
        return {self.config.target: class_scores(outputs, size)}

    def predict_rows(
        self, outputs: Mapping[str, Any], size: tuple[int, int], start: int, stop: int
    ) -> Mapping[str, Tensor]:
        masks = bilinear_rows(outputs["pred_masks"], size, start, stop)
        return {self.config.target: _claimed(outputs["pred_logits"], masks)}


def class_scores(outputs: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
    """Scores [B, K, H, W] of classes: of each query the class's probability times the mask's.

    Masks are resized before the sigmoid. The probability of the class "nothing" is left out.
    """
    masks = F.interpolate(outputs["pred_masks"].float(), size, mode="bilinear")
    return _claimed(outputs["pred_logits"], masks)


def _claimed(logits: Tensor, masks: Tensor) -> Tensor:
    chances = logits.float().softmax(-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", chances, masks.sigmoid())
