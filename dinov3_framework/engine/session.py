"""One process of a run, from its process group to its exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from dinov3_framework import collectives
from dinov3_framework.configs import TaskConfig
from dinov3_framework.contracts import Task
from dinov3_framework.engine.console import console_handler
from dinov3_framework.engine.distributed import pick_device, process_group
from dinov3_framework.engine.output import locked, prepare_output
from dinov3_framework.engine.settings import ParallelConfig
from dinov3_framework.errors import ExitCode, UserError
from dinov3_framework.registry import Registry

__all__ = ["prepare_output", "run_task"]

log = logging.getLogger(__name__)


def run_task(task: Task, config: TaskConfig, registry: Registry, output_dir: Path) -> int:
    """Run a checked task in this process and return the exit code.

    Every process of the run calls this. The main one prepares and holds the output folder; what it
    has to complain about ends the others too, without a word.
    """
    parallel = getattr(config, "parallel", ParallelConfig())
    device = pick_device(parallel.device)
    with process_group(device, parallel.timeout):
        complaint = _prepare(config, registry, output_dir) if collectives.is_main() else None
        complaint = collectives.all_gather_object(complaint)[0]  # type: ignore[assignment]
        if complaint is not None:
            if collectives.is_main():
                raise complaint
            return complaint.exit_code
        holding = locked(output_dir) if collectives.is_main() else nullcontext()
        with holding, _logging(output_dir):
            task.run(output_dir)
    return ExitCode.OK


def _prepare(config: TaskConfig, registry: Registry, output_dir: Path) -> UserError | None:
    try:
        prepare_output(config, registry, output_dir)
    except UserError as error:
        return error
    return None


@contextmanager
def _logging(output_dir: Path) -> Iterator[None]:
    """The main process logs to ``run.log`` and the console, the others their warnings."""
    root = logging.getLogger("dinov3_framework")
    handlers: list[logging.Handler]
    if collectives.is_main():
        file = logging.FileHandler(output_dir / "run.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers = [file, console_handler()]
        root.setLevel(logging.INFO)
    else:
        other = logging.StreamHandler(sys.stderr)
        other.setFormatter(logging.Formatter(f"[rank {collectives.rank()}] %(message)s"))
        handlers = [other]
        root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
