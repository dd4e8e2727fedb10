"""Loader worker processes: how they start and end, and why one died."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import torch
from attrs import frozen
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from dinov3_framework.blame import blame, blaming, take_blame
from dinov3_framework.contracts.data import Dataset, StreamDataset
from dinov3_framework.errors import DataError
from dinov3_framework.runtime.stopping import end_with

T = TypeVar("T")

MEMORY = "worker memory"  # how its complaints begin
_GRACE = 60  # seconds that a worker goes on after SIGTERM
_SHM = "/dev/shm"  # where batches are while they pass from a worker to its process
_UNUSABLE = f"{_SHM} is full or cannot be written"


def free_shared_memory() -> int:
    """Bytes that are free for batches on their way from workers; 0 if nothing can be written."""
    try:
        found = os.statvfs(_SHM)
    except OSError:
        return 0
    return 0 if found.f_flag & os.ST_RDONLY else found.f_bavail * found.f_frsize


def memory_complaint(
    batch: float, *, workers: int, processes: int, ahead: int = 1, key: str = "workers"
) -> str:
    """Why batches on their way from workers have no room; "" if they have.

    A batch takes ``batch`` bytes (0: unknown); each of the ``workers`` of each of the run's
    ``processes`` makes so many ``ahead``. ``key`` is that of the number of workers.
    """
    here = min(int(os.environ.get("LOCAL_WORLD_SIZE", processes)), processes)
    free, batches = free_shared_memory(), here * workers * ahead
    if not batches or (free and batch * batches <= free):
        return ""
    what = _UNUSABLE
    if free:
        what = (
            f"{batches:,} batches of {batch / 2**20:,.1f} MiB are in {_SHM} at once, "
            f"where {free / 2**20:,.1f} MiB are free"
        )
    return f"{MEMORY}: {what}\n    {_remedy(key)}"


def _remedy(key: str) -> str:
    return f"give {_SHM} more room (docker run --shm-size=8g), or lower {key} (0 needs none)"


class WorkerError(DataError):
    """A loader worker that died or hangs."""

    @classmethod
    def of(cls, error: BaseException) -> str | None:
        """What to say if ``error`` is torch's of a worker's end, and not raised by one itself."""
        text = str(error)
        if "in DataLoader worker process" in text:
            return None
        if isinstance(error, _NoMemory):
            return f"{MEMORY}: {_UNUSABLE}"
        signs = ("exited unexpectedly", "is killed by signal")  # parts of torch's messages
        if any(sign in text for sign in signs) or isinstance(error, ConnectionError | EOFError):
            return "a loader worker died (killed, or out of memory)"
        return None


class _NoMemory(RuntimeError):
    """A batch that a worker could not put where its process finds it."""


class ReadingLog:
    """The sample that each worker is reading, for the message if the worker dies or hangs."""

    def __init__(self, workers: int) -> None:
        self._samples = torch.full((max(workers, 1),), -1, dtype=torch.int64)
        if workers:
            try:
                self._samples.share_memory_()
            except RuntimeError as error:
                text = f"{MEMORY}: {_UNUSABLE}: {error}\n    {_remedy('the number of workers')}"
                raise WorkerError(text) from error

    def note(self, index: int) -> None:
        """To be called before a sample is read, by whoever reads it."""
        worker = get_worker_info()
        self._samples[worker.id if worker is not None else 0] = index

    def blaming(self, dataset: Dataset | StreamDataset) -> blaming:
        """Say of an error which sample it came up at, the one read last."""

        def where() -> str:
            worker = get_worker_info()
            index = int(self._samples[worker.id if worker is not None else 0])
            if index < 0 or not isinstance(dataset, Dataset):
                return f"dataset {type(dataset).__name__}"
            try:
                name = dataset.name(index)
            except Exception:  # the error is to be heard of whatever else fails
                name = str(index)
            named = "" if name == str(index) else f" ({name})"
            return f"dataset {type(dataset).__name__}, sample {index}{named}"

        return blaming(where)

    def describe(self) -> str:
        read = enumerate(self._samples.tolist())
        return ", ".join(f"worker {worker}: sample {i}" for worker, i in read if i >= 0) or "none"


class WorkerLoader(Generic[T]):
    """Iterates over what ``workers`` processes make ahead of time, in order.

    That is ``make(key)`` for each of ``keys``, or without keys what ``make(worker)`` yields in each
    worker, in turns. An error raised there arrives as it is. ``limit`` says in messages what
    ``timeout`` (seconds to wait) comes from and ``key`` what sets the number of workers;
    ``reading`` is where ``make`` notes what it reads.
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
        key: str = "workers",
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.limit, self.reading, self.key = limit, reading, key
        self._workers: Sequence[BaseProcess] = []
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
        try:
            made = iter(self._loader)
        except OSError as error:  # the queues' locks lie there, too
            raise WorkerError(
                f"loader workers cannot start: {error}\n    {_remedy(self.key)}"
            ) from error
        self._workers = getattr(made, "_workers", [])
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
                    if isinstance(item.error, _NoMemory):
                        self.explain(item.error)
                    raise item.error from _WorkerTraceback(item.trace)
                yield item
        finally:
            # Not left to the garbage collector: an error's traceback keeps the iterator alive, and
            # workers that Python kills when it ends look to torch like workers that died.
            shut_down = getattr(made, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
                for worker in self._workers:
                    worker.kill()  # one that hangs

    def explain(self, error: Exception) -> None:
        """Raise a ``WorkerError`` that names the sample if ``error`` is of a worker's end or delay.

        A killed worker is noticed by a signal handler, so the error may come up anywhere in a step.
        """
        if not self._loader.num_workers:
            return
        what = WorkerError.of(error)
        if what is not None and any(each.exitcode == -signal.SIGBUS for each in self._workers):
            what = f"{MEMORY}: {_UNUSABLE}"
        if "DataLoader timed out" in str(error):
            what = f"no batch came within {self.limit}"
        if what is not None:
            remedy = f"\n    {_remedy(self.key)}" if what.startswith(MEMORY) else ""
            raise WorkerError(
                f"{what}; last read by {self.reading.describe()}{remedy}\n    {error}"
            ) from error


@frozen
class _Unmade:
    """Why something could not be made; raised in a worker, torch would keep its text alone."""

    error: Exception
    trace: str

    @classmethod
    def of(cls, error: Exception) -> _Unmade:
        blame(error)
        trace = "".join(traceback.format_exception(error))
        try:
            take_blame(error, pickle.loads(pickle.dumps(error)))  # it must arrive, too
        except Exception:  # one that cannot be made of its message alone, say
            plain = RuntimeError(f"{type(error).__name__}: {error}")
            return cls(take_blame(plain, error), trace)
        return cls(error, trace)


class _WorkerTraceback(Exception):
    """The traceback of an error that came from a worker."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _Pickled:
    """Something on its way out of a worker.

    Pickled where it is made, and tensors moved to shared memory: at what torch's own thread fails
    is lost, and nobody hears of it before the timeout.
    """

    def __init__(self, item: Any) -> None:
        try:
            self.data = bytes(ForkingPickler.dumps(item))
        except RuntimeError as error:
            if "shared memory" in str(error):
                raise _NoMemory(str(error)) from error
            raise

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self.data,)


class _Made(TorchDataset[Any]):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Any:
        if get_worker_info() is None:
            return self.make(key)
        try:
            return _Pickled(self.make(key))
        except Exception as error:
            return _Pickled(_Unmade.of(error))


class _Yielded(IterableDataset[Any]):
    def __init__(self, make: Callable[[int], Iterable[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            yield from self.make(0)
            return
        try:
            for item in self.make(worker.id):
                yield _Pickled(item)
        except Exception as error:
            yield _Pickled(_Unmade.of(error))


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
