"""Batches of fitted images for feature extraction, read by loader workers.

Whatever is wrong with an image is said in the batch and raised by nobody: an exception of a
worker would arrive wrapped in pages of traceback.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Sequence

import torch
from attrs import frozen
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dinov3_features.parts import Row, Skipped
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.data.fit import ImageFit
from dinov3_framework.errors import CorruptSampleError, DataError

_TIMEOUT = 600.0  # seconds that a loader worker may take for one batch


@frozen
class ReadImage:
    """One image as the backbone will see it."""

    pixels: Tensor  # uint8 [C, H, W]
    row: Row


@frozen
class ReadBatch:
    """Images that follow each other in the dataset, without those that cannot be read."""

    pixels: Tensor  # uint8 [n]: of all images, one after the other
    shapes: Sequence[torch.Size]  # [C, H, W] of each
    rows: Sequence[Row]
    skipped: Sequence[Skipped]
    misfit: str | None  # of the first image that does not fit the backbone, if any

    def by_shape(self) -> list[tuple[list[int], Tensor]]:
        """(places in ``rows``, uint8 [n, C, H, W]) for each shape, in order of appearance."""
        images = self.pixels.split([math.prod(shape) for shape in self.shapes])
        places: dict[torch.Size, list[int]] = {}
        for place, shape in enumerate(self.shapes):
            places.setdefault(shape, []).append(place)
        return [
            (found, torch.stack([images[place].view(shape) for place in found]))
            for shape, found in places.items()
        ]


class FittedImages(TorchDataset["ReadImage | Skipped | str"]):
    """A dataset's images, fitted; a string is why one does not fit."""

    def __init__(self, dataset: Dataset, fit: ImageFit) -> None:
        self.dataset, self.fit = dataset, fit

    def __getitem__(self, index: int) -> ReadImage | Skipped | str:
        name = self.dataset.name(index)
        try:
            sample = self.dataset[index]
        except CorruptSampleError as error:
            return Skipped(index, name, error.reason)
        channels, height, width = sample.image.shape
        if channels != self.fit.images.channels:
            wanted = self.fit.images.channels
            return f"{name} has {channels} channels, the backbone takes {wanted}"
        try:
            pixels = self.fit(sample.image)
        except DataError as error:
            return f"{name}: {error}"
        patch = self.fit.patch_size
        grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
        label = None if sample.label is None else int(sample.label)
        return ReadImage(pixels, Row(index, name, label, height, width, *grid))


def _collate(items: Sequence[ReadImage | Skipped | str]) -> ReadBatch:
    images = [item for item in items if isinstance(item, ReadImage)]
    flat = [image.pixels.flatten() for image in images]
    return ReadBatch(
        # One tensor, since each costs a file descriptor on its way from a worker.
        pixels=torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8),
        shapes=[image.pixels.shape for image in images],
        rows=[image.row for image in images],
        skipped=[item for item in items if isinstance(item, Skipped)],
        misfit=next((item for item in items if isinstance(item, str)), None),
    )


def batches(
    dataset: Dataset, fit: ImageFit, indices: Iterable[Sequence[int]], workers: int
) -> DataLoader[ReadBatch]:
    """A loader of the batches with these indices."""
    return DataLoader(
        FittedImages(dataset, fit),  # type: ignore[arg-type]
        batch_sampler=[list(each) for each in indices],
        num_workers=workers,
        collate_fn=_collate,
        timeout=_TIMEOUT if workers else 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    # Ctrl-C and schedulers signal the whole group; the process that reads decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
