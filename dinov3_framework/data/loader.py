"""Batches for training: from a place in the stream to what a unit is given.

A batch of a dataset with an index is a function of (seed, step, micro-batch, rank) alone. Loader
workers only decide who computes it, so their number never changes what is learnt, and a resumed run
starts its loader at its step. Datasets that are streams go on from the state of their last samples.
"""

from __future__ import annotations

import abc
import logging
import re
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from dinov3_framework.contracts.data import (
    Dataset,
    Sample,
    SampleBatch,
    StreamDataset,
    Transform,
)
from dinov3_framework.data import LoaderConfig
from dinov3_framework.data.sampling import ShuffledStream
from dinov3_framework.errors import CorruptSampleError, DataError, UserError
from dinov3_framework.randomness import keyed_rng, keyed_seed

log = logging.getLogger(__name__)

_GRACE = 60  # seconds that a worker goes on after SIGTERM
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
class BatchMaker(TorchDataset[B], abc.ABC, Generic[Item, B]):
    """Makes the batch of any (step, micro-batch): reads samples, prepares and collates them."""

    def __init__(
        self, dataset: Dataset | StreamDataset, layout: Layout, seed: int, workers: int
    ) -> None:
        self.dataset, self.layout, self.seed = dataset, layout, seed
        self.stream = ShuffledStream(len(dataset), seed) if isinstance(dataset, Dataset) else None
        # What each worker is reading, for the message if it dies or hangs.
        self.reading = torch.full((max(workers, 1),), -1, dtype=torch.int64).share_memory_()

    @abc.abstractmethod
    def prepare(self, sample: Sample, place: int, step: int) -> Item:
        """What a sample becomes; whatever is random is keyed by (seed, place)."""

    @abc.abstractmethod
    def collate(self, items: Sequence[Item], step: int, micro: int, corrupt: tuple[str, ...]) -> B:
        """A batch of prepared samples; ``corrupt`` names those that others stand in for."""

    def describe_item(self) -> str:
        """What a sample becomes, in a few words, for messages."""
        return ""

    def first_samples(self, count: int) -> Mapping[str, Tensor]:
        """What the stream's first ``count`` samples become in step 0, by name."""
        return {}

    def __getitem__(self, key: tuple[int, int]) -> B:
        step, micro = key
        corrupt: list[str] = []
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

    def _read(self, place: int, corrupt: list[str]) -> Sample:
        if self.stream is None or isinstance(self.dataset, StreamDataset):
            raise TypeError("a stream has no places")
        index = self.stream[place]
        for attempt in range(_SUBSTITUTES):
            self._note(index)
            try:
                return self.dataset[index]
            except CorruptSampleError as error:
                corrupt.append(str(error))
                substitute = keyed_rng(self.seed, "substitute", place, attempt)
                index = int(substitute.integers(len(self.dataset)))
        raise DataError(
            f"{_SUBSTITUTES} samples in a row could not be decoded, the last: {corrupt[-1]}\n"
            "    the dataset seems to be damaged or of another format"
        )

    def _note(self, index: int) -> None:
        worker = get_worker_info()
        self.reading[worker.id if worker is not None else 0] = index


@frozen
class LabelledBatch:
    """Transformed samples; a ``contracts.training.Batch``."""

    samples: SampleBatch
    corrupt: tuple[str, ...] = ()

    def to(self, device: torch.device) -> LabelledBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> LabelledBatch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> LabelledBatch:
        samples = SampleBatch(
            _changed(self.samples.images, change), _changed(self.samples.targets, change)
        )
        return evolve(self, samples=samples)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _changed(each, change) for name, each in value.items()}
    if isinstance(value, list):
        return [_changed(each, change) for each in value]
    return value


class TransformedBatches(BatchMaker[Sample, LabelledBatch]):
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
    ) -> LabelledBatch:
        return LabelledBatch(self.transform.collate(items), corrupt)

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


@frozen
class _Unmade:
    """Why a batch could not be made."""

    error: UserError

    def pin_memory(self) -> _Unmade:
        return self


class _Indexed(TorchDataset[Any], Generic[B]):
    """A :class:`BatchMaker` whose errors for a person arrive as they are.

    Raised in a worker, torch would wrap them in a traceback.
    """

    def __init__(self, maker: BatchMaker[Any, B]) -> None:
        self.maker = maker

    def __getitem__(self, key: tuple[int, int]) -> _Made[B] | _Unmade:
        try:
            return _Made(self.maker[key])
        except UserError as error:
            return _Unmade(error)


class _Streamed(IterableDataset[Any], Generic[B]):
    """The batches that one worker makes of its part of a stream."""

    def __init__(
        self, maker: BatchMaker[Any, B], keys: _Keys, workers: int, streams: Mapping[str, Any]
    ) -> None:
        self.maker, self.keys, self.workers, self.streams = maker, keys, workers, streams

    def __iter__(self) -> Iterator[_Made[B] | _Unmade]:
        worker, dataset = get_worker_info(), self.maker.dataset
        if isinstance(dataset, Dataset):
            raise TypeError("a dataset with an index is no stream")
        place = 0 if worker is None else worker.id
        # The DataLoader asks its workers in turn, beginning with the first.
        part = self.maker.layout.rank * self.workers + (place + self.keys.before) % self.workers
        parts = self.maker.layout.world_size * self.workers
        name = f"{part} of {parts}"
        try:
            samples = dataset.open(
                part=part, parts=parts, seed=self.maker.seed, state=self.streams.get(name)
            )
            for number, (step, micro) in enumerate(self.keys):
                if number % self.workers == place:
                    batch, state = self.maker.from_stream(samples, step, micro)
                    yield _Made(batch, name, state)
        except UserError as error:
            yield _Unmade(error)


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
        self.corrupt = 0
        keys = _Keys(start, stop, maker.layout.accumulation_steps)
        workers = config.workers
        indexed = isinstance(maker.dataset, Dataset)
        if not indexed:
            self._drop_other_parts(maker.layout.world_size * max(workers, 1))
        self._loader: DataLoader[Any] = DataLoader(
            _Indexed(maker) if indexed else _Streamed(maker, keys, max(workers, 1), self.streams),
            batch_size=None,
            sampler=keys if indexed else None,
            num_workers=workers,
            timeout=config.timeout if workers else 0,
            prefetch_factor=config.prefetch if workers else None,
            worker_init_fn=start_worker,
            pin_memory=pin_memory,
        )

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
        batches = iter(self._loader)
        try:
            while True:
                try:
                    made = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    self.explain(error)
                    raise
                if isinstance(made, _Unmade):
                    raise made.error
                self._count(made.batch.corrupt)
                if made.part:
                    self.streams[made.part] = made.state
                yield made.batch
        finally:
            # Not left to the garbage collector: an error's traceback keeps the iterator alive, and
            # workers that Python kills when it ends look to torch like workers that died.
            shut_down = getattr(batches, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
                for worker in batches._workers:  # type: ignore[attr-defined]
                    worker.kill()  # one that hangs

    def _count(self, corrupt: Sequence[str]) -> None:
        for name in corrupt:
            self.corrupt += 1
            log.warning("undecodable sample %d, substituted: %s", self.corrupt, name)
        if self.corrupt > self.config.max_corrupt:
            raise DataError(
                f"{self.corrupt} samples could not be decoded, the last: {corrupt[-1]}\n"
                f"    loader.max_corrupt = {self.config.max_corrupt} are allowed"
            )

    def explain(self, error: Exception) -> None:
        """Raise a ``DataError`` with worker and sample if ``error`` is of a worker's end or delay.

        A killed worker is noticed by a signal handler, so the error may come up anywhere in a step.
        """
        text = str(error)
        if not self.config.workers:
            return
        if "DataLoader timed out" in text:
            what: str | None = f"no batch came within loader.timeout = {self.config.timeout:g} s"
        else:
            what = WorkerDied.in_message(text)
            if isinstance(error, ConnectionError | EOFError) and not WorkerDied.raised(text):
                what = WorkerDied.WORDS
        if what is None:
            return  # the dataset's own error
        reading = [
            f"worker {worker}: sample {index}"
            for worker, index in enumerate(self.maker.reading.tolist())
            if index >= 0
        ]
        raise DataError(
            f"{what}; last read by {', '.join(reading) or 'none'}\n    {text}"
        ) from error


class WorkerDied:
    """What torch says of a loader worker that is gone."""

    WORDS = "a loader worker died (killed, or out of memory)"
    _SIGNS = re.compile(r"exited unexpectedly|is killed by signal")

    @classmethod
    def in_message(cls, text: str) -> str | None:
        """What to say if ``text`` is of a worker's end, and not raised by a worker itself."""
        return cls.WORDS if cls._SIGNS.search(text) and not cls.raised(text) else None

    @staticmethod
    def raised(text: str) -> bool:
        """Whether a message is of an error that a living worker raised."""
        return "in DataLoader worker process" in text


class _Keys:
    """The (step, micro-batch) pairs of a run, without a list of them."""

    def __init__(self, start: int, stop: int, micro_batches: int) -> None:
        self.steps, self.micro_batches = range(start, stop), range(micro_batches)
        self.before = start * micro_batches  # those that came before

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self.steps for micro in self.micro_batches)

    def __len__(self) -> int:
        return len(self.steps) * len(self.micro_batches)


def start_worker(_: int) -> None:
    """Prepare a loader worker: signals are for the process that reads, and one thread is enough."""
    # Ctrl-C, schedulers and timeout(1) signal the whole group; the trainer alone decides when to
    # stop, and until then it needs batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    torch.set_num_threads(1)
