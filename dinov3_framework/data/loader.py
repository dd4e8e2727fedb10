"""Batches for training: from a place in the stream to crops and masks.

A batch is a function of (seed, step, pass, rank) alone. Loader workers only decide who computes
it, so their number never changes what is learnt, and a resumed run starts its loader at its step.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Generator, Iterator, Mapping

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from dinov3_framework.contracts.data import Augmentation, Dataset
from dinov3_framework.data import LoaderConfig
from dinov3_framework.data.sampling import ShuffledStream
from dinov3_framework.errors import CorruptSampleError, DataError, UserError
from dinov3_framework.randomness import keyed_rng

log = logging.getLogger(__name__)

# Parts of torch's messages.
_DEAD_WORKER = ("exited unexpectedly", "is killed by signal")
_NO_BATCH, _RAISED_BY_WORKER = "DataLoader timed out", "in DataLoader worker process"
_GRACE = 60  # seconds that a worker goes on after SIGTERM
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


class BatchMaker(TorchDataset[Batch]):
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
        # What each worker is reading, for the message if it dies or hangs.
        self.reading = torch.full((max(workers, 1),), -1, dtype=torch.int64).share_memory_()

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
            self._note(index)
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

    def _note(self, index: int) -> None:
        worker = get_worker_info()
        self.reading[worker.id if worker is not None else 0] = index

    def _masks(self, augmentation: Augmentation, step: int, places: range) -> Tensor | None:
        if not augmentation.makes_masks:
            return None
        crops, size = augmentation.views["global"].crops, self.layout.batch_size
        first = places.start - step * size
        rows = [crop * size + first + i for crop in range(crops) for i in range(len(places))]
        masks = augmentation.masks(rows=rows, total=crops * size, seed=self.seed, step=step)
        unflat: Tensor = masks.unflatten(0, (crops, len(places)))
        return unflat


@frozen
class _Unmade:
    """Why a batch could not be made."""

    error: UserError


class _ForLoader(TorchDataset[Batch | _Unmade]):
    """A :class:`BatchMaker` whose complaints to the user arrive as they are.

    Raised in a worker, torch would wrap them in a traceback.
    """

    def __init__(self, maker: BatchMaker) -> None:
        self.maker = maker

    def __getitem__(self, key: tuple[int, int]) -> Batch | _Unmade:
        try:
            return self.maker[key]
        except UserError as error:
            return _Unmade(error)


class TrainingLoader:
    """Iterates over the batches of the steps ``start`` .. ``stop``, passes in order."""

    def __init__(
        self, maker: BatchMaker, config: LoaderConfig, start: int, stop: int, pin_memory: bool
    ) -> None:
        self.maker, self.config = maker, config
        self.corrupt = 0
        passes = maker.layout.accumulation_steps
        keys = _Keys([range(start, stop), range(passes)])
        workers = config.workers
        self._loader: DataLoader[Batch | _Unmade] = DataLoader(
            _ForLoader(maker),
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            timeout=config.timeout if workers else 0,
            prefetch_factor=config.prefetch if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        """Close it, or run it to its end, and its workers are gone."""
        batches = iter(self._loader)
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    self.explain(error)
                    raise
                if isinstance(batch, _Unmade):
                    raise batch.error
                self._count(batch)
                yield batch
        finally:
            # Not left to the garbage collector: an error's traceback keeps the iterator alive, and
            # workers that Python kills when it ends look to torch like workers that died.
            shut_down = getattr(batches, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
                for worker in batches._workers:  # type: ignore[attr-defined]
                    worker.kill()  # one that hangs

    def _count(self, batch: Batch) -> None:
        for name in batch.corrupt:
            self.corrupt += 1
            log.warning("undecodable sample %d, substituted: %s", self.corrupt, name)
        if self.corrupt > self.config.max_corrupt:
            raise DataError(
                f"{self.corrupt} samples could not be decoded, the last: {batch.corrupt[-1]}\n"
                f"    loader.max_corrupt = {self.config.max_corrupt} are allowed"
            )

    def explain(self, error: Exception) -> None:
        """Raise a ``DataError`` with worker and sample if ``error`` is of a worker's end or delay.

        A killed worker is noticed by a signal handler, so the error may come up anywhere in a step.
        """
        text = str(error)
        if not self.config.workers or _RAISED_BY_WORKER in text:
            return  # the dataset's own error
        if _NO_BATCH in text:
            what = f"no batch came within loader.timeout = {self.config.timeout:g} s"
        elif any(sign in text for sign in _DEAD_WORKER) or isinstance(
            error, ConnectionError | EOFError
        ):
            what = "a loader worker died (killed, or out of memory)"
        else:
            return
        reading = [
            f"worker {worker}: sample {index}"
            for worker, index in enumerate(self.maker.reading.tolist())
            if index >= 0
        ]
        raise DataError(
            f"{what}; last read by {', '.join(reading) or 'none'}\n    {text}"
        ) from error


class _Keys:
    """The (step, pass) pairs of a run, without a list of them."""

    def __init__(self, ranges: list[range]) -> None:
        self.steps, self.passes = ranges

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self.steps for micro in self.passes)

    def __len__(self) -> int:
        return len(self.steps) * len(self.passes)


def _start_worker(_: int) -> None:
    # Ctrl-C, schedulers and timeout(1) signal the whole group; the trainer alone decides when to
    # stop, and until then it needs batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    torch.set_num_threads(1)
