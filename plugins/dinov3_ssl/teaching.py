"""Whom a student learns from: its own moving average, or a frozen teacher."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import torch
from attrs import frozen
from torch import Tensor, nn

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.losses import ViewFeatures
from dinov3_framework.data.images import normalize
from dinov3_ssl.batches import CropBatch
from dinov3_ssl.views import features_of


class Teaching(Protocol):
    """Turns a batch into what the teacher says of it."""

    def __call__(
        self, batch: CropBatch, outputs: Collection[str]
    ) -> tuple[CropBatch, dict[str, ViewFeatures]]:
        """The batch that the student is to see, and the teacher's features of it, by view.

        ``outputs`` are those that losses read: ``class``, ``storage``, ``patches``; without any the
        teacher need not run.
        """
        ...

    @property
    def networks(self) -> nn.ModuleDict:
        """The projectors, among others, by name."""
        ...


@frozen
class OwnTeaching:
    """One teacher on this run's processes, which sees the crops that the student sees.

    Where the augmentation makes a ``teacher`` view, that is its version of the global crops.
    """

    networks: nn.ModuleDict  # backbone, dino_head ...
    images: ImagesConfig

    def __call__(
        self, batch: CropBatch, outputs: Collection[str]
    ) -> tuple[CropBatch, dict[str, ViewFeatures]]:
        return batch, look(self.networks["backbone"], batch, self.images, outputs)


@torch.no_grad()
def look(
    backbone: Any, batch: CropBatch, images: ImagesConfig, outputs: Collection[str]
) -> dict[str, ViewFeatures]:
    """What a teacher says of the global crops, or of its own version of them."""
    if not outputs:
        return {}
    crops: Tensor = batch.crops.get("teacher", batch.crops["global"])
    return {"global": features_of(backbone, normalize(crops, images))}
