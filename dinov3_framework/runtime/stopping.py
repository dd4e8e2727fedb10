"""Being asked to stop: signals set a flag, the training loop decides when."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import ClassVar

from dinov3_framework.errors import ExitCode, StopRequested

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, SIGUSR2 or Ctrl-C for the duration of a ``with``.

    A handler runs in the middle of anything, so it only takes note; a second Ctrl-C interrupts at
    once, for whoever does not want to wait for the checkpoint.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received is not None and kind is None:
            LateSignal.note(self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def stopped(self, after: str) -> StopRequested:
        """The error that ends the process ``after`` something whose state was saved."""
        return _stopped(self.received, after)


class LateSignal:
    """Remembers, for the duration of a ``with``, a signal that a :class:`StopFlag` took too late.

    One that comes in the last step of a run changes nothing there; it does to what follows.
    """

    _listening: ClassVar[list[LateSignal]] = []

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @classmethod
    def note(cls, received: signal.Signals) -> None:
        for each in cls._listening:
            each.received = received

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> LateSignal:
        self._listening.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.remove(self)

    def stopped(self, after: str) -> StopRequested:
        """The error that ends the process ``after`` something that is complete."""
        return _stopped(self.received, after)


def _stopped(received: signal.Signals | None, after: str) -> StopRequested:
    name = received.name if received is not None else "another process"
    error = StopRequested(
        f"Stopped by {name} after {after}; the state is saved, the same command goes on from there."
    )
    if received == signal.SIGINT:
        error.exit_code = ExitCode.INTERRUPTED
    return error
