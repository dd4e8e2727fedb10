"""The train unit of a head on a backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3_framework import (
    Backbone,
    DataError,
    Head,
    HeadFeatures,
    ImagesConfig,
    Model,
    Step,
    StepResult,
    TrainUnit,
)
from dinov3_framework.data.feature_cache import FeatureCache
from dinov3_framework.data.loader import LabeledBatch
from dinov3_framework.data.tokens import head_features
from dinov3_framework.parallel.sharder import state_of, tensors_of
from dinov3_framework.parallel.state_dicts import require_same
from dinov3_heads.reused_batches import FeatureBatch


class HeadUnit(TrainUnit):
    """Trains a head on the features of a backbone, which is frozen unless ``tuned``.

    ``notes`` are what checkpoints keep; ``fingerprint`` is that of a frozen backbone, which no
    checkpoint holds. Batches are of images or of features, for which no backbone is called.
    ``initial`` makes the model as it was before the first iteration. Features that evaluations
    extract of a frozen backbone are kept, in ``feature_cache`` if it is given.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        images: ImagesConfig,
        *,
        size: int | None,
        tuned: bool,
        weights: str,
        fingerprint: float | None,
        notes: Mapping[str, Any],
        initial: Callable[[], tuple[Backbone, Head]],
        feature_cache: Path | None = None,
    ) -> None:
        self.backbone, self.head, self.tuned = backbone, head, tuned
        self.networks = {"head": head, "backbone": backbone} if tuned else {"head": head}
        self.images, self.size = images, size
        self._weights, self._fingerprint = weights, fingerprint
        self._notes, self._initial = notes, initial
        # A frozen backbone sees the same in the same images all along.
        self._cache = None if tuned else FeatureCache(feature_cache)

    def before_step(self, step: Step) -> None:
        for network in self.networks.values():
            network.train()  # an evaluation left them in eval mode
        self.head.before_step(step.iteration, step.total)

    def forward(self, batch: LabeledBatch | FeatureBatch, step: Step) -> StepResult:
        if isinstance(batch, FeatureBatch):
            features, targets = batch.as_computed(), batch.targets
        else:
            features, targets = self._features(batch, step), batch.samples.targets
        with step.phase("head"):
            result = self.head.loss(self.head(features), targets)
        return StepResult(result.loss, {"head": result.loss.detach()}, result.metrics)

    def _features(self, batch: LabeledBatch, step: Step) -> HeadFeatures:
        images = batch.samples.images
        if not isinstance(images, Tensor):
            raise DataError(
                "images of a batch differ in size; let the transform crop or pad them to one"
            )
        with step.phase("backbone"), torch.set_grad_enabled(self.tuned):
            return head_features(self.backbone, images, self.head.needs)

    # ------------------------------------------------------------------ state
    def state(self) -> dict[str, Tensor]:
        return state_of(self.networks)

    def notes(self) -> Mapping[str, Any]:
        frozen = {} if self._fingerprint is None else {"frozen_backbone": self._fingerprint}
        return {**self._notes, **frozen}

    def accept(self, notes: Mapping[str, Any]) -> None:
        before = notes.get("frozen_backbone")
        if before is not None and self._fingerprint is not None:
            require_same(before, self._fingerprint, self._weights, "backbone")

    # ------------------------------------------------------------------ what is evaluated
    def model(self) -> Model:
        return self._model(self.backbone, self.head, "trained head")

    def initial_model(self) -> Model:
        return self._model(*self._initial(), "head before training")

    def _model(self, backbone: Backbone, head: Head, name: str) -> Model:
        return Model(
            backbone.eval(),
            self.images,
            head=head.eval(),
            size=self.size,
            name=name,
            cache=self._cache,
        )

    # ------------------------------------------------------------------ estimates
    def memory_roles(self) -> Mapping[str, Iterable[Tensor]]:
        roles = dict(super().memory_roles())
        if not self.tuned:
            roles["frozen"] = [tensor for _, tensor in tensors_of(self.backbone)]
        return roles

    def memory_hints(self) -> list[str]:
        return ["smaller images"]
