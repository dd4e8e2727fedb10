"""The flag ``--rehearse`` of ``dinov3-run``."""

from __future__ import annotations

from typing import Any

from dinov3_estimate.report import sections
from dinov3_estimate.simulated import SimulatedRank
from dinov3_estimate.step import simulate
from dinov3_estimate.timing import accelerator as known
from dinov3_framework import Task, UserError
from dinov3_framework.configs import replace
from dinov3_framework.contracts.running import Plan
from dinov3_framework.data.loader import Layout
from dinov3_framework.recipes.describe import report_text
from dinov3_framework.training.task import SideBySide


def rehearse(task: Task, world_size: int, accelerator: str = "h100") -> str:
    """The text of an estimate; raises ``UserError`` for a task that does not train."""
    return report_text(estimate(task, world_size, accelerator))


def estimate(task: Any, world_size: int, accelerator: str = "h100") -> Plan:
    """What a training's step takes on so many processes; nothing is fetched, read or written."""
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: there is at least one process")
    machine = known(accelerator)
    if not hasattr(task, "side_by_side"):
        raise UserError(f"a {type(task).__name__} cannot be estimated: only trainings can")
    registry, config = task.registry, replace(task.config, output_dir=None)
    task = registry.build(config, registry=registry)
    task.simulated = True
    trainings = task.side_by_side(world_size)
    missing = task.check(world_size).missing
    found = {each.name: simulate(each.task, fullest_rank(each, trainings)) for each in trainings}
    return Plan(sections(config, found, machine), missing)


def fullest_rank(training: SideBySide, trainings: list[SideBySide]) -> SimulatedRank:
    """The first of a training's processes that have the largest share of the job's batch."""
    config, world = training.task.config, sum(len(each.ranks) for each in trainings)

    def images(rank: int) -> int:
        return len(Layout(world, rank, config.accumulation_steps, config.batch_size).places(0, 0))

    spans = [each.ranks for each in trainings] if len(trainings) > 1 else []
    return SimulatedRank(world, max(training.ranks, key=images), spans)
