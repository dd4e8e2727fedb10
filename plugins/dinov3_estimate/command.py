"""The flag ``--rehearse`` of ``dinov3-run``."""

from __future__ import annotations

from dinov3_framework import Task, UserError
from dinov3_framework.recipes.describe import report_text


def rehearse(task: Task, world_size: int, accelerator: str = "h100") -> str:
    """The text of an estimate; raises ``UserError`` for a task that does not train."""
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: there is at least one process")
    return report_text(task.rehearse(world_size, accelerator))
