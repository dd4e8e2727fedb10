"""Being asked to stop, and ending with the process that this one works for.

Imports nothing heavy: signals are handled before anything else is imported.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import ClassVar, ParamSpec, TypeVar

from dinov3_framework.errors import ExitCode, StopRequested

P = ParamSpec("P")
T = TypeVar("T")

# In the environment of a process: the launcher without which it has to end.
LAUNCHER = "DINOV3_LAUNCHER_PID"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_GRACE = 60.0  # seconds that a loop may take to its next step once it was asked to stop
_UNWIND = 5.0  # seconds that an interrupted process has to clean up
_UNWIND_NOW = 1.0  # the same after a second Ctrl-C
_PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """Raised in the middle of anything by a signal that ends the process."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received


class _Handlers:
    """Handles the signals for the duration of a ``with``; SIGHUP unless nohup has it ignored."""

    received: signal.Signals | None = None

    def __enter__(self) -> None:
        self._before = {
            number: signal.signal(number, self._handle)
            for number in _SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopFlag(_Handlers):
    """Set by SIGTERM, SIGUSR2, SIGHUP or Ctrl-C for the duration of a ``with``.

    A handler runs in the middle of anything, so it only takes note; a second Ctrl-C interrupts at
    once, for whoever does not want to wait for the checkpoint. A program (:class:`EndOnSignal`)
    that was asked to stop ends without the checkpoint if a step takes longer than ``grace``
    seconds, and than twice the longest before.
    """

    active: ClassVar[StopFlag | None] = None

    def __init__(self, grace: float = _GRACE) -> None:
        self._grace, self._longest = min(grace, _GRACE), 0.0
        self._since: float | None = None  # when the step began that goes on

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopFlag:  # type: ignore[override]
        super().__enter__()
        StopFlag.active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._restore()
        StopFlag.active = None
        if self.received is not None and kind is None:
            raise self.stopped("the last step")

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise Interrupted(signal.SIGINT)
        if self.received is None and EndOnSignal.active is None:
            _say(_acknowledgment(number))
        self.received = signal.Signals(number)

    def limited(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do a step, which must not hang once a stop is asked for; what it gives."""
        started = self._since = time.monotonic()
        result = step(*args, **kwargs)
        self._since = None
        self._longest = max(self._longest, time.monotonic() - started)
        return result

    def seconds_left(self, asked: float) -> float:
        """Until a step that goes on, with a stop ``asked`` for at that time, counts as hanging."""
        if (since := self._since) is None:
            return math.inf
        return max(asked, since) + max(self._grace, 2 * self._longest) - time.monotonic()

    def stopped(self, after: str) -> StopRequested:
        """The error that ends the process ``after`` something whose state was saved."""
        name = self.received.name if self.received is not None else "another process"
        error = StopRequested(
            f"Stopped by {name} after {after}; the state is saved, the same command goes on from "
            "there."
        )
        error.exit_code = exit_code_of(self.received)
        return error


class EndOnSignal(_Handlers):
    """Ends the program on a signal, for the duration of a ``with``; for a program's own ``main``.

    The signal interrupts whatever is going on, unless a :class:`StopFlag` takes it. Imports are
    ended outright, since libraries take an interrupt there for a missing module. A thread hears of
    signals, too, for Python runs a handler only when the main thread comes back to it, from a
    collective or a read that may hang: the thread acknowledges, and ends what does not end.
    """

    active: ClassVar[EndOnSignal | None] = None

    def __init__(self) -> None:
        self.code = 0  # what the program ends with, once that is known
        self._first: signal.Signals | None = None  # that the thread has heard
        self._finishing = False
        self._asked = self._deadline = math.inf

    def __enter__(self) -> EndOnSignal:  # type: ignore[override]
        self._heard, self._tell = socket.socketpair()
        self._tell.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        super().__enter__()
        atexit.register(self._ignore)  # Python ends with the handlers of the system
        EndOnSignal.active = self
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # From here on a signal must not change what the program ends with.
        for number in self._before:
            signal.signal(number, lambda *_: os._exit(self.code))
        signal.set_wakeup_fd(self._wakeup)
        EndOnSignal.active = None
        self._tell.shutdown(socket.SHUT_RDWR)

    @classmethod
    def let_finish(cls) -> None:
        """The program ends with an error that is still to be said: interrupt it no more."""
        if cls.active is not None:
            cls.active._finishing = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None and not self._finishing:
            self.received = signal.Signals(number)
            if _is_importing(frame):
                self._end(describe_stop(self.received))
            raise Interrupted(self.received)

    def _ignore(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    # ------------------------------------------------------------------ the thread
    def _listen(self) -> None:
        while True:
            flag = StopFlag.active
            left = self._deadline - time.monotonic()
            if flag is not None and self._asked < math.inf:
                left = min(left, flag.seconds_left(self._asked), 1.0)  # a step may begin
            if left <= 0:
                hangs = flag is not None and self._deadline == math.inf
                note = " (no step was reached)" if hangs else ""
                self._end(f"{describe_stop(self._first)}{note}")
            self._heard.settimeout(None if left == math.inf else left)
            try:
                numbers = self._heard.recv(64)
            except TimeoutError:
                continue
            if not numbers:
                return
            for number in numbers:
                if number in _SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        now, flag = time.monotonic(), StopFlag.active
        if self._first is not None:
            if number == signal.SIGINT:
                self._deadline = now + _UNWIND_NOW
            return
        self._first = number
        if flag is not None:
            self._asked = now
            _say(_acknowledgment(number))
        elif signal.getsignal(number) == self._handle:  # or else a launcher has its own ways
            _say("")
            self._deadline = now + _UNWIND

    def _end(self, words: str) -> None:
        _say(f"{words}\x1b[?25h" if os.isatty(2) else words)  # the cursor, which a bar hides
        os._exit(exit_code_of(self.received or self._first))


def describe_stop(received: signal.Signals | None) -> str:
    """What to say of a process that a signal has interrupted."""
    if received in (None, signal.SIGINT):
        return "interrupted"
    return f"stopped by {received.name}; the same command goes on from what is saved"


def exit_code_of(received: signal.Signals | None) -> ExitCode:
    return ExitCode.INTERRUPTED if received == signal.SIGINT else ExitCode.REQUEUE


def end_with(parent: int | None) -> None:
    """Have the kernel end this process, a child of ``parent``, as soon as that one has ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before
        os.kill(os.getpid(), signal.SIGKILL)


def _acknowledgment(number: int) -> str:
    words = "stopping after this step, saving"
    if number == signal.SIGINT:
        return f"{words}; Ctrl-C again to quit now"
    return f"{signal.Signals(number).name}: {words}"


def _say(text: str) -> None:
    """Write a line to stderr past Python's streams, which may be in the middle of another.

    A stream that nobody reads any more, a closed terminal say, is replaced, so that what is still
    to be written does not fail.
    """
    if os.environ.get("RANK", "0") != "0":
        text = ""
    start = "\n" if os.isatty(2) else ""  # behind a progress bar
    for stream, data in ((2, f"{start}{text}\n".encode() if text else b""), (1, b"")):
        try:
            os.write(stream, data)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _forget_signals() -> None:
    """In a forked child, whose signals are not its parent's."""
    if EndOnSignal.active is not None:
        signal.set_wakeup_fd(-1)
        EndOnSignal.active = None


os.register_at_fork(after_in_child=_forget_signals)
