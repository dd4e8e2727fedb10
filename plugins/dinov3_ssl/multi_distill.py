"""The ``multi_distill`` task: several students learn from one teacher, side by side.

Each student has some of the processes and is a run of its own on them, with its own folder of
checkpoints, metrics and exports. All processes share the teacher's work.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist
from attrs import evolve
from torch import nn

from dinov3_framework.contracts.data import Dataset, StreamDataset
from dinov3_framework.contracts.running import Plan, Task
from dinov3_framework.data.loader import Layout
from dinov3_framework.errors import OutputError, Problem, RecipeError
from dinov3_framework.recipes.plain import unstructure
from dinov3_framework.recipes.toml_text import to_toml
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import OwnErrors, run_on_all_ranks
from dinov3_framework.runtime.durable import clear_aside, irregular
from dinov3_framework.runtime.lock import locked
from dinov3_framework.runtime.output import RECIPE, RESULTS, write_aside
from dinov3_framework.runtime.processes import subgroups
from dinov3_framework.runtime.results import write_results
from dinov3_framework.runtime.session import log_file
from dinov3_framework.training.data import with_iterations
from dinov3_framework.training.simulation import SimulatedBatch
from dinov3_framework.training.task import SideBySide, TrainingTask
from dinov3_ssl.batches import CropBatches
from dinov3_ssl.configs import DistillConfig, MultiDistillConfig, of_student
from dinov3_ssl.distill import Distill
from dinov3_ssl.lockstep import Lockstep
from dinov3_ssl.preflight import Parts
from dinov3_ssl.sharing import Exchange, SharedTeaching, by_output, outputs_of
from dinov3_ssl.simulation import simulated_batches
from dinov3_ssl.teaching import Teaching

# Keys that a student may have of its own; the others are the same for all.
_OWN = ("backbone", "losses", "optimizer", "average", "init_from")
_SHARED = ("data", "teacher", "parallel")  # sections of the report


class MultiDistill(Task):
    """Distills a frozen teacher into several students at once."""

    simulated = False  # as of a ``TrainingMethod``

    def __init__(self, config: MultiDistillConfig, *, registry: Registry) -> None:
        self.config, self._dataset = with_iterations(config, registry, lambda: config.images)
        self.registry = registry

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Plan:
        config = self.config
        problems = list(_own_problems(config))
        if problems:
            raise RecipeError(problems)
        shares, missing = processes_of(config, world_size), []
        if shares is None:
            shares = {name: student.processes for name, student in config.students.items()}
            asked = " + ".join(map(str, shares.values()))
            missing.append(
                f"students: they share {sum(shares.values())} processes ({asked}) or another "
                f"number in this proportion, this start has {world_size}"
            )
        spans = spans_of(config, sum(shares.values()))
        sections: dict[str, list[tuple[str, str]]] = {}
        plans: dict[str, Plan] = {}
        problems += _share_problems(config, sum(shares.values()))
        for name in config.students:
            try:
                plan = self.student(name, spans, plans).check(shares[name])
            except RecipeError as error:
                problems += [_at_student(each, name, config) for each in error.problems]
                continue
            plans[name] = plan
            missing += plan.missing
            for title, rows in plan.sections.items():
                # What is the same for all is shown once.
                sections.setdefault(title if title in _SHARED else f"{name}: {title}", list(rows))
        if problems:
            raise RecipeError(list(dict.fromkeys(problems)))
        return Plan(sections, list(dict.fromkeys(missing)), plans)

    def student(
        self, name: str, spans: Mapping[str, range], plans: Mapping[str, Plan] | None = None
    ) -> TrainingTask:
        """The training of one student; ``plans`` are those of others, with the same data."""
        folder = None
        if self.config.output_dir is not None:
            folder = str(Path(self.config.output_dir) / name)
        config = of_student(self.config, name, folder)
        checked = next((plan.prepared for plan in (plans or {}).values()), None)
        method = SideStudent(config, self.registry, self.config, spans)
        method.simulated = self.simulated
        return TrainingTask(
            config,
            registry=self.registry,
            method=method,
            coordinator=Lockstep(name),
            dataset=self._dataset if checked is None else checked.dataset,
        )

    def side_by_side(self, world_size: int) -> Sequence[SideBySide]:
        """The students' trainings and their ranks, for an estimate."""
        spans = spans_of(self.config, world_size)
        return [SideBySide(name, self.student(name, spans), span) for name, span in spans.items()]

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        spans = spans_of(self.config, world)
        groups = subgroups([list(span) for span in spans.values()], self.config.parallel.timeout)
        place = next(i for i, span in enumerate(spans.values()) if rank in span)
        name = list(spans)[place]
        folder = output_dir / name
        student = self.student(name, spans)
        own = None if plan is None else plan.prepared[name]
        with (
            collectives.within(groups[place]),
            _own_folder(folder, of_student(self.config, name, str(folder)), self.registry),
        ):
            student.run(folder, own)
        collectives.barrier()
        if collectives.is_main():
            results = {n: json.loads((output_dir / n / RESULTS).read_text()) for n in spans}
            write_results(output_dir, {"task": "multi_distill", "students": results})
            print("\nDone. Use the students from Python:\n")
            print("  from dinov3_framework import load_backbone")
            for n in spans:
                print(f'  {n} = load_backbone("{output_dir / n}")')


class SideStudent(Distill):
    """One of several students, on its own processes: ``spans`` are the ranks of each."""

    def __init__(
        self,
        config: DistillConfig,
        registry: Registry,
        of_all: MultiDistillConfig,
        spans: Mapping[str, range],
    ) -> None:
        super().__init__(config, registry)
        self.of_all, self.spans = of_all, spans

    def _layouts(self) -> tuple[list[Layout], list[Layout]]:
        """What each process makes for the teacher, and what it sees as a student; by rank."""
        config, world = self.config, dist.get_world_size()

        def layout(size: int, place: int) -> Layout:
            return Layout(size, place, config.accumulation_steps, config.batch_size)

        have = [layout(world, rank) for rank in range(world)]
        want = [layout(len(s), place) for s in self.spans.values() for place in range(len(s))]
        return have, want

    def batches(
        self, prepared: Parts, dataset: Dataset | StreamDataset, layout: Layout
    ) -> CropBatches:
        have, want = self._layouts()
        rank, config = dist.get_rank(), self.config
        return CropBatches(
            dataset,
            prepared.augmentation,
            have[rank],
            config.seed,
            config.loader.workers,
            masks_of=want[rank],
        )

    def simulated_batches(self, prepared: Parts, layout: Layout) -> Iterator[SimulatedBatch]:
        have, _ = self._layouts()
        shown = len(have[dist.get_rank()].places(0, 0))
        teacher = self.simulated_teacher(prepared)
        text = f"{len(have)} x {self.config.accumulation_steps} micro-batches x {shown} at most"
        for batch in simulated_batches(self.config, prepared, layout, shown, teacher):
            yield evolve(batch, rows=[("shown to the teacher", text), *batch.rows])

    def taught_by(self, teacher: nn.ModuleDict, parts: Parts) -> Teaching:
        if not dist.is_initialized():  # names and shapes alone are asked for
            return super().taught_by(teacher, parts)
        have, want = ([layout.places(0, 0) for layout in each] for each in self._layouts())
        exchange = Exchange.between(dist.get_rank(), have, want)
        wanted = by_output(self._needs())
        return SharedTeaching(teacher, self.frozen.images, exchange, wanted)

    def any_run(self, wants: bool) -> bool:
        return Lockstep(self.name).any_stop(wants)

    def _needs(self) -> Sequence[Collection[str]]:
        """Which of the teacher's outputs each process wants, by rank."""
        of = {
            name: outputs_of(
                self.registry.build(loss)
                for loss in of_student(self.of_all, name, None).losses.values()
            )
            for name in self.spans
        }
        return [of[name] for name, span in self.spans.items() for _ in span]


# ------------------------------------------------------------------ processes
def processes_of(config: MultiDistillConfig, world_size: int) -> dict[str, int] | None:
    """How many of ``world_size`` processes each student gets; None if they cannot be shared."""
    total = sum(student.processes for student in config.students.values())
    shares = {name: s.processes * world_size for name, s in config.students.items()}
    if not total or any(share % total for share in shares.values()):
        return None
    return {name: share // total for name, share in shares.items()}


def spans_of(config: MultiDistillConfig, world_size: int) -> dict[str, range]:
    """The ranks of each student; raises ``RecipeError`` if they cannot share the processes."""
    shares = processes_of(config, world_size)
    if shares is None:
        asked = [student.processes for student in config.students.values()]
        raise RecipeError(
            [
                Problem(
                    "students",
                    f"cannot share {world_size} processes",
                    f"they take {sum(asked)} ({' + '.join(map(str, asked))}), or another number "
                    "in this proportion",
                )
            ]
        )
    spans, start = {}, 0
    for name, count in shares.items():
        spans[name] = range(start, start + count)
        start += count
    return spans


# ------------------------------------------------------------------ checking
def _own_problems(config: MultiDistillConfig) -> Iterator[Problem]:
    if len(config.students) < 2:
        hint = 'task = "distill" has one student'
        yield Problem("students", f"there are {len(config.students)}, several are wanted", hint)
    for name in config.students:
        if not name.replace("_", "").replace("-", "").isalnum():
            message = "a name is made of letters, digits, - and _: it names a folder"
            yield Problem(f"students.{name}", message)


def _share_problems(config: MultiDistillConfig, processes: int) -> Iterator[Problem]:
    share = processes * config.accumulation_steps
    if config.batch_size < share or config.batch_size % config.accumulation_steps:
        yield Problem(
            "batch_size",
            f"{config.batch_size} images cannot be split over {processes} processes x "
            f"accumulation_steps = {config.accumulation_steps}: each wants one for the teacher",
            f"take {share} or more, a multiple of accumulation_steps",
        )


def _at_student(problem: Problem, name: str, config: MultiDistillConfig) -> Problem:
    """A student's problem at the key of the whole recipe that it is about."""
    first = problem.where.partition(".")[0]
    if first in _OWN and getattr(config.students[name], first) is not None:
        return Problem(
            f"students.{name}.{problem.where}", problem.message, problem.hint, problem.source
        )
    return problem


# ------------------------------------------------------------------ folders
@contextmanager
def _own_folder(folder: Path, config: DistillConfig, registry: Registry) -> Iterator[None]:
    """A student's folder, held, with its recipe and its log; by its main process.

    The recipe there runs alone as well, in that folder, so that whoever holds the folder of all
    does not hold this one yet.
    """
    with ExitStack() as held:

        def prepare() -> None:
            if collectives.is_main():
                held.enter_context(locked(folder))
                if complaint := irregular(folder):
                    raise OutputError(complaint)
                clear_aside(folder)
                write_aside(folder / RECIPE, to_toml(unstructure(registry, config)))
                held.enter_context(log_file(folder))

        with OwnErrors():
            run_on_all_ranks(prepare)
        yield
