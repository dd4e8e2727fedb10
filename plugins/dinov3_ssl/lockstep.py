"""Runs that go side by side in one job, step by step: several students of one teacher.

Each is a run of its own on some of the processes. What one of them does to the others goes through
here: a batch that somebody does not get, a signal to stop, a student that diverged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from attrs import frozen

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.errors import CheckpointError
from dinov3_framework.runtime import collectives
from dinov3_framework.training.coordination import NullCoordinator
from dinov3_framework.training.trainer import Trainer

log = logging.getLogger("dinov3_framework.ssl")

T = TypeVar("T")


@frozen
class Lockstep(NullCoordinator):
    """One of several runs; all of them take every step together."""

    is_alone = False

    name: str  # of this run

    def next(self, items: Iterator[T]) -> T:
        with collectives.within(None):
            return super().next(items)

    @property
    def is_logging_rank(self) -> bool:
        return dist.get_rank() == 0

    def any_stop(self, stop: bool) -> bool:
        return bool(maximum(stop))

    def announce_exit(self, reason: str) -> None:
        self._exchange(reason)

    def gather_exit_reasons(self) -> list[str]:
        return self._exchange(None)

    def resumable_steps(self, store: CheckpointStore) -> list[int]:
        own = set(store.steps())
        with collectives.within(None):
            everyone = cast("list[set[int]]", collectives.all_gather_object(own))
        return sorted(set.intersection(*everyone), reverse=True)

    def resume(self, trainer: Trainer) -> bool:
        steps = self.resumable_steps(trainer.store)
        for step in steps:
            try:
                found, complaint = trainer.resume(step), ""
            except CheckpointError as error:
                found, complaint = False, str(error)
            with collectives.within(None):
                words = collectives.all_gather_object((found, self.name, complaint))
            outcomes = cast("list[tuple[bool, str, str]]", words)
            if all(ok for ok, _, _ in outcomes):
                return True
            trouble = {f"{name}: {text}" for ok, name, text in outcomes if not ok}
            log.warning("Iteration %d cannot be gone on from: %s", step, "; ".join(sorted(trouble)))
        if steps:
            raise CheckpointError(
                "there is no iteration of which every student has a sound checkpoint; start in "
                "another output folder"
            )
        return False

    def _exchange(self, reason: str | None) -> list[str]:
        if not maximum(reason is not None):
            return []
        word = None if reason is None else f"{self.name}: {reason}"
        with collectives.within(None):
            words = collectives.all_gather_object(word)
        return sorted({str(each) for each in words if each is not None})


def maximum(flag: bool) -> int:
    """1 if the flag is set on any process there is."""
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
