"""A dataset of numbers, and batches of it to compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from dinov3_ssl.batches import CropBatch, CropBatches

from dinov3_framework import CorruptSampleError, Dataset, Sample
from dinov3_framework.data import LoaderConfig
from dinov3_framework.data.loader import Layout, TrainingLoader

BATCH = 12
ONE = Layout(world_size=1, rank=0, accumulation_steps=1, batch_size=BATCH)


class Numbers(Dataset):
    """Image i is filled with i; some are corrupt."""

    def __init__(self, size: int = 40, corrupt: Any = ()) -> None:
        self.size, self.corrupt = size, corrupt

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index in self.corrupt:
            raise CorruptSampleError(f"image {index}", "broken on purpose")
        return Sample(torch.full((1, 4, 4), index, dtype=torch.uint8))


def loader(
    made: CropBatches, start: int = 0, stop: int = 5, **options: Any
) -> tuple[TrainingLoader[CropBatch], Iterator[CropBatch]]:
    loader = TrainingLoader(made, LoaderConfig(**{"workers": 0} | options), start, stop, False)
    return loader, iter(loader)


def assert_same(one: CropBatch, other: CropBatch) -> None:
    assert one.corrupt == other.corrupt
    assert one.crops.keys() == other.crops.keys()
    for view, crops in one.crops.items():
        assert torch.equal(crops, other.crops[view])
    assert one.masks is not None
    assert other.masks is not None
    assert torch.equal(one.masks, other.masks)
