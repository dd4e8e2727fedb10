"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Seconds of a step by phase, such as ``teacher``, ``student``, ``backward``.

    On CUDA a phase is what the stream takes from its beginning to its end, by events that are read
    when asked for; elsewhere it is the process's own time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the duration of a ``with`` to a phase, which may come several times in a step."""
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def begin(self) -> None:
        """Forget the step before."""
        self._seconds.clear()
        self._events.clear()

    def read(self) -> dict[str, float]:
        """``time/<phase>`` of the step so far; on CUDA it waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events.clear()
        return {f"time/{name}": seconds for name, seconds in self._seconds.items()}
