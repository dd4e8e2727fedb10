"""Promises of a task before it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.kinds import TaskConfig
from dinov3_framework.registry import Registry
from dinov3_framework.testing.subject import Subject


def check_task(
    config: TaskConfig,
    *,
    registry: Registry | None = None,
    factory: Callable[..., Any] | None = None,
    world_size: int = 1,
) -> None:
    """Check what a task says of a recipe that is right; it is not run.

    Promises: ``check(world_size)`` gives a ``Plan`` of sections of (label, value) rows, says the
    same when asked again, and writes nothing into the working directory or ``output_dir``.
    """
    known = registry if registry is not None else Registry.load()
    subject = Subject.of("task", config, known, factory, registry=known)
    task: Task = subject.built(Task)
    folders = [Path.cwd(), *([Path(config.output_dir)] if config.output_dir is not None else [])]
    before = [_entries(folder) for folder in folders]
    with subject.doing(f"check({world_size})"):
        report, again = task.check(world_size), task.check(world_size)
    subject.require(
        before == [_entries(folder) for folder in folders],
        f"check() wrote into {' or '.join(map(str, folders))}",
    )
    subject.require(isinstance(report, Plan), f"check() must give a Plan, gave {report!r}")
    for section, rows in report.sections.items():
        subject.require(
            all(len(row) == 2 and all(isinstance(text, str) for text in row) for row in rows),
            f"the section {section!r} of the report must hold (label, value) rows of text",
        )
    subject.require(
        all(isinstance(text, str) for text in report.missing), "missing must be lines of text"
    )
    subject.require(report == again, "check() reports something else when asked again")


def _entries(folder: Path) -> list[str] | None:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
