"""A training as a task: checked, resumed, run to its end; for any method.

A *method* brings what is special: its networks on the meta device, its train unit, its batches.
"""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from attrs import frozen

from dinov3_framework.checkpoints.expected import kept_steps, write_index
from dinov3_framework.checkpoints.folder import name_of
from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Dataset, StreamDataset
from dinov3_framework.contracts.networks import Shardable
from dinov3_framework.contracts.running import Model, Plan, Rows, Task
from dinov3_framework.contracts.training import TrainUnit
from dinov3_framework.data.loader import BatchMaker, Layout
from dinov3_framework.errors import DataError, Problem, RecipeError, UserError, problems_at
from dinov3_framework.kinds import ObserverConfig
from dinov3_framework.parallel.check import (
    machine_problems,
    network_problems,
    parallel_problems,
    parallel_rows,
)
from dinov3_framework.parallel.sharder import MetaSharder, Sharder
from dinov3_framework.recipes.plain import unstructure
from dinov3_framework.recipes.toml_text import to_toml
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, run_on_all_ranks
from dinov3_framework.runtime.environment import keep_with_export
from dinov3_framework.runtime.output import RECIPE, identity
from dinov3_framework.runtime.processes import pick_device
from dinov3_framework.runtime.results import print_summary, write_results
from dinov3_framework.training import CHECKPOINTS, TrainingConfig
from dinov3_framework.training.check import batch_problems, memory_complaint, schedule_problems
from dinov3_framework.training.clock import StepClock
from dinov3_framework.training.coordination import NullCoordinator
from dinov3_framework.training.data import (
    build_dataset,
    data_rows,
    state_problems,
    with_iterations,
)
from dinov3_framework.training.optimizer import Optimizer
from dinov3_framework.training.run import TrainingRun
from dinov3_framework.training.simulation import SimulatedBatch
from dinov3_framework.training.trainer import Trainer

log = logging.getLogger(__name__)


class InitialState(Enum):
    """What the networks of a new unit hold."""

    INITIAL = "initial"  # their first values
    RESTORED = "restored"  # nothing: a checkpoint gives all that it holds
    ABSENT = "absent"  # nothing at all, ever: an estimate, or names and shapes alone


@frozen
class Checked:
    """What a plan keeps for the run: the data, and what the method prepared."""

    dataset: Dataset | StreamDataset | None
    prepared: Any


class TrainingMethod(abc.ABC):
    """What a training task brings beside the loop.

    What ``prepare`` gives is handed back to the other methods: cheap objects and networks on the
    meta device, made once.
    """

    name: ClassVar[str]  # of the task
    # Whether this is an estimate: nothing is fetched, nor need the device exist.
    simulated: bool = False

    def __init__(self, config: Any, registry: Registry) -> None:
        self.config, self.registry = config, registry

    @classmethod
    def task(cls, config: Any, *, registry: Registry) -> TrainingTask:
        """A task of this method: the factory of its component."""
        images = cls(config, registry).images
        config, dataset = with_iterations(config, registry, images)
        method = cls(config, registry)
        return TrainingTask(config, registry=registry, method=method, dataset=dataset)

    def images(self) -> ImagesConfig:
        """What images are; by default as the recipe says."""
        config: TrainingConfig = self.config
        return config.images

    # ------------------------------------------------------------------ checking
    def config_problems(self, world_size: int) -> list[Problem]:
        """What is wrong with the recipe, as far as it can be told without building anything."""
        return []

    def missing(self, done: int) -> list[str]:
        """What the recipe reads and this machine lacks; ``done`` iterations are there already."""
        return []

    @abc.abstractmethod
    def prepare(self, dataset: Dataset | StreamDataset | None = None) -> Any:
        """Build what takes no memory; raises ``RecipeError``.

        ``dataset`` is the recipe's; None where this machine does not have it, or nobody built it.
        """

    @abc.abstractmethod
    def shardable(self, prepared: Any) -> Shardable:
        """The network, on the meta device, that ``[parallel]`` is checked against."""

    def problems(self, prepared: Any, done: int) -> list[Problem]:
        """What does not fit together."""
        return []

    def model(self, prepared: Any) -> Model | None:
        """What will be evaluated, on the meta device, where that is known."""
        return None

    def sections(self, prepared: Any, world_size: int, done: int) -> Mapping[str, Rows]:
        """What a check shows before the sections that all trainings have."""
        return {}

    def sections_after(self, prepared: Any, done: int) -> Mapping[str, Rows]:
        """What a check shows after them."""
        return {}

    # ------------------------------------------------------------------ running
    @abc.abstractmethod
    def unit(
        self, prepared: Any, sharder: Sharder, state: InitialState, output_dir: Path | None
    ) -> TrainUnit:
        """The unit with its networks in place; called by every process."""

    @abc.abstractmethod
    def batches(
        self, prepared: Any, dataset: Dataset | StreamDataset, layout: Layout
    ) -> BatchMaker[Any, Any]:
        """What makes the unit's batches."""

    def image_bytes(self, prepared: Any) -> int:
        """Bytes of one image in a batch, all its crops; 0 if that is not known beforehand."""
        return 0

    def simulated_batches(self, prepared: Any, layout: Layout) -> Iterator[SimulatedBatch]:
        """Batches without values, of each sort of steps that there is, for an estimate."""
        raise UserError(f"{self.name}: this training cannot be estimated: it has no such batches")

    def begin(self, trainer: Trainer, prepared: Any) -> None:
        """Called before the first step of a run that has no checkpoint of its own."""

    def before_training(self, trainer: Trainer, prepared: Any) -> None:
        """Called before the first step of each start, once what a checkpoint has is loaded."""

    def first_iteration(self) -> int:
        """The iteration that a new run goes on after."""
        return 0

    def origin(self, unit: TrainUnit) -> Mapping[str, str]:
        """Where the first values came from, if they were not drawn; for provenance."""
        return {}

    def export(self, trainer: Trainer, prepared: Any) -> Path | None:
        """Write what the run leaves for others; called by every process at the end."""
        return None

    def usage(self, export: Path) -> str:
        """What to do with the export, for the end of the console's output."""
        return (
            "Use the backbone from Python:\n\n"
            "  from dinov3_framework import load_backbone\n"
            f'  backbone = load_backbone("{export}")\n'
            '  features = backbone.features("an image.png")  # [1, D] class token\n'
        )

    def expected_exports(self, prepared: Any) -> Mapping[str, tuple[Mapping[str, Any], Any]]:
        """(tensors on the meta device, state) by path below the run's folder, as ``export``."""
        return {}


@frozen
class SideBySide:
    """One of the trainings that go on in one job."""

    name: str  # "" if it is the only one
    task: TrainingTask
    ranks: range


class TrainingTask(Task):
    """Trains the unit of a method."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        registry: Registry,
        method: TrainingMethod,
        coordinator: NullCoordinator | None = None,
        dataset: Dataset | StreamDataset | None = None,
    ) -> None:
        """``dataset`` is the recipe's, where somebody has built it already."""
        self.config, self.registry, self.method = config, registry, method
        self.coordinator = coordinator or NullCoordinator()
        self._given = dataset

    @property
    def simulated(self) -> bool:
        """Whether this is an estimate, which fetches and reads nothing."""
        return self.method.simulated

    @simulated.setter
    def simulated(self, value: bool) -> None:
        self.method.simulated = value

    def side_by_side(self, world_size: int) -> Sequence[SideBySide]:
        """The trainings of one job and their ranks, for an estimate: this one alone."""
        return [SideBySide("", self, range(world_size))]

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Plan:
        config, method, done = self.config, self.method, self.done()
        _refuse(
            [
                *parallel_problems(config.parallel, world_size),
                *batch_problems(config, world_size),
                *schedule_problems(config),
                *method.config_problems(world_size),
            ]
        )
        missing = self._absent_abilities()
        dataset = None
        try:
            dataset = self._dataset()
        except DataError as error:
            missing.append(str(error))
        missing += method.missing(done)
        prepared = method.prepare(dataset)
        observed: list[tuple[str, str]] = []
        missing += self._absent_data(method.model(prepared), observed)
        crowded = ""
        if not self.simulated:
            image = method.image_bytes(prepared)
            crowded = memory_complaint(config, image, world_size, config.loader.prefetch)
            if lack := memory_complaint(config, image, world_size, 1):
                missing.append(lack)
                crowded = ""
        network = method.shardable(prepared)
        _refuse(
            [
                *network_problems(config.parallel, network),
                *method.problems(prepared, done),
                *state_problems(config, self.registry, dataset),
            ]
        )
        sections = {
            **method.sections(prepared, world_size, done),
            "parallel": parallel_rows(config.parallel, network, world_size),
            "data": data_rows(config, dataset, crowded),
            **({"observers": observed} if observed else {}),
            **method.sections_after(prepared, done),
        }
        return Plan(sections, missing, Checked(dataset, prepared))

    def prepare(self) -> Any:
        """What the method prepares, with the data if this machine has them."""
        dataset = None
        with suppress(DataError):
            dataset = self._dataset()
        return self.method.prepare(dataset)

    def done(self) -> int:
        """After which iteration this run would go on; 0 if it would begin."""
        if self.config.output_dir is None:
            return 0
        steps = CheckpointStore(Path(self.config.output_dir) / CHECKPOINTS).steps()
        return steps[-1] if steps else 0

    def progress(self) -> str:
        return f"iteration {done:,}" if (done := self.done()) else ""

    def _dataset(self) -> Dataset | StreamDataset:
        if self._given is None:
            self._given = build_dataset(self.config, self.registry, self.method.images())
        return self._given

    def _absent_abilities(self) -> list[str]:
        """What the recipe asks of a machine and this one, perhaps a login node, cannot do."""
        if self.simulated:
            return []
        device = pick_device(self.config.parallel.device)
        return [str(problem) for problem in machine_problems(self.config.parallel, device)]

    def _absent_data(self, model: Model | None, rows: list[tuple[str, str]]) -> Iterator[str]:
        """What the observers want and this machine does not have; adds what they show to ``rows``.

        Raises ``RecipeError``.
        """
        for name, config in self.config.observers.items():
            observer = self._observer(config)
            try:
                observer.check(self.registry.build, self.method.images())
                if model is not None:
                    observer.check_model(model)
                    rows += observer.rows(model)
            except DataError as error:
                yield f"observers.{name}: {error}"
            except UserError as error:
                raise RecipeError(problems_at(f"observers.{name}", error)) from error

    def _observer(self, config: ObserverConfig) -> Any:
        return self.registry.build(config)

    def write_expected_artifacts(self, folder: Path) -> bool:
        config, method, prepared = self.config, self.method, self.prepare()
        unit = method.unit(prepared, MetaSharder(config.parallel), InitialState.ABSENT, None)
        tensors = unit.state() | {
            f"optimizer.{name}": value for name, value in self.optimizer(unit).state().items()
        }
        (folder / RECIPE).write_text(to_toml(unstructure(self.registry, config)), "utf-8")
        first, last = method.first_iteration(), config.iterations
        for step in kept_steps(last, config.checkpoint, first):
            write_index(folder / CHECKPOINTS / name_of(step), step, tensors, {"iterations": last})
        for path, (exported, state) in method.expected_exports(prepared).items():
            write_index(folder / path, last, exported, state)
        return True

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        started = time.time()
        checked = plan.prepared if plan is not None else None
        dataset = self._load_dataset() if checked is None else checked.dataset
        prepared = self.method.prepare(dataset) if checked is None else checked.prepared
        trainer = self.trainer(prepared, dataset, output_dir)
        try:
            if not self.coordinator.resume(trainer):
                self.method.begin(trainer, prepared)
            self.method.before_training(trainer, prepared)
            trainer.train()
            self._finish(trainer, prepared, started)
        except BaseException as error:
            trainer.close(error)
            raise
        trainer.close(None)

    def _load_dataset(self) -> Dataset | StreamDataset:
        with OwnErrors(), collectives.within(None):  # of runs side by side, all processes read it
            return run_on_all_ranks(self._dataset)

    def trainer(self, prepared: Any, dataset: Dataset | StreamDataset, output_dir: Path) -> Trainer:
        """Everything in its place, before the first step; called by every process."""
        config, device = self.config, pick_device(self.config.parallel.device)
        store = CheckpointStore(
            output_dir / CHECKPOINTS,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
        )
        with OwnErrors():
            restored = bool(self.coordinator.resumable_steps(store))
        sharder = Sharder(config.parallel, device, collectives.current_group())
        state = InitialState.RESTORED if restored else InitialState.INITIAL
        unit = self.method.unit(prepared, sharder, state, output_dir)
        layout = Layout(
            world_size=collectives.world_size(),
            rank=collectives.rank(),
            accumulation_steps=config.accumulation_steps,
            batch_size=config.batch_size,
        )
        maker = self.method.batches(prepared, dataset, layout)
        return Trainer(
            config=config,
            unit=unit,
            optimizer=self.optimizer(unit),
            maker=maker,
            store=store,
            observers={name: self._observer(o) for name, o in config.observers.items()},
            run=TrainingRun(
                config, output_dir, device, self.registry, unit, maker, self.method.images()
            ),
            clock=StepClock(device),
            coordinator=self.coordinator,
            origin=self.method.origin(unit),
            identity=identity(config, self.registry),
        )

    def optimizer(self, unit: TrainUnit) -> Optimizer:
        """The recipe's, over a unit's networks."""
        factory = self.registry.build(self.config.optimizer)
        return Optimizer(unit.networks, self.config.optimizer, factory, self.config.batch_size)

    def _finish(self, trainer: Trainer, prepared: Any, started: float) -> None:
        """Export, let the observers conclude, and complete the run."""
        run, config = trainer.run, self.config
        export = self.method.export(trainer, prepared)
        if export is not None and run.is_main:
            keep_with_export(run.output_dir, export)
        results: dict[str, Any] = {
            "task": self.method.name,
            "iterations": config.iterations,
            "images_seen": config.iterations * config.batch_size,
            "seconds_of_last_start": round(time.time() - started, 1),
        }
        results |= trainer.conclude()
        if run.is_main:
            write_results(run.output_dir, results)
            if self.coordinator.is_alone:
                usage = "" if export is None else self.method.usage(export)
                print_summary(results, run.output_dir, usage)


def _refuse(problems: list[Problem]) -> None:
    if problems:
        # What is wrong with several parts alike is reported once.
        raise RecipeError(list(dict.fromkeys(problems)))
