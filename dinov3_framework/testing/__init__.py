"""Suites of promises that components keep, for any plugin's tests to subclass.

Each builds the component as the trainer would and tries it out on small random input, a test method
for each promise of its contract; what it does not promise (whether a loss teaches anything, say) is
left to the plugin's own tests.

>>> class TestSpread(LossSuite):
...     config = SpreadConfig(target=2.0)

``LossSuite.check(config)`` tries all promises at once. A broken one raises :class:`ContractError`.
"""

from __future__ import annotations

from dinov3_framework.testing.augmentations import AugmentationSuite
from dinov3_framework.testing.backbones import BackboneSuite
from dinov3_framework.testing.datasets import DatasetSuite, StreamDatasetSuite
from dinov3_framework.testing.evaluations import EvaluationSuite
from dinov3_framework.testing.heads import HeadSuite
from dinov3_framework.testing.launchers import LauncherSuite
from dinov3_framework.testing.losses import LossSuite
from dinov3_framework.testing.observers import ObserverSuite
from dinov3_framework.testing.optimizers import OptimizerSuite
from dinov3_framework.testing.suite import ContractError, NetworkSuite, Suite
from dinov3_framework.testing.tasks import TaskSuite
from dinov3_framework.testing.train_units import TrainUnitSuite
from dinov3_framework.testing.transforms import TransformSuite

__all__ = [
    "AugmentationSuite",
    "BackboneSuite",
    "ContractError",
    "DatasetSuite",
    "EvaluationSuite",
    "HeadSuite",
    "LauncherSuite",
    "LossSuite",
    "NetworkSuite",
    "ObserverSuite",
    "OptimizerSuite",
    "StreamDatasetSuite",
    "Suite",
    "TaskSuite",
    "TrainUnitSuite",
    "TransformSuite",
]
