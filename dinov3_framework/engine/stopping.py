"""Being asked to stop: signals set a flag, the training loop decides when."""

from __future__ import annotations

import signal
from types import FrameType

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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def stopped(self, iteration: int) -> StopRequested:
        """The error that ends the process after its state was saved."""
        name = self.received.name if self.received is not None else "another process"
        error = StopRequested(
            f"Stopped by {name} after iteration {iteration:,}; the state is saved, the same "
            "command goes on from there."
        )
        if self.received == signal.SIGINT:
            error.exit_code = ExitCode.INTERRUPTED
        return error
