"""One process of a run, from its process group to its exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import cast

import torch.distributed as dist

from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.errors import ExitCode, PeerError, UserError, first_few
from dinov3_framework.kinds import TaskConfig
from dinov3_framework.recipes.toml_text import KeyPath
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.console import PrintableFormatter, console_handler
from dinov3_framework.runtime.durable import unwritable
from dinov3_framework.runtime.environment import note_start
from dinov3_framework.runtime.output import prepared
from dinov3_framework.runtime.processes import missing_ranks, pick_device, process_group

log = logging.getLogger(__name__)

# Seconds that a process which lost its peers waits before it ends, so that whoever watches the
# processes hears first from the one that failed by itself.
_GIVE_WAY = 3.0


def run_task(
    task: Task,
    config: TaskConfig,
    registry: Registry,
    output_dir: Path,
    plan: Plan | None = None,
    *,
    report: str = "",
    device: str = "auto",
    timeout: float = 600.0,
) -> int:
    """Run a checked task in this process and return the exit code.

    Every process of the run calls this. ``report`` is the check's, for the log; ``device`` is
    ``auto``, ``cpu`` or ``cuda``; ``timeout`` (seconds) holds for every collective.
    """
    with process_group(pick_device(device), timeout), _console(), _peers(timeout):
        run_here(task, config, registry, output_dir, plan=plan, report=report)
    return ExitCode.OK


def prepare_output(
    config: TaskConfig, registry: Registry, output_dir: Path, report: str = ""
) -> None:
    """Make the folder ready for processes to come, as ``prepared`` does, and log ``report``."""
    with prepared(config, registry, output_dir):
        if report:
            with log_file(output_dir, report):
                pass


def run_here(
    task: Task,
    config: TaskConfig,
    registry: Registry,
    output_dir: Path,
    inherited: Iterable[KeyPath] = (),
    plan: Plan | None = None,
    report: str = "",
) -> None:
    """Run a checked task in the process group that is open, in a folder and with a log of its own.

    Every process of the run calls this. The main one prepares and holds the output folder; what it
    has to complain about ends the others too, without a word. ``inherited`` as for ``prepared``;
    ``report`` goes into the log.
    """
    with ExitStack() as held:
        complaint = None
        if collectives.is_main():
            try:
                held.enter_context(prepared(config, registry, output_dir, inherited))
                note_start(output_dir, registry)
                held.enter_context(log_file(output_dir, report))
            except UserError as error:
                complaint = error
        told = cast(UserError | None, collectives.all_gather_object(complaint)[0])
        if told is not None:
            told.shared = True
            raise told
        task.run(output_dir, plan)


@contextmanager
def _peers(timeout: float) -> Iterator[None]:
    """Say in a line what torch says in pages when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not (collectives.is_distributed() and _is_of_a_collective(error)):
            raise
        missing = first_few(missing_ranks(_GIVE_WAY), separator="; ")
        raise PeerError(
            "another process of the run ended, or did not come to a collective within "
            f"parallel.timeout = {timeout:g} s{f' ({missing})' if missing else ''}; what failed "
            "there first is the cause\n"
            f"    here: {str(error).splitlines()[0]}"
        ) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextmanager
def _console() -> Iterator[None]:
    """The main process says what it does, the others their warnings."""
    root = logging.getLogger("dinov3_framework")
    if collectives.is_main():
        handler = console_handler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PrintableFormatter(f"[rank {collectives.rank()}] %(message)s"))
        handler.setLevel(logging.WARNING)
    level = root.level
    root.setLevel(logging.INFO)
    # Libraries' warnings: into the main process's file, and not once per process on the console.
    with _handled(handler, root), _handled(logging.NullHandler(), _captured()):
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.setLevel(level)


class _LogFile(logging.FileHandler):
    """A log whose disk may fill: that is said once and does not end the run, which goes on for as
    long as nothing that it needs finds no room."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            print(unwritable(error, Path(self.baseFilename)), file=sys.stderr, flush=True)

    def close(self) -> None:
        with suppress(OSError):  # it tries once more to write what found no room
            super().close()


@contextmanager
def log_file(output_dir: Path, report: str = "") -> Iterator[None]:
    """Everything that the main process logs goes to ``run.log``, too, after ``report``."""
    try:
        if report:
            with (output_dir / "run.log").open("a", encoding="utf-8", errors="replace") as log:
                log.write(f"{report}\n\n")
        file = _LogFile(output_dir / "run.log", encoding="utf-8")
    except OSError as error:
        raise unwritable(error, output_dir / "run.log") from error
    file.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    with _handled(file, logging.getLogger("dinov3_framework"), _captured()):
        yield


def _captured() -> logging.Logger:
    return logging.getLogger("py.warnings")


@contextmanager
def _handled(handler: logging.Handler, *loggers: logging.Logger) -> Iterator[None]:
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
