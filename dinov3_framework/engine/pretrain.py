"""The ``pretrain`` task: from a checked recipe to a trained teacher and its export."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dinov3_framework import collectives
from dinov3_framework.configs import replace
from dinov3_framework.contracts import Augmentation, Dataset, Report, Task
from dinov3_framework.engine.agreement import RankFailure, from_main, together
from dinov3_framework.engine.checkpoint import CheckpointStore
from dinov3_framework.engine.console import print_table
from dinov3_framework.engine.distributed import pick_device
from dinov3_framework.engine.gathered_export import export_gathered
from dinov3_framework.engine.init_from import open_weights
from dinov3_framework.engine.loader import BatchMaker, Layout
from dinov3_framework.engine.networks import Blueprint, Networks
from dinov3_framework.engine.objective import Objective
from dinov3_framework.engine.optimizer import Optimizer
from dinov3_framework.engine.output import write_results
from dinov3_framework.engine.parallel import Sharder
from dinov3_framework.engine.preflight import Parts, config_problems, parts_problems, sections
from dinov3_framework.engine.run import TrainingRun
from dinov3_framework.engine.settings import PretrainConfig, resolved_backbone
from dinov3_framework.engine.trainer import Trainer
from dinov3_framework.errors import DataError, Problem, RecipeError, UserError
from dinov3_framework.registry import Registry
from dinov3_framework.weights.info import BackboneInfo

log = logging.getLogger(__name__)

EXPORT = "exports/teacher_backbone.safetensors"
INITIAL = "exports/initial_backbone.safetensors"  # the teacher's before the first iteration
CHECKPOINTS = "checkpoints"


class Pretrain(Task):
    """Pretrains a backbone with any losses under a momentum teacher."""

    def __init__(self, config: PretrainConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Report:
        config = self.config
        problems = config_problems(config, world_size)
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
        missing += self._absent_data()
        problems = parts_problems(parts)
        start: list[tuple[str, str]] = []
        try:
            start = self._start(parts)
        except RecipeError as error:
            problems += error.problems
        if problems:
            raise RecipeError(problems)
        told = sections(config, parts, dataset, world_size)
        return Report(told | ({"init_from": start} if start else {}), missing)

    def _start(self, parts: Parts) -> list[tuple[str, str]]:
        """What a check says of ``[init_from]``; raises ``RecipeError`` if it does not fit."""
        config = self.config
        if config.init_from is None:
            return []
        if config.output_dir is not None:
            steps = CheckpointStore(Path(config.output_dir) / CHECKPOINTS).steps()
            if steps:
                after = f"not read: the run goes on after iteration {steps[-1]:,}"
                return [("weights", f"{config.init_from.weights}, {after}")]
        with open_weights(config, parts.blueprint, self.registry) as weights:
            return weights.rows(parts.blueprint)

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

    def _absent_data(self) -> Iterator[str]:
        """What the observers want and this machine does not have."""
        for name, observer in self.config.observers.items():
            try:
                self.registry.build(observer).check(self.registry.build, self.config.images)
            except DataError as error:
                yield f"observers.{name}: {error}"
            except UserError as error:
                raise RecipeError([Problem(f"observers.{name}", str(error))]) from error

    # ------------------------------------------------------------------ rehearsing
    def rehearse(self, world_size: int, accelerator: str) -> Report:
        from dinov3_framework.engine.rehearsal.accelerators import accelerator as known
        from dinov3_framework.engine.rehearsal.report import sections as told
        from dinov3_framework.engine.rehearsal.step import rehearse

        machine = known(accelerator)
        # This machine need not have the device, which is pretended, nor weights to start from.
        parallel = replace(self.config.parallel, device="cpu")
        config = replace(self.config, parallel=parallel, init_from=None)
        checked = Pretrain(config, registry=self.registry).check(world_size)
        findings = rehearse(config, self._parts(), world_size)
        return Report(told(config, findings, machine), checked.missing)

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
        store = CheckpointStore(
            output_dir / CHECKPOINTS,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
        )
        try:
            networks, origin = self._networks(parts, store, output_dir, device)
        except RankFailure as failure:
            raise failure.for_process() from failure.own
        started = config.init_from is not None and config.init_from.into != "student"
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
            store=store,
            observers={n: self.registry.build(o) for n, o in config.observers.items()},
            run=TrainingRun(
                output_dir=output_dir,
                images=config.images,
                total_iterations=config.iterations,
                device=device,
                registry=self.registry,
                networks=networks,
                maker=maker,
                initial=output_dir / INITIAL if started else None,
            ),
            origin=origin,
        )

    def _networks(
        self, parts: Parts, store: CheckpointStore, output_dir: Path, device: torch.device
    ) -> tuple[Networks, dict[str, str]]:
        """The networks with their first values, and where these came from if from weights.

        Without values where there is a checkpoint to go on from, which gives them: the weights may
        be gone by then.
        """
        config, blueprint = self.config, parts.blueprint
        sharder = Sharder(config.parallel, device)
        if from_main(store.steps):
            return Networks(blueprint, sharder, config.seed, restored=True), {}
        if config.init_from is None:
            return Networks(blueprint, sharder, config.seed), {}
        with ExitStack() as stack:
            opened = open_weights(config, blueprint, self.registry)
            weights = together(stack.enter_context, opened)
            for label, value in weights.rows(blueprint):
                log.info("init_from: %s: %s", label, value)
            networks = Networks(blueprint, sharder, config.seed, first=weights)
            origin = weights.origin()
        if config.init_from.into != "student":
            self._export(output_dir / INITIAL, networks, parts.augmentation, origin)
        return networks, origin

    def _export(
        self,
        path: Path,
        networks: Networks,
        augmentation: Augmentation,
        provenance: Mapping[str, str],
    ) -> None:
        """Write the teacher's backbone as a file of its own."""
        component, values = self.registry.values_of(resolved_backbone(self.config))
        size = augmentation.views["global"].size
        info = BackboneInfo(component, values, self.config.images, size, provenance)
        export_gathered(path, networks.teacher["backbone"], info)

    def _finish(self, trainer: Trainer, started: float) -> None:
        """Export the teacher, let the observers conclude, and complete the run."""
        run = trainer.run
        export = run.output_dir / EXPORT
        provenance = {
            "network": "teacher",
            "iterations": str(self.config.iterations),
            "images_seen": str(self.config.iterations * self.config.batch_size),
            **trainer.origin,
        }
        self._export(export, trainer.networks, trainer.maker.augmentation, provenance)
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
