"""Batches of crops and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from dinov3_framework.contracts.data import Augmentation, Dataset, Sample, StreamDataset
from dinov3_framework.data.loader import BatchMaker, Layout
from dinov3_framework.randomness import keyed_rng


@frozen
class CropBatch:
    """What one process sees in one micro-batch."""

    crops: Mapping[str, Tensor]  # view -> [crops, images, C, size, size]
    masks: Tensor | None  # bool [crops, images, P], of the global crops
    corrupt: tuple[str, ...] = ()  # what could not be decoded and was substituted
    masked: Tensor | None = None  # int64 [masked patches]: their places in masks, flattened

    def to(self, device: torch.device) -> CropBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> CropBatch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> CropBatch:
        return evolve(
            self,
            crops={name: change(crops) for name, crops in self.crops.items()},
            masks=None if self.masks is None else change(self.masks),
            masked=None if self.masked is None else change(self.masked),
        )


class CropBatches(BatchMaker[Mapping[str, Tensor], CropBatch]):
    """Makes crops and masks, by the augmentation's variant for the step."""

    def __init__(
        self,
        dataset: Dataset | StreamDataset,
        augmentation: Augmentation,
        layout: Layout,
        seed: int,
        workers: int,
        masks_of: Layout | None = None,
    ) -> None:
        """``masks_of`` says whose masks are made, if not those of the images of ``layout``."""
        super().__init__(dataset, layout, seed, workers)
        self.augmentation, self.masks_of = augmentation, masks_of or layout

    def prepare(self, sample: Sample, place: int, step: int) -> Mapping[str, Tensor]:
        # One variant for the step: crops of all micro-batches and processes have the same sizes.
        augmentation = self.augmentation.at(self.seed, step)
        return augmentation(sample.image, keyed_rng(self.seed, "crops", place))

    def collate(
        self,
        items: Sequence[Mapping[str, Tensor]],
        step: int,
        micro: int,
        corrupt: tuple[str, ...],
    ) -> CropBatch:
        augmentation = self.augmentation.at(self.seed, step)
        crops = {
            view: torch.stack([item[view] for item in items], dim=1) for view in augmentation.views
        }
        masks = self._masks(augmentation, step, self.masks_of.places(step, micro))
        masked = None if masks is None else masks.flatten().nonzero().squeeze(1)
        return CropBatch(crops, masks, corrupt, masked)

    def describe_item(self) -> str:
        return ", ".join(f"{v.crops} x {v.size} px" for v in self.augmentation.views.values())

    def first_samples(self, count: int) -> Mapping[str, Tensor]:
        layout = Layout(world_size=1, rank=0, accumulation_steps=1, batch_size=count)
        maker = CropBatches(self.dataset, self.augmentation, layout, self.seed, workers=0)
        batch = maker[0, 0]
        return {**batch.crops, **({} if batch.masks is None else {"masks": batch.masks})}

    def _masks(self, augmentation: Augmentation, step: int, places: range) -> Tensor | None:
        if not augmentation.makes_masks:
            return None
        crops, size = augmentation.views["global"].crops, self.layout.batch_size
        first = places.start - step * size
        rows = [crop * size + first + i for crop in range(crops) for i in range(len(places))]
        masks = augmentation.masks(rows=rows, total=crops * size, seed=self.seed, step=step)
        unflat: Tensor = masks.unflatten(0, (crops, len(places)))
        return unflat
