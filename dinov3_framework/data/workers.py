"""Loader worker processes: how they start and end, and why one died."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from attrs import frozen
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from dinov3_framework.errors import DataError, UserError
from dinov3_framework.runtime.stopping import end_with

T = TypeVar("T")

_GRACE = 60  # seconds that a worker goes on after SIGTERM


class WorkerError(DataError):
    """A loader worker that died or hangs."""

    @classmethod
    def of(cls, error: BaseException) -> str | None:
        """What to say if ``error`` is torch's of a worker's end, and not raised by one itself."""
        text = str(error)
        if "in DataLoader worker process" in text:
            return None
        signs = ("exited unexpectedly", "is killed by signal")  # parts of torch's messages
        if any(sign in text for sign in signs) or isinstance(error, ConnectionError | EOFError):
            return "a loader worker died (killed, or out of memory)"
        return None


class ReadingLog:
    """The sample that each worker is reading, for the message if the worker dies or hangs."""

    def __init__(self, workers: int) -> None:
        self._samples = torch.full((max(workers, 1),), -1, dtype=torch.int64).share_memory_()

    def note(self, index: int) -> None:
        """To be called before a sample is read, by whoever reads it."""
        worker = get_worker_info()
        self._samples[worker.id if worker is not None else 0] = index

    def describe(self) -> str:
        read = enumerate(self._samples.tolist())
        return ", ".join(f"worker {worker}: sample {i}" for worker, i in read if i >= 0) or "none"


class WorkerLoader(Generic[T]):
    """Iterates over what ``workers`` processes make ahead of time, in order.

    That is ``make(key)`` for each of ``keys``, or without keys what ``make(worker)`` yields in each
    worker, in turns. A ``UserError`` raised there arrives as it is. ``limit`` says in messages what
    ``timeout`` (seconds to wait) comes from; ``reading`` is where ``make`` notes what it reads.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        keys: Iterable[Any] | None,
        *,
        workers: int,
        timeout: float,
        limit: str,
        reading: ReadingLog,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.limit, self.reading = limit, reading
        self._loader: DataLoader[Any] = DataLoader(
            _Yielded(make) if keys is None else _Made(make),
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            collate_fn=_unchanged,
            timeout=timeout if workers else 0,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Generator[T, None, None]:
        """Close it, or run it to its end, and its workers are gone."""
        made = iter(self._loader)
        try:
            while True:
                try:
                    item = next(made)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    self.explain(error)
                    raise
                if isinstance(item, _Unmade):
                    raise item.error
                yield item
        finally:
            # Not left to the garbage collector: an error's traceback keeps the iterator alive, and
            # workers that Python kills when it ends look to torch like workers that died.
            shut_down = getattr(made, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
                for worker in made._workers:  # type: ignore[attr-defined]
                    worker.kill()  # one that hangs

    def explain(self, error: Exception) -> None:
        """Raise a ``WorkerError`` that names the sample if ``error`` is of a worker's end or delay.

        A killed worker is noticed by a signal handler, so the error may come up anywhere in a step.
        """
        if not self._loader.num_workers:
            return
        what = WorkerError.of(error)
        if "DataLoader timed out" in str(error):
            what = f"no batch came within {self.limit}"
        if what is not None:
            raise WorkerError(
                f"{what}; last read by {self.reading.describe()}\n    {error}"
            ) from error


@frozen
class _Unmade:
    """Why something could not be made; raised in a worker, torch would wrap it in a traceback."""

    error: UserError


class _Made(TorchDataset[Any]):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.make(key)
        except UserError as error:
            return _Unmade(error)


class _Yielded(IterableDataset[Any]):
    def __init__(self, make: Callable[[int], Iterable[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        try:
            yield from self.make(0 if worker is None else worker.id)
        except UserError as error:
            yield _Unmade(error)


def _unchanged(item: T) -> T:
    return item


def _start_worker(_: int) -> None:
    # Ctrl-C, schedulers and timeout(1) signal the whole group; the process that reads alone decides
    # when to stop, and until then it needs batches.
    for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    if parent := multiprocessing.parent_process():
        end_with(parent.pid)  # or one whose reader hangs would live on
    torch.set_num_threads(1)
