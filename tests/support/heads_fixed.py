"""A head that says the same of every image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3_framework import FeatureNeeds, Head, HeadFeatures, LossResult, Target


class FixedHead(Head):
    """Class 1 of four."""

    needs = FeatureNeeds(class_token=True)
    targets: Mapping[str, Target]

    def __init__(self) -> None:
        super().__init__()
        self.targets = {"label": Target("class", classes=("a", "b", "c", "d"))}

    def init_weights(self) -> None:
        pass

    def forward(self, features: HeadFeatures) -> Tensor:
        return torch.tensor([0.1, 0.6, 0.2, 0.1]).expand(len(features.cls[0]), 4)

    def loss(self, outputs: Any, targets: Mapping[str, Any]) -> LossResult:
        raise NotImplementedError

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Mapping[str, Tensor]:
        return {"label": outputs}
