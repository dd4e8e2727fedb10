"""Batches for training: from a place in the stream to crops and masks.

A batch is a function of (seed, step, pass, rank) alone. Loader workers only decide who computes
it, so their number never changes what is learnt, and a resumed run starts its loader at its step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing

import torch
from attrs import evolve, frozen
from torch import Tensor

from dinov3_framework.contracts.data import Augmentation, Dataset
from dinov3_framework.data import LoaderConfig
from dinov3_framework.data.sampling import ShuffledStream
from dinov3_framework.data.workers import ReadingLog, WorkerLoader
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.randomness import keyed_rng

log = logging.getLogger(__name__)

_SUBSTITUTES = 20  # samples tried in place of a corrupt one before the dataset is given up


@frozen
class Layout:
    """How the global batch of a step is split: processes, passes, images per pass."""

    world_size: int
    rank: int
    accumulation_steps: int
    batch_size: int  # images of a step, over all processes

    @property
    def per_pass(self) -> int:
        """Images that one process sees in one pass; one more, perhaps, where they do not divide."""
        return self.batch_size // (self.world_size * self.accumulation_steps)

    def places(self, step: int, micro: int) -> range:
        """The places in the stream of this process's images in one pass of one step."""
        whole = self.batch_size // self.accumulation_steps
        first = (step * self.accumulation_steps + micro) * whole
        start, stop = (whole * part // self.world_size for part in (self.rank, self.rank + 1))
        return range(first + start, first + stop)


@frozen
class Batch:
    """What one process sees in one pass."""

    crops: Mapping[str, Tensor]  # view -> [crops, images, C, size, size]
    masks: Tensor | None  # bool [crops, images, P], of the global crops
    corrupt: tuple[str, ...]  # what could not be decoded and was substituted
    step: int
    micro: int
    masked: Tensor | None = None  # int64 [masked patches]: their places in masks, flattened

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return evolve(
            self,
            crops={name: change(crops) for name, crops in self.crops.items()},
            masks=None if self.masks is None else change(self.masks),
            masked=None if self.masked is None else change(self.masked),
        )


class BatchMaker:
    """Makes the batch of any (step, pass), by the augmentation's variant for the step."""

    def __init__(
        self,
        dataset: Dataset,
        augmentation: Augmentation,
        layout: Layout,
        seed: int,
        workers: int,
        masks_of: Layout | None = None,
    ) -> None:
        """``masks_of`` says whose masks are made, if not those of the images of ``layout``."""
        self.dataset, self.augmentation = dataset, augmentation
        self.layout, self.seed = layout, seed
        self.masks_of = masks_of or layout
        self.stream = ShuffledStream(len(dataset), seed)
        self.reading = ReadingLog(workers)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        step, micro = key
        places = self.layout.places(step, micro)
        # One for the step: the crops of all passes and processes have the same sizes.
        augmentation = self.augmentation.at(self.seed, step)
        corrupt: list[str] = []
        samples = [self._crops(augmentation, place, corrupt) for place in places]
        crops = {
            view: torch.stack([sample[view] for sample in samples], dim=1)
            for view in augmentation.views
        }
        masks = self._masks(augmentation, step, self.masks_of.places(step, micro))
        masked = None if masks is None else masks.flatten().nonzero().squeeze(1)
        return Batch(crops, masks, tuple(corrupt), step, micro, masked)

    def _crops(
        self, augmentation: Augmentation, place: int, corrupt: list[str]
    ) -> Mapping[str, Tensor]:
        index = self.stream[place]
        rng = keyed_rng(self.seed, "crops", place)
        for attempt in range(_SUBSTITUTES):
            self.reading.note(index)
            try:
                image = self.dataset[index].image
            except CorruptSampleError as error:
                corrupt.append(str(error))
                substitute = keyed_rng(self.seed, "substitute", place, attempt)
                index = int(substitute.integers(len(self.dataset)))
                continue
            return augmentation(image, rng)
        raise DataError(
            f"{_SUBSTITUTES} samples in a row could not be decoded, the last: {corrupt[-1]}\n"
            "    the dataset seems to be damaged or of another format"
        )

    def _masks(self, augmentation: Augmentation, step: int, places: range) -> Tensor | None:
        if not augmentation.makes_masks:
            return None
        crops, size = augmentation.views["global"].crops, self.layout.batch_size
        first = places.start - step * size
        rows = [crop * size + first + i for crop in range(crops) for i in range(len(places))]
        masks = augmentation.masks(rows=rows, total=crops * size, seed=self.seed, step=step)
        unflat: Tensor = masks.unflatten(0, (crops, len(places)))
        return unflat


class TrainingLoader:
    """Iterates over the batches of the steps ``start`` .. ``stop``, passes in order."""

    def __init__(
        self, maker: BatchMaker, config: LoaderConfig, start: int, stop: int, pin_memory: bool
    ) -> None:
        self.config = config
        self.corrupt = 0
        self._loader = WorkerLoader(
            maker.__getitem__,
            _Keys([range(start, stop), range(maker.layout.accumulation_steps)]),
            workers=config.workers,
            timeout=config.timeout,
            limit=f"loader.timeout = {config.timeout:g} s",
            reading=maker.reading,
            prefetch=config.prefetch,
            pin_memory=pin_memory,
        )
        self.explain = self._loader.explain

    def __iter__(self) -> Generator[Batch, None, None]:
        """Close it, or run it to its end, and its workers are gone."""
        with closing(iter(self._loader)) as batches:
            for batch in batches:
                self._count(batch)
                yield batch

    def _count(self, batch: Batch) -> None:
        for name in batch.corrupt:
            self.corrupt += 1
            log.warning("undecodable sample %d, substituted: %s", self.corrupt, name)
        if self.corrupt > self.config.max_corrupt:
            raise DataError(
                f"{self.corrupt} samples could not be decoded, the last: {batch.corrupt[-1]}\n"
                f"    loader.max_corrupt = {self.config.max_corrupt} are allowed"
            )


class _Keys:
    """The (step, pass) pairs of a run, without a list of them."""

    def __init__(self, ranges: list[range]) -> None:
        self.steps, self.passes = ranges

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self.steps for micro in self.passes)

    def __len__(self) -> int:
        return len(self.steps) * len(self.passes)
