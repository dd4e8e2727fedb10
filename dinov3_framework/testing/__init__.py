"""Checks that a component keeps the promises of its contract, for any plugin's tests to call.

Each takes a config, builds the component as the engine would and tries it out on small random
input; what it does not promise (whether a loss teaches anything, say) is left to the plugin's own
tests. The component comes from ``registry`` (left out, the installed plugins) or from ``factory``,
called with the config and the runtime arguments of its hook.

>>> def test_contract() -> None:
...     check_loss(SpreadConfig(target=2.0))

A broken promise raises :class:`ContractError`, whose message says which.
"""

from __future__ import annotations

from dinov3_framework.testing.augmentations import check_augmentation
from dinov3_framework.testing.backbones import check_backbone
from dinov3_framework.testing.datasets import check_dataset
from dinov3_framework.testing.launchers import check_launcher
from dinov3_framework.testing.losses import check_loss
from dinov3_framework.testing.modules import check_head
from dinov3_framework.testing.observers import check_observer
from dinov3_framework.testing.subject import ContractError
from dinov3_framework.testing.tasks import check_task

__all__ = [
    "ContractError",
    "check_augmentation",
    "check_backbone",
    "check_dataset",
    "check_head",
    "check_launcher",
    "check_loss",
    "check_observer",
    "check_task",
]
