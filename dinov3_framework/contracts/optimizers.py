"""Optimizers: how parameters change by their gradients."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class OptimizerFactory(abc.ABC):
    """Makes an optimizer of torch's interface, and knows the state that it keeps.

    Learning rates and weight decays of groups are set anew before each step.
    """

    @abc.abstractmethod
    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of parameter groups, dicts with ``params`` as torch takes them."""

    @abc.abstractmethod
    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimizer keeps of a parameter, as it is before the first step.

        It is there from the start, so that a checkpoint is loaded in place.
        """
