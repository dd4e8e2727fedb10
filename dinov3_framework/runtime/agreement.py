"""Doing something on every process such that all of them know whether it worked.

A process that raises on its own leaves the others waiting in the next collective until its
timeout; here the outcomes are exchanged first, and all raise together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, cast

import torch
from attrs import frozen

from dinov3_framework.blame import describe_error
from dinov3_framework.errors import CheckpointError, ExitCode, PeerError, UserError, first_few
from dinov3_framework.runtime import collectives

T = TypeVar("T")
P = ParamSpec("P")


@frozen
class Failure:
    """What went wrong on one rank, without the exception itself (some cannot be sent)."""

    rank: int
    text: str
    errno: int | None = None
    exit_code: int = ExitCode.FAILED

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        code = error.exit_code if isinstance(error, UserError) else ExitCode.FAILED
        return cls(rank, describe_error(error), getattr(error, "errno", None), int(code))


class RankFailure(Exception):
    """At least one rank failed; raised on all of them, with the same failures.

    ``own`` is this rank's exception, if it is one of those that failed.
    """

    def __init__(self, failures: Sequence[Failure], own: Exception | None = None) -> None:
        self.failures, self.own = list(failures), own
        texts = {failure.text for failure in failures}
        if len(texts) == 1 and len(failures) == collectives.world_size():
            super().__init__(texts.pop())
            return
        shown = (f"rank {failure.rank}: {failure.text}" for failure in self.failures)
        super().__init__(first_few(shown, separator="; "))

    def for_person(self) -> Exception:
        """What to raise where no more can be said: this rank's own error, or the others'."""
        return self.own if self.own is not None else CheckpointError(str(self))

    def for_process(self) -> Exception:
        """What this process ends with: its own error, or word of another's, with its exit code."""
        if self.own is not None:
            return self.own
        error = PeerError(str(self))
        error.exit_code = ExitCode(self.failures[0].exit_code)
        return error


class OwnErrors:
    """A context in which a :class:`RankFailure` becomes what this process ends with.

    Not a generator: one of those errors may be a ``StopIteration``.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RankFailure):
            found = error.for_process()
            raise found from found.__cause__  # a worker's traceback, perhaps


def run_on_all_ranks(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``action`` on every process; the result is this process's own.

    To be called by every process. If ``action`` raises on any, every process raises
    :class:`RankFailure`. While nothing goes wrong it costs one all-reduce of a number on the CPU.
    """
    own: Exception | None = None
    try:
        result = action(*args, **kwargs)
    except Exception as error:
        own = error
    if not collectives.all_reduce_max(torch.tensor(int(own is not None))).item():
        return result
    failure = None if own is None else Failure.of(collectives.place_of(collectives.rank()), own)
    outcomes = cast(list[Failure | None], collectives.all_gather_object(failure))
    failures = [outcome for outcome in outcomes if outcome is not None]
    raise RankFailure(failures, own) from own


def gather_from_all_ranks(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
    """As :func:`run_on_all_ranks`, with all results, by rank; they must be picklable and small."""
    result = run_on_all_ranks(action, *args, **kwargs)
    return cast(list[T], collectives.all_gather_object(result))


def broadcast_from_rank0(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``action`` on rank 0 alone; every process gets its result, or raises as if it had run."""

    def on_main() -> T | None:
        return action(*args, **kwargs) if collectives.is_main() else None

    return cast(T, gather_from_all_ranks(on_main)[0])
