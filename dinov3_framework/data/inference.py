"""Walk a dataset once, in order: for features, evaluations, and whatever looks at every sample.

The caller says which indices make a batch; loader workers read them ahead. What is wrong with a
sample is reported in its batch and raised by nobody, so that one process does not leave while the
others wait for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from dinov3_framework.contracts.data import Dataset, Sample
from dinov3_framework.data.images import ImageFit
from dinov3_framework.data.workers import ReadingLog, WorkerLoader
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.runtime import collectives

Item = TypeVar("Item")
Data = TypeVar("Data")

_SECONDS_BETWEEN_LINES = 10.0
_TIMEOUT = 600.0  # seconds that a loader worker may take for one batch


@frozen
class InferenceBatch(Generic[Data]):
    """What became of the samples of one batch."""

    indices: Sequence[int]  # those asked for; from the dataset's length on they are padding
    places: Sequence[int]  # where in ``indices`` the samples of ``data`` stand, in order
    data: Data | None  # None where no sample could be used
    corrupt: Mapping[int, CorruptSampleError]  # by index
    refused: Mapping[int, DataError]  # by index: what ``prepare`` complained of


class InferenceLoader(Generic[Item, Data]):
    """Iterates over the given batches of indices, each a :class:`InferenceBatch`.

    ``prepare(sample, index)`` makes an item of a sample, in a worker; a ``DataError`` of it refuses
    the sample. ``collate(items)`` makes the data of a batch of the items that there are, at least
    one. Indices from the dataset's length on are places without a sample: nothing is read for
    them, so that padding is never counted.
    """

    def __init__(
        self,
        dataset: Dataset,
        prepare: Callable[[Sample, int], Item],
        batches: Iterable[Sequence[int]],
        *,
        collate: Callable[[Sequence[Item]], Data],
        workers: int = 0,
        timeout: float = _TIMEOUT,
    ) -> None:
        self.dataset, self.prepare, self.collate = dataset, prepare, collate
        self.reading = ReadingLog(workers)
        self._loader: WorkerLoader[InferenceBatch[Data]] = WorkerLoader(
            self.read,
            batches,
            workers=workers,
            timeout=timeout,
            limit=f"{timeout:g} s",
            reading=self.reading,
        )

    def __iter__(self) -> Generator[InferenceBatch[Data], None, None]:
        """Close it, or run it to its end, and its workers are gone.

        Raises ``DataError`` where a worker died or hangs.
        """
        return iter(self._loader)

    def read(self, indices: Sequence[int]) -> InferenceBatch[Data]:
        """One batch, read here and now."""
        items: list[Item] = []
        places: list[int] = []
        corrupt: dict[int, CorruptSampleError] = {}
        refused: dict[int, DataError] = {}
        for place, index in enumerate(indices):
            if index >= len(self.dataset):
                continue
            self.reading.note(index)
            try:
                with self.reading.blaming(self.dataset):
                    items.append(self.prepare(self.dataset[index], index))
                places.append(place)
            except CorruptSampleError as error:
                corrupt[index] = error
            except DataError as error:
                refused[index] = error
        data = self.collate(items) if items else None
        return InferenceBatch(indices, places, data, corrupt, refused)


def rank_batches(total: int, batch_size: int) -> list[range]:
    """This rank's slices of the global batches of a dataset of ``total`` samples.

    Slices of one global batch follow each other by rank and have one length of at most
    ``batch_size`` on all ranks, as gathering and sharded networks want it; those of the last may
    reach beyond ``total``.
    """
    world, rank = collectives.world_size(), collectives.rank()
    slices = []
    for start in range(0, total, batch_size * world):
        length = min(batch_size, math.ceil((total - start) / world))
        first = start + rank * length
        slices.append(range(first, first + length))
    return slices


class ProgressLines:
    """A line now and then of how many images are done, of each process's own share."""

    def __init__(self, total: int, log: logging.Logger) -> None:
        self.done, self.total, self.log = 0, total, log
        self.started = self.said = time.monotonic()

    def add(self, images: int) -> None:
        self.done += images
        now = time.monotonic()
        if now - self.said < _SECONDS_BETWEEN_LINES and self.done < self.total:
            return
        self.said = now
        rate = self.done / max(now - self.started, 1e-9)
        share = " of this process" if collectives.world_size() > 1 else ""
        self.log.info("%d/%d images%s, %.1f a second", self.done, self.total, share, rate)


# --------------------------------------------------------------------------- images that are fitted
@frozen
class FittedSample:
    """A sample whose image is what a network takes."""

    sample: Sample
    height: int  # pixels of the image as it was read
    width: int


@frozen
class FitSamples:
    """Fits the image of a sample; targets stay as they are."""

    fit: ImageFit

    def __call__(self, sample: Sample, index: int) -> FittedSample:
        height, width = sample.image.shape[-2:]
        return FittedSample(evolve(sample, image=self.fit(sample.image)), height, width)


@frozen
class FittedImages:
    """The fitted images of a batch, of one shape or of several, with their targets."""

    pixels: Tensor  # uint8 [n]: of all images, one after the other
    shapes: Sequence[tuple[int, int, int]]  # [C, H, W] of each
    sizes: Sequence[tuple[int, int]]  # height and width of each as it was read
    targets: Sequence[Mapping[str, Any]]

    @classmethod
    def collate(cls, items: Sequence[FittedSample]) -> FittedImages:
        images = [item.sample.image for item in items]
        return cls(
            # One tensor, since each costs a file descriptor on its way from a worker.
            pixels=torch.cat([image.flatten() for image in images]),
            shapes=[(image.shape[0], image.shape[1], image.shape[2]) for image in images],
            sizes=[(item.height, item.width) for item in items],
            targets=[item.sample.targets for item in items],
        )

    def by_shape(self) -> list[tuple[Sequence[int], Tensor]]:
        """(places in the batch, uint8 [n, C, H, W]) of each shape, in order of appearance."""
        if len(set(self.shapes)) == 1:  # without a copy
            return [(range(len(self.shapes)), self.pixels.view(-1, *self.shapes[0]))]
        flat = self.pixels.split([math.prod(shape) for shape in self.shapes])
        return group_by_shape([image.view(s) for image, s in zip(flat, self.shapes, strict=True)])


def group_by_shape(images: Sequence[Tensor]) -> list[tuple[Sequence[int], Tensor]]:
    """(places in ``images``, those images stacked) of each shape, in order of appearance."""
    places: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    return [(same, torch.stack([images[place] for place in same])) for same in places.values()]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the duration of a ``with``; parts that were in it before stay in it after."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
