"""What an observer sees of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from dinov3_ssl.networks import Networks
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.data.loader import BatchMaker, Layout
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.weights.loading import load_backbone


@frozen
class TrainingRun:
    """Implements ``contracts.Run``."""

    output_dir: Path
    images: ImagesConfig
    total_iterations: int
    device: torch.device
    registry: Registry
    networks: Networks
    maker: BatchMaker
    initial: Path | None = None  # the file of the first backbone, where it was not drawn

    @property
    def is_main(self) -> bool:
        return collectives.is_main()

    @property
    def patch_size(self) -> int:
        return self.networks.blueprint.backbone.patch_size

    def build(self, config: Any, **runtime: Any) -> Any:
        return self.registry.build(config, **runtime)

    def teacher_backbone(self) -> Backbone:
        return self.networks.teacher["backbone"]  # type: ignore[return-value]

    def initial_backbone(self) -> Backbone:
        if self.initial is None:
            return self.networks.initial_backbone().to(self.device)
        loaded = load_backbone(self.initial, device=self.device, registry=self.registry)
        return loaded.backbone.requires_grad_(False)

    def sample_batch(self, count: int) -> Mapping[str, Tensor]:
        layout = Layout(world_size=1, rank=0, accumulation_steps=1, batch_size=count)
        maker = BatchMaker(
            self.maker.dataset, self.maker.augmentation, layout, self.maker.seed, workers=0
        )
        batch = maker[0, 0]
        crops = dict(batch.crops)
        if batch.masks is not None:
            crops["masks"] = batch.masks
        return crops
