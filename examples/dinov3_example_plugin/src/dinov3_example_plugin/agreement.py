"""Accuracy of predicted classes, mean IoU of predicted masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dinov3_example_plugin import AgreementConfig
from dinov3_framework import Evaluation, ImagesConfig, Model, Problem, Target, UserError
from dinov3_framework.data.predictions import predictions
from dinov3_framework.runtime import collectives


class Agreement(Evaluation):
    """Counts pairs of true and predicted class over all processes."""

    def __init__(self, config: AgreementConfig) -> None:
        self.config = config

    def prepare(self, build: Callable[..., Any], images: ImagesConfig) -> None:
        config = self.config
        self.dataset = build(config.dataset, channels=images.channels)
        self.transform = build(config.transform, images=images, targets=self.dataset.targets)
        known = self.dataset.targets.get(config.target)
        if known is None or known.kind not in ("class", "mask") or known.count is None:
            raise UserError(f"the data have no class or mask {config.target!r} to compare with")
        self.target: Target = known

    def problems(self, model: Model) -> list[Problem]:
        if model.head is None:
            return [Problem("", "there is no head that predicts anything")]
        if self.config.target not in model.head.targets:
            return [Problem("target", f"the head does not predict {self.config.target!r}")]
        return []

    def run(self, model: Model) -> Mapping[str, float]:
        name, count = self.config.target, self.target.count or 0
        pairs = torch.zeros(count, count, dtype=torch.int64)  # [true, predicted]
        batches = predictions(
            model, self.dataset, self.transform, batch_size=self.config.batch_size
        )
        for predicted, targets in batches:
            true, ids = targets[name].flatten().long(), predicted[name].argmax(1).flatten()
            counted = true != (-1 if self.target.ignore_index is None else self.target.ignore_index)
            places = (true * count + ids)[counted]
            pairs += torch.bincount(places, minlength=count**2).cpu().view(count, count)
        pairs = collectives.all_reduce_sum(pairs.to(next(model.backbone.parameters()).device))
        right, true, said = (n.double() for n in (pairs.diag(), pairs.sum(1), pairs.sum(0)))
        if self.target.kind == "class":
            return {"accuracy": float(100 * right.sum() / true.sum())}
        iou = right / (true + said - right)
        return {"miou": float(100 * iou[~iou.isnan()].mean())}

    def protocol(self, model: Model) -> Mapping[str, Any]:
        return {"target": self.config.target, "size": self.transform.size}

    def data(self) -> str:
        return self.dataset.describe()
