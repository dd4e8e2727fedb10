"""Runs that go side by side in one job, step by step: several students of one teacher.

Each is a run of its own on some of the processes. What one of them does to the others goes through
here: a batch that somebody does not get, a signal to stop, a student that diverged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from attrs import frozen

from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import RankFailure, together

T = TypeVar("T")


class Alone:
    """A run without others beside it."""

    is_alone = True

    def next(self, items: Iterator[T]) -> T:
        """This process's next item; if anybody gets none, all end here and nobody waits."""
        try:
            return together(next, items)
        except RankFailure as failure:
            raise failure.for_process() from failure.own

    @property
    def speaks(self) -> bool:
        """Whether this run may write to the console."""
        return True

    def share(self, stop: bool) -> bool:
        """Whether anybody was asked to stop, as far as this run's own step will not tell."""
        return stop

    def leave(self, reason: str) -> None:
        """Tell the others, who are at :meth:`last_words`, that this run ends."""

    def last_words(self) -> list[str]:
        """Why others have ended in this step; to be called once a step."""
        return []


@frozen
class SideBySide(Alone):
    """One of several runs; all of them take every step together."""

    is_alone = False

    name: str  # of this run

    def next(self, items: Iterator[T]) -> T:
        with collectives.within(None):
            return super().next(items)

    @property
    def speaks(self) -> bool:
        return dist.get_rank() == 0

    def share(self, stop: bool) -> bool:
        return bool(_maximum(stop))

    def leave(self, reason: str) -> None:
        self._exchange(reason)

    def last_words(self) -> list[str]:
        return self._exchange(None)

    def _exchange(self, reason: str | None) -> list[str]:
        if not _maximum(reason is not None):
            return []
        word = None if reason is None else f"{self.name}: {reason}"
        with collectives.within(None):
            words = collectives.all_gather_object(word)
        return sorted({str(each) for each in words if each is not None})


def _maximum(flag: bool) -> int:
    """1 if the flag is set on any process there is."""
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
