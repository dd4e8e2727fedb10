"""What an observer sees of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.running import Model
from dinov3_framework.contracts.training import TrainUnit
from dinov3_framework.data.loader import BatchMaker
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.training import TrainingConfig


@frozen
class TrainingRun:
    """Implements ``contracts.running.Run``."""

    config: TrainingConfig
    output_dir: Path
    device: torch.device
    registry: Registry
    unit: TrainUnit
    maker: BatchMaker[Any, Any]
    images: ImagesConfig

    @property
    def total_iterations(self) -> int:
        return self.config.iterations

    @property
    def is_main(self) -> bool:
        return collectives.is_main()

    def build(self, config: Any, **runtime: Any) -> Any:
        return self.registry.build(config, **runtime)

    def model(self) -> Model:
        return self.unit.model()

    def initial_model(self) -> Model:
        return self.unit.initial_model()

    def sample_batch(self, count: int) -> Mapping[str, Tensor]:
        return self.maker.first_samples(count)
