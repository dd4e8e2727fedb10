"""What a run does together with others that train beside it in the same job; by default nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.runtime.agreement import OwnErrors, broadcast_from_rank0, run_on_all_ranks

T = TypeVar("T")


class NullCoordinator:
    """A run without others beside it."""

    is_alone = True

    @property
    def is_logging_rank(self) -> bool:
        """Whether the main process of this run writes to the console."""
        return True

    def next(self, items: Iterator[T]) -> T:
        """This process's next item; if any process gets none, all end here and nobody waits."""
        with OwnErrors():
            return run_on_all_ranks(next, items)

    def any_stop(self, stop: bool) -> bool:
        """Whether a process of another run was asked to stop; this run's own step reduces its."""
        return stop

    def announce_exit(self, reason: str) -> None:
        """Let the others, who are at :meth:`gather_exit_reasons`, know that this run ends."""

    def gather_exit_reasons(self) -> list[str]:
        """Why other runs have ended in this step; to be called once a step."""
        return []

    def resumable_steps(self, store: CheckpointStore) -> list[int]:
        """Iterations that all of them could go on after, the newest first."""
        steps: list[int] = broadcast_from_rank0(store.steps)
        return steps[::-1]

    def resume(self, trainer: Any) -> bool:
        """Let a ``Trainer`` go on from its newest sound checkpoint; whether there was one."""
        resumed: bool = trainer.resume()
        return resumed
