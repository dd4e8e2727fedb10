"""torch's optimizers, and the state that they keep of a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework import OptimizerFactory
from dinov3_optimizers import AdamWConfig, SgdConfig


class AdamW(OptimizerFactory):
    """Builds ``torch.optim.AdamW``."""

    def __init__(self, config: AdamWConfig) -> None:
        self.config = config

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        fused = not any(parameter.is_meta for group in groups for parameter in group["params"])
        return torch.optim.AdamW(list(groups), betas=self.config.betas, fused=fused)

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": _zeros(parameter),
            "exp_avg_sq": _zeros(parameter),
        }


class Sgd(OptimizerFactory):
    """Builds ``torch.optim.SGD``."""

    def __init__(self, config: SgdConfig) -> None:
        self.config = config

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        config = self.config
        # lr is set before each step; torch refuses Nesterov without momentum.
        return torch.optim.SGD(
            list(groups), lr=0.0, momentum=config.momentum, nesterov=config.nesterov
        )

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        # Zeros give what torch's first step gives without a buffer: the gradient itself.
        return {"momentum_buffer": _zeros(parameter)} if self.config.momentum else {}


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)
