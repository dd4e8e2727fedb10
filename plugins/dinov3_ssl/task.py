"""What all trainings have in common: from a checked recipe to a trained network and its export.

A task of its own says whom the student learns from (``pretrain``, ``distill``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.configs import replace
from dinov3_framework.contracts.data import Augmentation, Dataset
from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.data.loader import BatchMaker, Layout
from dinov3_framework.errors import DataError, Problem, RecipeError, UserError
from dinov3_framework.parallel.check import machine_problems
from dinov3_framework.parallel.sharder import Sharder
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import RankFailure, from_main, together
from dinov3_framework.runtime.output import write_results
from dinov3_framework.runtime.processes import pick_device
from dinov3_framework.training.clock import StepClock
from dinov3_framework.training.optimizer import Optimizer
from dinov3_framework.training.run import TrainingRun
from dinov3_framework.training.trainer import Trainer
from dinov3_framework.weights.locations import exists
from dinov3_ssl.configs import TrainingConfig, resolved_backbone
from dinov3_ssl.expected_artifacts import write_stand_in
from dinov3_ssl.finishing import export_average, say_goodbye
from dinov3_ssl.frozen import FrozenTeacher, memory_of, published_as
from dinov3_ssl.init_from import open_weights
from dinov3_ssl.lockstep import Alone
from dinov3_ssl.needed_weights import no_such_weights, weights_of
from dinov3_ssl.networks import Blueprint, Networks
from dinov3_ssl.objective import Objective
from dinov3_ssl.preflight import Parts, config_problems, parts_problems, sections
from dinov3_ssl.teaching import Teaching

if TYPE_CHECKING:
    from dinov3_estimate.findings import Findings
    from dinov3_estimate.stage import PretendingSharder, Seat

log = logging.getLogger(__name__)

EXPORT = "exports/teacher_backbone.safetensors"
INITIAL = "exports/initial_backbone.safetensors"  # the teacher's before the first iteration
CHECKPOINTS = "checkpoints"


class TrainingTask(Task):
    """Trains a student with any losses; its moving average is what is exported."""

    name: str  # of the task
    rehearses = False  # whether it is only pretended: nothing is fetched, nor need the device exist

    def __init__(self, config: TrainingConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry
        self._peers = Alone()

    # ------------------------------------------------------------------ what a task decides
    def _problems(self, parts: Parts) -> list[Problem]:
        """What of this task's own does not fit."""
        return []

    def _told(self, parts: Parts) -> dict[str, list[tuple[str, str]]]:
        """This task's own sections of the report."""
        return {}

    def _teaching(self, networks: Networks, parts: Parts, restored: bool) -> Teaching | None:
        """Whom the student learns from; None: its moving average."""
        return None

    def _own_state(self, parts: Parts) -> dict[str, Any]:
        """JSON values that checkpoints keep for this task."""
        return {}

    def _accept(self, state: Mapping[str, Any]) -> None:
        """Look at what a checkpoint of this run kept before it is loaded; may raise."""

    def _begin(self, trainer: Trainer, parts: Parts) -> None:
        """Called before the first step of a run that has no checkpoint of its own."""

    def _provenance(self) -> dict[str, str]:
        """What the export says of its making besides."""
        return {}

    @property
    def _masks_student(self) -> bool:
        """Whether the student is kept from seeing masked patches."""
        return True

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Plan:
        config = self.config
        problems = config_problems(config, world_size)
        if problems:
            raise RecipeError(problems)
        missing = self._absent_abilities()
        try:
            dataset = self._dataset()
        except DataError as error:
            missing.append(str(error))
            dataset = None
        missing += [
            no_such_weights(key, path, self.registry)
            for key, path in self._weights_read().items()
            if not exists(path, self.registry)
        ]
        unseen = self._unseen_weights()
        parts = self._parts(unseen)
        missing += self._absent_data()
        problems = [
            *parts_problems(config, parts, self._masks_student),
            *self._problems(parts),
        ]
        start: list[tuple[str, str]] = []
        try:
            start = [] if "init_from.weights" in unseen else self._start(parts)
        except RecipeError as error:
            problems += error.problems
        if problems:
            raise RecipeError(problems)
        told = sections(config, parts, dataset, world_size) | self._told(parts)
        return Plan(told | ({"init_from": start} if start else {}), missing)

    def _start(self, parts: Parts) -> list[tuple[str, str]]:
        """What a check says of ``[init_from]``; raises ``RecipeError`` if it does not fit."""
        config = self.config
        if config.init_from is None:
            return []
        if done := self._done():
            after = f"not read: the run goes on after iteration {done:,}"
            return [("weights", f"{config.init_from.weights}, {after}")]
        if self.rehearses and not Path(config.init_from.weights).exists():
            return [("weights", f"{config.init_from.weights}, not looked at")]
        with open_weights(config, parts.blueprint, self.registry) as weights:
            return weights.rows(parts.blueprint)

    def _done(self) -> int:
        """After which iteration this run would go on; 0 if it would begin."""
        if self.config.output_dir is None:
            return 0
        steps = CheckpointStore(Path(self.config.output_dir) / CHECKPOINTS).steps()
        return steps[-1] if steps else 0

    def _dataset(self) -> Dataset:
        config = self.config
        dataset: Dataset = self.registry.build(config.dataset, channels=config.images.channels)
        if len(dataset) == 0:
            raise DataError(f"{dataset.describe()}: holds no image")
        return dataset

    def _weights(self) -> dict[str, str]:
        """Everything that a new run reads before its first step, by key of the recipe."""
        return weights_of(self.config, self.registry)

    def _weights_read(self) -> dict[str, str]:
        """Those of :meth:`_weights` that this run reads; a run that is on needs none again."""
        return {} if self._done() else self._weights()

    def _unseen_weights(self) -> dict[str, str]:
        """Those of which nothing can be told here."""
        return {key: path for key, path in self._weights_read().items() if not self._exists(path)}

    def _exists(self, source: str) -> bool:
        """Whether it can be told what weights are."""
        if self.rehearses:
            return Path(source).exists() or self._known(source) is not None
        return exists(source, self.registry)

    def _known(self, source: str) -> Mapping[str, str] | None:
        """What a rehearsal is to know of weights that are not on this machine."""
        here = not self.rehearses or Path(source).exists()
        return None if here else published_as(source, self.registry)

    def _parts(self, unseen: Collection[str] = ()) -> Parts:
        """``unseen`` are keys of weights that are not to be looked at."""
        config = self.config
        losses = {name: self.registry.build(loss) for name, loss in config.losses.items()}
        blueprint = Blueprint.draw(
            self.registry,
            resolved_backbone(config),
            losses,
            self._known_anchors() | self._memory().get("anchors", {}),
            [name for name in losses if f"losses.{name}.anchor.weights" in unseen],
        )
        augmentation = self.registry.build(
            config.augmentation,
            channels=config.images.channels,
            patch_size=blueprint.backbone.patch_size,
        )
        return Parts(augmentation, losses, blueprint)

    def _known_anchors(self) -> dict[str, Mapping[str, str]]:
        """By loss."""
        weights = {name: f"losses.{name}.anchor.weights" for name in self.config.losses}
        read = self._weights()
        known = {name: self._known(read[key]) for name, key in weights.items() if key in read}
        return {name: memory for name, memory in known.items() if memory is not None}

    def _memory(self) -> dict[str, Any]:
        """What this run's newest checkpoint remembers besides tensors; empty if there is none."""
        if self.config.output_dir is None:
            return {}
        return CheckpointStore(Path(self.config.output_dir) / CHECKPOINTS).peek()

    def _absent_abilities(self) -> list[str]:
        """What the recipe asks of a machine and this one, perhaps a login node, cannot do."""
        if self.rehearses:
            return []
        device = pick_device(self.config.parallel.device)
        return [str(problem) for problem in machine_problems(self.config.parallel, device)]

    def _absent_data(self) -> Iterator[str]:
        """What the observers want and this machine does not have."""
        for name, observer in self.config.observers.items():
            try:
                self.registry.build(observer).check(self.registry.build, self.config.images)
            except DataError as error:
                yield f"observers.{name}: {error}"
            except UserError as error:
                raise RecipeError([Problem(f"observers.{name}", str(error))]) from error

    def write_expected_artifacts(self, folder: Path) -> bool:
        parts = self._parts(self._unseen_weights())
        write_stand_in(folder, self.config, parts, self.registry, self._begun())
        return True

    def _begun(self) -> int:
        """The iteration that a new run goes on after."""
        return 0

    # ------------------------------------------------------------------ rehearsing
    def rehearse(self, world_size: int, accelerator: str) -> Plan:
        from dinov3_estimate.accelerators import accelerator as known
        from dinov3_estimate.report import sections as told
        from dinov3_estimate.stage import Seat

        machine = known(accelerator)
        task = type(self)(replace(self.config, output_dir=None), registry=self.registry)
        task.rehearses = True
        checked = task.check(world_size)
        findings = task.rehearsed(Seat(world_size))
        return Plan(told(self.config, findings, machine, task.teacher_rows()), checked.missing)

    def rehearsed(self, seat: Seat) -> Findings:
        """What a step is to one process; of a task that ``rehearses``."""
        from dinov3_estimate.step import rehearse

        parts = self._parts(self._unseen_weights())
        teaching = partial(self._pretended_teacher, parts)
        return rehearse(self.config, parts, seat, teaching=teaching, masking=self._masks_student)

    def _pretended_teacher(
        self, parts: Parts, networks: Networks, sharder: PretendingSharder
    ) -> FrozenTeacher | None:
        """Who teaches by :meth:`_teaching`, without values; None: the moving average."""
        return None

    def teacher_rows(self) -> list[tuple[str, str]]:
        """For people: what a teacher is that is not the student's average."""
        return []

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        started = time.time()
        device = pick_device(self.config.parallel.device)
        dataset = self._load_dataset()
        parts = self._parts()
        trainer = self._trainer(parts, dataset, output_dir, device)
        if not self._resume(trainer):
            self._begin(trainer, parts)
        trainer.train()
        self._finish(trainer, started)

    def _load_dataset(self) -> Dataset:
        try:
            return together(self._dataset)
        except RankFailure as failure:
            raise failure.for_process() from failure.own

    def _restorable(self, store: CheckpointStore) -> list[int]:
        """Iterations that this run could go on after."""
        return from_main(store.steps)

    def _resume(self, trainer: Trainer) -> bool:
        return trainer.resume()

    def _maker(self, dataset: Dataset, parts: Parts) -> BatchMaker:
        config = self.config
        layout = Layout(
            world_size=collectives.world_size(),
            rank=collectives.rank(),
            accumulation_steps=config.accumulation_steps,
            batch_size=config.batch_size,
        )
        return BatchMaker(dataset, parts.augmentation, layout, config.seed, config.loader.workers)

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
            restored = bool(self._restorable(store))
            networks, origin = self._networks(parts, restored, output_dir, device)
        except RankFailure as failure:
            raise failure.for_process() from failure.own
        maker = self._maker(dataset, parts)
        losses = {name: loss.to(device) for name, loss in parts.losses.items()}
        return Trainer(
            config=config,
            networks=networks,
            objective=Objective(
                losses,
                config.losses,
                networks,
                config.iterations,
                config.images,
                teaching=self._teaching(networks, parts, restored),
                masking=self._masks_student,
                clock=StepClock(device),
            ),
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
                initial=output_dir / INITIAL if self._starts_from_weights else None,
            ),
            origin=origin,
            memory=self._remembered(parts),
            accept=self._accept,
            peers=self._peers,
        )

    @property
    def _starts_from_weights(self) -> bool:
        """Whether the moving average has values of its own before the first iteration."""
        init = self.config.init_from
        return init is not None and init.into != "student"

    def _remembered(self, parts: Parts) -> dict[str, Any]:
        anchors = {name: memory_of(w) for name, w in parts.blueprint.anchor_weights.items()}
        return ({"anchors": anchors} if anchors else {}) | self._own_state(parts)

    def _networks(
        self, parts: Parts, restored: bool, output_dir: Path, device: torch.device
    ) -> tuple[Networks, dict[str, str]]:
        """The networks with their first values, and where these came from if from weights.

        Without values where there is a checkpoint to go on from, which gives them: the weights may
        be gone by then.
        """
        config, blueprint = self.config, parts.blueprint
        sharder = Sharder(config.parallel, device, collectives.current_group())
        if restored:
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
        if self._starts_from_weights:
            self._export(output_dir / INITIAL, networks, parts.augmentation, origin)
        return networks, origin

    def _export(
        self,
        path: Path,
        networks: Networks,
        augmentation: Augmentation,
        provenance: Mapping[str, str],
    ) -> None:
        """Write the moving average's backbone as a file of its own."""
        export_average(path, self.config, self.registry, networks, augmentation, provenance)

    def _finish(self, trainer: Trainer, started: float) -> None:
        """Export the teacher, let the observers conclude, and complete the run."""
        run = trainer.run
        export = run.output_dir / EXPORT
        provenance = {
            "network": "teacher",
            "iterations": str(self.config.iterations),
            "images_seen": str(self.config.iterations * self.config.batch_size),
            **trainer.origin,
            **self._provenance(),
        }
        self._export(export, trainer.networks, trainer.maker.augmentation, provenance)
        results: dict[str, Any] = {
            "task": self.name,
            "iterations": self.config.iterations,
            "images_seen": self.config.iterations * self.config.batch_size,
            "seconds_of_last_start": round(time.time() - started, 1),
        }
        for observer in trainer.observers.values():
            results |= observer.on_end(run) or {}
        if run.is_main:
            write_results(run.output_dir, results)
            if self._peers.is_alone:
                say_goodbye(results, run.output_dir, export)
