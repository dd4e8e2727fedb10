"""Batches as large as real ones, without images."""

from __future__ import annotations

import torch
from attrs import evolve, frozen
from torch import Tensor, empty, int64, uint8
from torch import bool as torch_bool

from dinov3_framework.contracts.data import Augmentation
from dinov3_framework.data.loader import Batch, Layout


@frozen
class Hidden:
    """How many patches the masks of a pass hide."""

    mean: float
    fullest: int  # of the process and pass that has most to do


def hidden_patches(augmentation: Augmentation, layout: Layout, seed: int) -> Hidden | None:
    """Of the processes and passes of the first step; None without masks."""
    if not augmentation.makes_masks:
        return None
    crops, size = augmentation.views["global"].crops, layout.batch_size
    total = crops * size
    masks = augmentation.masks(rows=range(total), total=total, seed=seed, step=0)
    by_image = masks.sum(1).view(crops, size).sum(0)
    shares = [
        evolve(layout, rank=rank).places(0, micro)
        for rank in range(layout.world_size)
        for micro in range(layout.accumulation_steps)
    ]
    by_pass = torch.stack([by_image[places.start : places.stop].sum() for places in shares])
    return Hidden(by_pass.double().mean().item(), int(by_pass.max()))


def pretended_batch(
    augmentation: Augmentation,
    images: int,
    seen: int,
    channels: int,
    patch_size: int,
    hidden: int | None,
) -> Batch:
    """One process's batch of one pass; to be called where tensors have no values.

    Crops are of ``images``, masks of the images that the student has ``seen``.
    """
    crops = {
        name: empty(view.crops, images, channels, view.size, view.size, dtype=uint8)
        for name, view in augmentation.views.items()
    }
    masks: Tensor | None = None
    masked: Tensor | None = None
    if hidden is not None:
        view = augmentation.views["global"]
        patches = (view.size // patch_size) ** 2
        masks = empty(view.crops, seen, patches, dtype=torch_bool)
        masked = empty(hidden, dtype=int64)
    return Batch(crops, masks, (), 0, 0, masked)
