"""Optimizers that each break one promise, and the words by which the suite says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_framework import OptimizerConfig, OptimizerFactory, config


@config
class ToyOptimizerConfig(OptimizerConfig):
    """Config of the optimizers below."""


class SoundOptimizer(OptimizerFactory):
    def __init__(self, config: ToyOptimizerConfig) -> None:
        pass

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(list(groups))

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


class NoState(SoundOptimizer):
    """torch makes its own where the first step finds none."""

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {}


class FromOnes(SoundOptimizer):
    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return super().initial_state(parameter) | {"exp_avg": torch.ones_like(parameter)}


class OneGroup(SoundOptimizer):
    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam([each for group in groups for each in group["params"]])


class OwnRate(SoundOptimizer):
    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        class Stubborn(torch.optim.Adam):
            def step(self, closure: Any = None) -> Any:
                for group in self.param_groups:
                    group["lr"] = 1e-3
                return super().step(closure)

        return Stubborn(list(groups))


class RealMemory(SoundOptimizer):
    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return super().initial_state(parameter) | {"step": torch.zeros(())}


OPTIMIZERS: dict[str, tuple[Callable[..., Any], str]] = {
    "no state": (NoState, "test_state_is_complete: keeps .*exp_avg"),
    "from ones": (FromOnes, "test_first_steps"),
    "one group": (OneGroup, "must give an optimizer of two"),
    "own rate": (OwnRate, "learning rate 0 must stay"),
    "real memory": (RealMemory, "test_meta_device: .* takes memory for step"),
}
