"""What a person sees of a run: a progress bar on a terminal, lines in a log file."""

from __future__ import annotations

import logging
import time
from functools import cache

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


@cache
def console() -> Console:
    """The console of run output: standard error, so that pipes stay clean."""
    return Console(stderr=True, highlight=False)


def console_handler() -> logging.Handler:
    if console().is_terminal:
        return RichHandler(console=console(), show_path=False, show_time=False, show_level=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


class _Rate(ProgressColumn):
    """Loss, images per second, share of time spent waiting for data, time left."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"])


class TrainingProgress:
    """A bar on a terminal; elsewhere a line every ten seconds. Silent where not ``shown``."""

    def __init__(self, done: int, total: int, shown: bool) -> None:
        self.first, self.total, self.shown = done, total, shown
        self._started = self._printed = time.monotonic()
        self._wait = 0.0
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            _Rate(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console(),
            expand=True,
            transient=False,
            disable=not (shown and console().is_terminal),
        )
        self._task = self._bar.add_task("train", total=total, completed=done, status="starting")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, loss: float, images_per_second: float, data_wait: float) -> None:
        """One step is finished; ``data_wait`` is the seconds it waited for its batch."""
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        self._wait += data_wait
        left = (self.total - done) * elapsed / max(done - self.first, 1)
        status = (
            f"loss {loss:.3f}  {images_per_second:,.0f} images/s  "
            f"data wait {100 * self._wait / elapsed:.0f} %  {_clock(left)} left"
        )
        self._bar.update(self._task, completed=done, status=status)
        overdue = now - self._printed > _SECONDS_BETWEEN_LINES or done == self.total
        if self.shown and not console().is_terminal and overdue:
            self._printed = now
            log.info("%d/%d  %s", done, self.total, status)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
