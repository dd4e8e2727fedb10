"""The ``pretrain`` task: from a checked recipe to a trained teacher and its export."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from dinov3_framework import collectives
from dinov3_framework.configs import BackboneConfig, replace
from dinov3_framework.contracts import Augmentation, Dataset, Loss, Report, Task
from dinov3_framework.engine.agreement import RankFailure, together
from dinov3_framework.engine.checkpoint import CheckpointStore
from dinov3_framework.engine.console import print_table
from dinov3_framework.engine.distributed import pick_device
from dinov3_framework.engine.export import export_backbone
from dinov3_framework.engine.loader import BatchMaker, Layout
from dinov3_framework.engine.networks import Blueprint, Networks, head_name
from dinov3_framework.engine.objective import Objective, check_needs
from dinov3_framework.engine.optimizer import Optimizer, lr_factor
from dinov3_framework.engine.output import write_results
from dinov3_framework.engine.parallel import Sharder
from dinov3_framework.engine.run import TrainingRun
from dinov3_framework.engine.settings import PretrainConfig
from dinov3_framework.engine.statedict import full_state_dict
from dinov3_framework.engine.trainer import Trainer
from dinov3_framework.errors import DataError, Problem, RecipeError, UserError
from dinov3_framework.registry import Registry
from dinov3_framework.schedules import Schedule
from dinov3_framework.structure import unstructure

log = logging.getLogger(__name__)

EXPORT = "exports/teacher_backbone.safetensors"
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


class Pretrain(Task):
    """Pretrains a backbone with any losses under a momentum teacher."""

    def __init__(self, config: PretrainConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Report:
        config = self.config
        problems = [*_batch_problems(config, world_size), *_schedule_problems(config)]
        problems += [*_channel_problems(config), *_loss_problems(config)]
        pick_device(config.parallel.device)
        if problems:
            raise RecipeError(problems)
        missing: list[str] = []
        try:
            dataset = self._dataset()
        except DataError as error:
            missing.append(str(error))
            dataset = None
        parts = self._parts()
        self._check_observers()
        problems = check_needs(parts.losses, parts.augmentation)
        problems += _view_problems(parts)
        if problems:
            raise RecipeError(problems)
        return Report(
            {
                "parameters": _parameter_rows(parts.blueprint),
                "batch": _batch_rows(config, parts, world_size),
                "schedule": _schedule_rows(config),
                "data": _data_rows(config, dataset),
            },
            missing,
        )

    def _dataset(self) -> Dataset:
        config = self.config
        dataset: Dataset = self.registry.build(config.dataset, channels=config.images.channels)
        if len(dataset) == 0:
            raise DataError(f"{dataset.describe()}: holds no image")
        return dataset

    def _parts(self) -> Parts:
        config = self.config
        losses = {name: self.registry.build(loss) for name, loss in config.losses.items()}
        blueprint = Blueprint.draw(self.registry, resolved_backbone(config), losses)
        augmentation = self.registry.build(
            config.augmentation,
            channels=config.images.channels,
            patch_size=blueprint.backbone.patch_size,
        )
        return Parts(augmentation, losses, blueprint)

    def _check_observers(self) -> None:
        for name, observer in self.config.observers.items():
            try:
                self.registry.build(observer)
            except UserError as error:
                raise RecipeError([Problem(f"observers.{name}", str(error))]) from error

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path) -> None:
        started = time.time()
        device = pick_device(self.config.parallel.device)
        try:
            dataset = together(self._dataset)
        except RankFailure as failure:
            raise failure.for_process() from failure.own
        trainer = self._trainer(self._parts(), dataset, output_dir, device)
        trainer.resume()
        trainer.train()
        self._finish(trainer, started)

    def _trainer(
        self, parts: Parts, dataset: Dataset, output_dir: Path, device: torch.device
    ) -> Trainer:
        config = self.config
        networks = Networks(parts.blueprint, Sharder(config.parallel, device), config.seed)
        layout = Layout(
            world_size=collectives.world_size(),
            rank=collectives.rank(),
            accumulation_steps=config.accumulation_steps,
            batch_size=config.batch_size,
        )
        maker = BatchMaker(dataset, parts.augmentation, layout, config.seed, config.loader.workers)
        losses = {name: loss.to(device) for name, loss in parts.losses.items()}
        return Trainer(
            config=config,
            networks=networks,
            objective=Objective(losses, config.losses, networks, config.iterations),
            optimizer=Optimizer(
                dict(networks.student.items()), config.optimizer, config.batch_size
            ),
            maker=maker,
            store=CheckpointStore(
                output_dir / "checkpoints",
                keep=config.checkpoint.keep,
                keep_every=config.checkpoint.keep_every,
            ),
            observers={n: self.registry.build(o) for n, o in config.observers.items()},
            run=TrainingRun(
                output_dir=output_dir,
                images=config.images,
                total_iterations=config.iterations,
                device=device,
                registry=self.registry,
                networks=networks,
                maker=maker,
            ),
        )

    def _finish(self, trainer: Trainer, started: float) -> None:
        """Export the teacher, let the observers conclude, and complete the run."""
        run = trainer.run
        export = run.output_dir / EXPORT
        state = full_state_dict(trainer.networks.teacher["backbone"])
        if run.is_main:
            backbone = resolved_backbone(self.config)
            values = unstructure(self.registry, backbone)
            export_backbone(
                export,
                state,
                component=values.pop("use"),
                config=values,
                images=self.config.images,
                size=trainer.maker.augmentation.views["global"].size,
                provenance={
                    "network": "teacher",
                    "iterations": str(self.config.iterations),
                    "images_seen": str(self.config.iterations * self.config.batch_size),
                },
            )
        results: dict[str, Any] = {
            "task": "pretrain",
            "iterations": self.config.iterations,
            "images_seen": self.config.iterations * self.config.batch_size,
            "seconds_of_last_start": round(time.time() - started, 1),
        }
        for observer in trainer.observers.values():
            results |= observer.on_end(run) or {}
        if run.is_main:
            write_results(run.output_dir, results)
            _say_goodbye(results, run.output_dir, export)


def resolved_backbone(config: PretrainConfig) -> BackboneConfig:
    """The backbone's config with its input channels filled in from ``images``."""
    return replace(config.backbone, in_chans=config.images.channels)


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


def _say_goodbye(results: Mapping[str, Any], output_dir: Path, export: Path) -> None:
    for name, value in results.items():
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            print_table(name, value)
    print(f"\nDone. Everything is in {output_dir}:")
    for entry in sorted(output_dir.iterdir()):
        if not entry.name.startswith("."):
            print(f"  {entry.name}{'/' if entry.is_dir() else ''}")
    print(
        "\nUse the backbone from Python:\n\n"
        "  from dinov3_framework import load_backbone\n"
        f'  backbone = load_backbone("{export}")\n'
        '  features = backbone.features("an image.png")  # [1, D] class token\n'
    )
