"""What a check of a ``pretrain`` recipe finds: mistakes, and the report of a sound one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import nn

from dinov3_framework.contracts import Augmentation, Dataset, Loss
from dinov3_framework.engine.distributed import pick_device
from dinov3_framework.engine.networks import Blueprint, head_name
from dinov3_framework.engine.objective import check_needs
from dinov3_framework.engine.optimizer import lr_factor
from dinov3_framework.engine.parallel_check import (
    backbone_problems,
    machine_problems,
    parallel_problems,
    parallel_rows,
)
from dinov3_framework.engine.settings import PretrainConfig
from dinov3_framework.errors import Problem
from dinov3_framework.schedules import Schedule

# Figures that metrics.jsonl has of every run; a loss is logged by its name.
_FIGURES = {"iteration", "loss", "images_per_second", "data_wait"} | {
    "lr",
    "last_layer_lr",
    "weight_decay",
    "momentum",
}


@attrs.frozen
class Parts:
    """What a recipe's data pass through; cheap to build."""

    augmentation: Augmentation
    losses: Mapping[str, Loss]
    blueprint: Blueprint


def config_problems(config: PretrainConfig, world_size: int) -> list[Problem]:
    """What can be told without building anything; raises as ``pick_device`` does."""
    return [
        *parallel_problems(config.parallel, world_size),
        *machine_problems(config.parallel, pick_device(config.parallel.device)),
        *_batch_problems(config, world_size),
        *_schedule_problems(config),
        *_channel_problems(config),
        *_loss_problems(config),
    ]


def parts_problems(config: PretrainConfig, parts: Parts) -> list[Problem]:
    """What does not fit together."""
    return [
        *backbone_problems(config.parallel, parts.blueprint.backbone),
        *check_needs(parts.losses, parts.augmentation),
        *_view_problems(parts),
        *_mask_problems(parts),
    ]


def sections(
    config: PretrainConfig, parts: Parts, dataset: Dataset | None, world_size: int
) -> dict[str, list[tuple[str, str]]]:
    """The report of a check; ``dataset`` is None where this machine does not have it."""
    return {
        "parameters": _parameter_rows(parts.blueprint),
        "batch": _batch_rows(config, parts, world_size),
        "parallel": parallel_rows(config.parallel, parts.blueprint.backbone, world_size),
        "schedule": _schedule_rows(config),
        "data": _data_rows(config, dataset),
    }


# ---------------------------------------------------------------------- what can be wrong
def _batch_problems(config: PretrainConfig, world_size: int) -> Iterator[Problem]:
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


def _schedule_problems(config: PretrainConfig) -> Iterator[Problem]:
    for where, schedule in _schedules(config, ""):
        for complaint in schedule.problems(config.iterations):
            yield Problem(where, complaint)


def _schedules(config: Any, prefix: str) -> Iterator[tuple[str, Schedule]]:
    """Every schedule in a config, with its key path."""
    if isinstance(config, Mapping):
        items = list(config.items())
    else:
        items = [(a.name, getattr(config, a.name)) for a in attrs.fields(type(config))]
    for name, value in items:
        if isinstance(value, Schedule):
            yield f"{prefix}{name}", value
        elif attrs.has(type(value)) or isinstance(value, Mapping):
            yield from _schedules(value, f"{prefix}{name}.")


def _channel_problems(config: PretrainConfig) -> Iterator[Problem]:
    given, wanted = config.backbone.in_chans, config.images.channels
    if given is not None and given != wanted:
        yield Problem(
            "backbone.in_chans",
            f"is {given}, but images.channels is {wanted}",
            "set images.channels alone (with mean and std) and leave in_chans out",
        )


def _loss_problems(config: PretrainConfig) -> Iterator[Problem]:
    if not config.losses:
        yield Problem("losses", "no loss: nothing would be learnt")
    for name in config.losses:
        if not re.fullmatch(r"[\w-]+", name):
            yield Problem(f"losses.{name}", "a name is made of letters, digits, - and _")
        elif name in _FIGURES or hasattr(nn.ModuleDict, name):
            yield Problem(f"losses.{name}", "the engine has this name for itself", "choose another")


def _view_problems(parts: Parts) -> Iterator[Problem]:
    patch = parts.blueprint.backbone.patch_size
    for name, view in parts.augmentation.views.items():
        if view.crops and view.size % patch:
            yield Problem(
                "augmentation",
                f"{name} crops of {view.size} px are no multiple of the patch size {patch}",
                f"take {view.size // patch * patch} or {(view.size // patch + 1) * patch}",
            )
    if not any(
        need.startswith("student.") for loss in parts.losses.values() for need in loss.needs
    ):
        yield Problem("losses", "no loss reads the student: nothing would be learnt")


def _mask_problems(parts: Parts) -> Iterator[Problem]:
    backbone = parts.blueprint.backbone
    for name, loss in parts.losses.items():
        if "masks" in loss.needs and not backbone.takes_masks:
            yield Problem(
                f"losses.{name}",
                f"needs masked patches, which a {type(backbone).__name__} cannot replace",
                f'leave it out (drop = ["losses.{name}"]), or take a backbone with a mask token',
            )


# ---------------------------------------------------------------------- what a check shows
def _parameter_rows(blueprint: Blueprint) -> list[tuple[str, str]]:
    rows = [("backbone", _count(blueprint.backbone))]
    rows += [(head_name(n), _count(projector)) for n, projector in blueprint.projectors.items()]
    if blueprint.anchors:
        rows.append(("anchors", ", ".join(blueprint.anchors)))
    return rows


def _count(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"


def _batch_rows(config: PretrainConfig, parts: Parts, world: int) -> list[tuple[str, str]]:
    per_pass = config.batch_size // (world * config.accumulation_steps)
    views = [f"{v.crops} {name} of {v.size} px" for name, v in parts.augmentation.views.items()]
    rows = [
        ("images per step", f"{config.batch_size:,}"),
        ("split", f"{world} x {config.accumulation_steps} passes x {per_pass} images"),
        ("crops per image", ", ".join(views)),
    ]
    if config.accumulation_steps > 1:
        seeing = [name for name, loss in parts.losses.items() if loss.sees_batch]
        if seeing:
            rows.append(("see one pass at a time", ", ".join(seeing)))
    return rows


def _schedule_rows(config: PretrainConfig) -> list[tuple[str, str]]:
    total, factor = config.iterations, lr_factor(config.optimizer, config.batch_size)
    lr = config.optimizer.lr.scaled(factor)
    rows = [("iterations", f"{total:,}"), ("lr", _course(lr, total))]
    if factor != 1:
        rows.append(("lr factor", f"{factor:g} ({config.optimizer.lr_scaling})"))
    rows.append(("weight decay", _course(config.optimizer.weight_decay, total)))
    rows.append(("teacher momentum", _course(config.teacher.momentum, total)))
    rows += [
        (f"losses.{where}", _course(schedule, total))
        for where, schedule in _schedules(config.losses, "")
    ]
    return rows


def _course(schedule: Schedule, total: int) -> str:
    """A schedule at five places of the run, or one number if it does not move."""
    values = [schedule.at(round(part * (total - 1) / 4), total) for part in range(5)]
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return " -> ".join(f"{value:.3g}" for value in values)


def _data_rows(config: PretrainConfig, dataset: Dataset | None) -> list[tuple[str, str]]:
    seen = config.iterations * config.batch_size
    rows = [("images seen", f"{seen:,}")]
    if dataset is not None:
        rows.insert(0, ("dataset", dataset.describe()))
        rows.append(("passes over the data", f"{seen / len(dataset):.2f}"))
    return rows
