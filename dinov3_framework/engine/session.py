"""One process of a run, from its process group to its exit code."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from dinov3_framework import collectives
from dinov3_framework.configs import TaskConfig
from dinov3_framework.contracts import Task
from dinov3_framework.engine.console import console_handler
from dinov3_framework.engine.distributed import pick_device, process_group
from dinov3_framework.engine.output import prepare_output, prepared, unwritable
from dinov3_framework.engine.settings import ParallelConfig
from dinov3_framework.errors import ExitCode, PeerError, UserError
from dinov3_framework.registry import Registry

__all__ = ["prepare_output", "run_task"]

log = logging.getLogger(__name__)

# Seconds that a process which lost its peers waits before it ends, so that whoever watches the
# processes hears first from the one that failed by itself.
_GIVE_WAY = 3.0


def run_task(task: Task, config: TaskConfig, registry: Registry, output_dir: Path) -> int:
    """Run a checked task in this process and return the exit code.

    Every process of the run calls this. The main one prepares and holds the output folder; what it
    has to complain about ends the others too, without a word.
    """
    parallel = getattr(config, "parallel", ParallelConfig())
    device = pick_device(parallel.device)
    with process_group(device, parallel.timeout), ExitStack() as held:
        complaint = None
        if collectives.is_main():
            try:
                held.enter_context(prepared(config, registry, output_dir))
                held.enter_context(_logging(output_dir))
            except UserError as error:
                complaint = error
        complaint = collectives.all_gather_object(complaint)[0]  # type: ignore[assignment]
        if complaint is not None:
            if collectives.is_main():
                raise complaint
            return complaint.exit_code
        if not collectives.is_main():
            held.enter_context(_logging(output_dir))
        with _peers(parallel.timeout):
            task.run(output_dir)
    return ExitCode.OK


@contextmanager
def _peers(timeout: float) -> Iterator[None]:
    """Say in a line what torch says in pages when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not (collectives.is_distributed() and _is_of_a_collective(error)):
            raise
        time.sleep(_GIVE_WAY)
        raise PeerError(
            "another process of the run ended, or did not come to a collective within "
            f"parallel.timeout = {timeout:g} s; what failed there first is the cause\n"
            f"    here: {str(error).splitlines()[0]}"
        ) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextmanager
def _logging(output_dir: Path) -> Iterator[None]:
    """The main process logs to ``run.log`` and the console, the others their warnings."""
    root = logging.getLogger("dinov3_framework")
    handlers: list[logging.Handler]
    if collectives.is_main():
        try:
            file = logging.FileHandler(output_dir / "run.log", encoding="utf-8")
        except OSError as error:
            raise unwritable(error, output_dir / "run.log") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers = [file, console_handler()]
    else:
        other = logging.StreamHandler(sys.stderr)
        other.setFormatter(logging.Formatter(f"[rank {collectives.rank()}] %(message)s"))
        other.setLevel(logging.WARNING)
        handlers = [other]
    root.setLevel(logging.INFO)
    # Libraries' warnings: into the main process's file, and not once per process on the console.
    captured = logging.getLogger("py.warnings")
    captured.addHandler(handlers[0] if collectives.is_main() else logging.NullHandler())
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        captured.removeHandler(handlers[0])
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
