"""Batches for training: from a place in the stream to what a unit is given.

A batch of a dataset with an index is a function of (seed, step, micro-batch, rank) alone. Loader
workers only decide who computes it, so their number never changes what is learnt, and a resumed run
starts its loader at its step. Datasets that are streams go on from the state of their last samples.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Generic, TypeVar

import torch
from attrs import evolve, frozen
from torch import Tensor

from dinov3_framework.contracts.data import (
    Dataset,
    Sample,
    SampleBatch,
    StreamDataset,
    Transform,
)
from dinov3_framework.data import LoaderConfig
from dinov3_framework.data.sampling import ShuffledStream
from dinov3_framework.data.workers import ReadingLog, WorkerLoader
from dinov3_framework.errors import CorruptSampleError, DataError
from dinov3_framework.randomness import keyed_rng, keyed_seed

log = logging.getLogger(__name__)

_SUBSTITUTES = 20  # samples tried in place of a corrupt one before the dataset is given up

Item = TypeVar("Item")
B = TypeVar("B")


@frozen
class Layout:
    """How the global batch of a step is split: processes, micro-batches, images in each."""

    world_size: int
    rank: int
    accumulation_steps: int
    batch_size: int  # images of a step, over all processes

    @property
    def per_micro_batch(self) -> int:
        """Images of a process in a micro-batch; one more, perhaps, where they do not divide."""
        return self.batch_size // (self.world_size * self.accumulation_steps)

    def places(self, step: int, micro: int) -> range:
        """The places in the stream of this process's images in one micro-batch of one step."""
        whole = self.batch_size // self.accumulation_steps
        first = (step * self.accumulation_steps + micro) * whole
        start, stop = (whole * part // self.world_size for part in (self.rank, self.rank + 1))
        return range(first + start, first + stop)


# --------------------------------------------------------------------------- making batches
class BatchMaker(abc.ABC, Generic[Item, B]):
    """Makes the batch of any (step, micro-batch): reads samples, prepares and collates them."""

    def __init__(
        self, dataset: Dataset | StreamDataset, layout: Layout, seed: int, workers: int
    ) -> None:
        self.dataset, self.layout, self.seed = dataset, layout, seed
        self.stream = ShuffledStream(len(dataset), seed) if isinstance(dataset, Dataset) else None
        self.reading = ReadingLog(workers)

    @abc.abstractmethod
    def prepare(self, sample: Sample, place: int, step: int) -> Item:
        """What a sample becomes; whatever is random is keyed by (seed, place)."""

    @abc.abstractmethod
    def collate(self, items: Sequence[Item], step: int, micro: int, corrupt: tuple[str, ...]) -> B:
        """A batch of prepared samples; ``corrupt`` names those that others stand in for."""

    def read(self, index: int) -> Any:
        """What ``prepare`` gets of a dataset with an index: by default its sample."""
        if isinstance(self.dataset, StreamDataset):
            raise TypeError("a stream has no index")
        return self.dataset[index]

    def describe_item(self) -> str:
        """What a sample becomes, in a few words, for messages."""
        return ""

    def first_samples(self, count: int) -> Mapping[str, Tensor]:
        """What the stream's first ``count`` samples become in step 0, by name."""
        return {}

    def __getitem__(self, key: tuple[int, int]) -> B:
        step, micro = key
        corrupt: list[str] = []
        with self.reading.blaming(self.dataset):
            items = [
                self.prepare(self._read(place, corrupt), place, step)
                for place in self.layout.places(step, micro)
            ]
        return self.collate(items, step, micro, tuple(corrupt))

    def from_stream(
        self, samples: Iterator[tuple[Sample | CorruptSampleError, Any]], step: int, micro: int
    ) -> tuple[B, Any]:
        """The next batch of a stream's part, and the state of the stream after it."""
        corrupt: list[str] = []
        items, state = [], None
        with self.reading.blaming(self.dataset):
            for place in self.layout.places(step, micro):
                sample, state = self._next(samples)
                while not isinstance(sample, Sample):
                    corrupt.append(str(sample))
                    sample, state = self._next(samples)
                items.append(self.prepare(sample, place, step))
        return self.collate(items, step, micro, tuple(corrupt)), state

    def _next(
        self, samples: Iterator[tuple[Sample | CorruptSampleError, Any]]
    ) -> tuple[Sample | CorruptSampleError, Any]:
        try:
            return next(samples)
        except StopIteration:
            raise DataError(f"{self.dataset.describe()}: a stream ended, and must not") from None

    def _read(self, place: int, corrupt: list[str]) -> Any:
        if self.stream is None or isinstance(self.dataset, StreamDataset):
            raise TypeError("a stream has no places")
        index = self.stream[place]
        for attempt in range(_SUBSTITUTES):
            self.reading.note(index)
            try:
                return self.read(index)
            except CorruptSampleError as error:
                corrupt.append(str(error))
                substitute = keyed_rng(self.seed, "substitute", place, attempt)
                index = int(substitute.integers(len(self.dataset)))
        raise DataError(
            f"{_SUBSTITUTES} samples in a row could not be decoded, the last: {corrupt[-1]}\n"
            "    the dataset seems to be damaged or of another format"
        )


@frozen
class LabeledBatch:
    """Transformed samples; a ``contracts.training.Batch``."""

    samples: SampleBatch
    corrupt: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device) -> LabeledBatch:
        return self.changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> LabeledBatch:
        return self.changed(Tensor.pin_memory)

    def changed(self, change: Callable[[Tensor], Tensor]) -> LabeledBatch:
        """The same with every tensor changed."""
        samples = SampleBatch(
            changed_tensors(self.samples.images, change),
            changed_tensors(self.samples.targets, change),
        )
        return evolve(self, samples=samples)


def changed_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: changed_tensors(each, change) for name, each in value.items()}
    if isinstance(value, list):
        return [changed_tensors(each, change) for each in value]
    return value


class TransformedBatches(BatchMaker[Sample, LabeledBatch]):
    """Batches of samples as a joint transform makes them."""

    def __init__(
        self,
        dataset: Dataset | StreamDataset,
        transform: Transform,
        layout: Layout,
        seed: int,
        workers: int,
    ) -> None:
        super().__init__(dataset, layout, seed, workers)
        self.transform = transform

    def prepare(self, sample: Sample, place: int, step: int) -> Sample:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(self.seed, "transform", place))
            return self.transform(sample)

    def collate(
        self, items: Sequence[Sample], step: int, micro: int, corrupt: tuple[str, ...]
    ) -> LabeledBatch:
        return LabeledBatch(self.transform.collate(items), corrupt)

    def first_samples(self, count: int) -> Mapping[str, Tensor]:
        items = [self.prepare(self._read(place, []), place, 0) for place in range(count)]
        batch = self.transform.collate(items)
        named = {"images": batch.images, **batch.targets}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


# --------------------------------------------------------------------------- the loader
@frozen
class _Made(Generic[B]):
    """A batch, and where its part of a stream goes on."""

    batch: B
    part: str = ""
    state: Any = None

    def pin_memory(self) -> _Made[B]:
        return evolve(self, batch=self.batch.pin_memory())  # type: ignore[attr-defined]


class _Streamed(Generic[B]):
    """The batches that each worker makes of its part of a stream."""

    def __init__(
        self, maker: BatchMaker[Any, B], keys: _Keys, workers: int, streams: Mapping[str, Any]
    ) -> None:
        self.maker, self.keys, self.workers, self.streams = maker, keys, workers, streams

    def __call__(self, worker: int) -> Iterator[_Made[B]]:
        dataset = self.maker.dataset
        if isinstance(dataset, Dataset):
            raise TypeError("a dataset with an index is no stream")
        # The DataLoader asks its workers in turn, beginning with the first.
        part = self.maker.layout.rank * self.workers + (worker + self.keys.before) % self.workers
        parts = self.maker.layout.world_size * self.workers
        name = f"{part} of {parts}"
        samples = dataset.open(
            part=part, parts=parts, seed=self.maker.seed, state=self.streams.get(name)
        )
        for number, (step, micro) in enumerate(self.keys):
            if number % self.workers == worker:
                batch, state = self.maker.from_stream(samples, step, micro)
                yield _Made(batch, name, state)


class TrainingLoader(Generic[B]):
    """Iterates over the batches of the steps ``start`` .. ``stop``, micro-batches in order.

    ``streams`` holds, by part, where streams go on; it is kept up to date with what was given out.
    """

    def __init__(
        self,
        maker: BatchMaker[Any, B],
        config: LoaderConfig,
        start: int,
        stop: int,
        pin_memory: bool,
        streams: dict[str, Any] | None = None,
    ) -> None:
        self.maker, self.config = maker, config
        self.streams = {} if streams is None else streams
        self._corrupt: set[str] = set()  # those that were warned of
        keys = _Keys(start, stop, maker.layout.accumulation_steps)
        indexed = isinstance(maker.dataset, Dataset)
        parts = max(config.workers, 1)
        if not indexed:
            self._drop_other_parts(maker.layout.world_size * parts)
        self._loader: WorkerLoader[_Made[B]] = WorkerLoader(
            self._make if indexed else _Streamed(maker, keys, parts, self.streams),
            keys if indexed else None,
            workers=config.workers,
            timeout=config.timeout,
            limit=f"loader.timeout = {config.timeout:g} s",
            reading=maker.reading,
            key="loader.workers",
            prefetch=config.prefetch,
            pin_memory=pin_memory,
        )
        self.explain = self._loader.explain

    def _make(self, key: tuple[int, int]) -> _Made[B]:
        return _Made(self.maker[key])

    def _drop_other_parts(self, parts: int) -> None:
        other = [name for name in self.streams if not name.endswith(f" of {parts}")]
        if other:
            log.warning(
                "the stream was saved in %s parts and now has %d (processes x loader workers): it "
                "begins anew",
                other[0].rpartition(" ")[2],
                parts,
            )
        for name in other:
            del self.streams[name]

    def __iter__(self) -> Generator[B, None, None]:
        """Close it, or run it to its end, and its workers are gone."""
        with closing(iter(self._loader)) as batches:
            for made in batches:
                self._count(made.batch.corrupt)  # type: ignore[attr-defined]
                if made.part:
                    self.streams[made.part] = made.state
                yield made.batch

    @property
    def corrupt(self) -> int:
        """How many different samples could not be decoded."""
        return len(self._corrupt)

    def _count(self, corrupt: Sequence[str]) -> None:
        for name in corrupt:
            if name not in self._corrupt:
                self._corrupt.add(name)
                log.warning("undecodable sample %d, substituted: %s", self.corrupt, name)
        if self.corrupt > self.config.max_corrupt:
            raise DataError(
                f"{self.corrupt} samples could not be decoded, the last: {corrupt[-1]}\n"
                f"    loader.max_corrupt = {self.config.max_corrupt} are allowed; mend or remove "
                "the files that the warnings name, or allow more"
            )


class _Keys:
    """The (step, micro-batch) pairs of a run, without a list of them."""

    def __init__(self, start: int, stop: int, micro_batches: int) -> None:
        self.steps, self.micro_batches = range(start, stop), range(micro_batches)
        self.before = start * micro_batches  # those that came before

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self.steps for micro in self.micro_batches)

    def __len__(self) -> int:
        return len(self.steps) * len(self.micro_batches)
