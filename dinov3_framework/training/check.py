"""What a check of any training finds in its recipe, and what it shows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from dinov3_framework.errors import Problem
from dinov3_framework.schedules import Schedule
from dinov3_framework.training import TrainingConfig
from dinov3_framework.training.optimizer import lr_factor


def batch_problems(config: TrainingConfig, world_size: int) -> Iterator[Problem]:
    share = world_size * config.accumulation_steps
    if config.batch_size % share:
        lower, upper = config.batch_size // share * share, -(-config.batch_size // share) * share
        near = f"{lower} or {upper}" if lower else str(upper)
        yield Problem(
            "batch_size",
            f"{config.batch_size} images cannot be split over {world_size} processes x "
            f"accumulation_steps = {config.accumulation_steps}",
            f"take {near}",
        )


def schedule_problems(config: TrainingConfig) -> Iterator[Problem]:
    for where, schedule in schedules(config):
        for complaint in schedule.problems(config.iterations):
            yield Problem(where, complaint)


def schedules(config: Any, prefix: str = "") -> Iterator[tuple[str, Schedule]]:
    """Every schedule in a config, with its key path."""
    if isinstance(config, Mapping):
        items = list(config.items())
    else:
        items = [(a.name, getattr(config, a.name)) for a in attrs.fields(type(config))]
    for name, value in items:
        if isinstance(value, Schedule):
            yield f"{prefix}{name}", value
        elif attrs.has(type(value)) or isinstance(value, Mapping):
            yield from schedules(value, f"{prefix}{name}.")


def optimizer_rows(config: TrainingConfig) -> list[tuple[str, str]]:
    """Iterations and the optimizer's schedules, for a check's report."""
    total, factor = config.iterations, lr_factor(config.optimizer, config.batch_size)
    rows = [("iterations", f"{total:,}"), ("lr", course(config.optimizer.lr.scaled(factor), total))]
    if factor != 1:
        rows.append(("lr factor", f"{factor:g} ({config.optimizer.lr_scaling})"))
    rows.append(("weight decay", course(config.optimizer.weight_decay, total)))
    return rows


def course(schedule: Schedule, total: int) -> str:
    """A schedule at five places of the run, or one number if it does not move."""
    values = [schedule.at(round(part * (total - 1) / 4), total) for part in range(5)]
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return " -> ".join(f"{value:.3g}" for value in values)
