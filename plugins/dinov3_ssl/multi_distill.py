"""The ``multi_distill`` task: several students learn from one teacher, side by side.

Each student has some of the processes and is a run of its own on them (``SideStudent``), with its
own folder of checkpoints, metrics and exports. All processes share the teacher's work.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from dinov3_framework.checkpoints.store import CheckpointStore
from dinov3_framework.configs import replace
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.contracts.running import Report, Task
from dinov3_framework.data.loader import BatchMaker, Layout
from dinov3_framework.errors import CheckpointError, Problem, RecipeError
from dinov3_framework.recipes.compose import to_toml
from dinov3_framework.recipes.structure import unstructure
from dinov3_framework.registry import Registry
from dinov3_framework.runtime import collectives
from dinov3_framework.runtime.agreement import RankFailure, together
from dinov3_framework.runtime.output import RECIPE, RESULTS, unwritable, write_aside
from dinov3_framework.runtime.processes import subgroups
from dinov3_framework.runtime.results import write_results
from dinov3_framework.runtime.session import log_file
from dinov3_framework.training.trainer import Trainer
from dinov3_ssl.configs import DistillConfig, MultiDistillConfig, of_student
from dinov3_ssl.distill import Distill
from dinov3_ssl.lockstep import SideBySide
from dinov3_ssl.preflight import Parts
from dinov3_ssl.sharing import Exchange, SharedTeaching, by_output, outputs_of
from dinov3_ssl.teaching import Teaching

log = logging.getLogger(__name__)

# Keys that a student may have of its own; the others are the same for all.
_OWN = ("backbone", "losses", "optimizer", "average", "init_from")
_SHARED = ("data", "teacher", "parallel")  # sections of the report


class MultiDistill(Task):
    """Distils a frozen teacher into several students at once."""

    rehearses = False  # as of a ``TrainingTask``

    def __init__(self, config: MultiDistillConfig, *, registry: Registry) -> None:
        self.config, self.registry = config, registry

    # ------------------------------------------------------------------ checking
    def check(self, world_size: int) -> Report:
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
        told: dict[str, list[tuple[str, str]]] = {}
        problems += _share_problems(config, sum(shares.values()))
        for name in config.students:
            try:
                report = self._student(name).check(shares[name])
            except RecipeError as error:
                problems += [_placed(each, name, config) for each in error.problems]
                continue
            missing += report.missing
            for title, rows in report.sections.items():
                # What is the same for all is said once.
                told.setdefault(title if title in _SHARED else f"{name}: {title}", list(rows))
        if problems:
            raise RecipeError(list(dict.fromkeys(problems)))
        return Report(told, list(dict.fromkeys(missing)))

    def _student(self, name: str) -> Distill:
        folder = None
        if self.config.output_dir is not None:
            folder = str(Path(self.config.output_dir) / name)
        student = Distill(of_student(self.config, name, folder), registry=self.registry)
        student.rehearses = self.rehearses
        return student

    # ------------------------------------------------------------------ rehearsing
    def rehearse(self, world_size: int, accelerator: str) -> Report:
        from dinov3_estimate.accelerators import accelerator as known
        from dinov3_estimate.several import rehearse_students

        machine, spans = known(accelerator), spans_of(self.config, world_size)
        task = MultiDistill(replace(self.config, output_dir=None), registry=self.registry)
        task.rehearses = True
        checked = task.check(world_size)
        told = rehearse_students(task.config, self.registry, spans, machine)
        return Report(told, checked.missing)

    # ------------------------------------------------------------------ running
    def run(self, output_dir: Path) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        spans = spans_of(self.config, world)
        groups = subgroups([list(span) for span in spans.values()], self.config.parallel.timeout)
        place = next(i for i, span in enumerate(spans.values()) if rank in span)
        name = list(spans)[place]
        folder = output_dir / name
        student = SideStudent(
            of_student(self.config, name, str(folder)),
            registry=self.registry,
            name=name,
            spans=spans,
        )
        with collectives.within(groups[place]), _own_folder(folder, student, self.registry):
            student.run(folder)
        collectives.barrier()
        if collectives.is_main():
            results = {n: json.loads((output_dir / n / RESULTS).read_text()) for n in spans}
            write_results(output_dir, {"task": "multi_distill", "students": results})
            print("\nDone. Use the students from Python:\n")
            print("  from dinov3_framework import load_backbone")
            for n in spans:
                print(f'  {n} = load_backbone("{output_dir / n}")')


class SideStudent(Distill):
    """One of several students, on its own processes."""

    def __init__(
        self, config: DistillConfig, *, registry: Registry, name: str, spans: Mapping[str, range]
    ) -> None:
        super().__init__(config, registry=registry)
        self._name, self._spans = name, spans
        self._peers = SideBySide(name)

    def _load_dataset(self) -> Dataset:
        with collectives.within(None):
            return super()._load_dataset()

    def _layouts(self) -> tuple[list[Layout], list[Layout]]:
        """What each process makes for the teacher, and what it sees as a student; by rank."""
        config, world = self.config, dist.get_world_size()

        def layout(size: int, place: int) -> Layout:
            return Layout(size, place, config.accumulation_steps, config.batch_size)

        have = [layout(world, rank) for rank in range(world)]
        want = [layout(len(s), place) for s in self._spans.values() for place in range(len(s))]
        return have, want

    def _maker(self, dataset: Dataset, parts: Parts) -> BatchMaker:
        have, want = self._layouts()
        rank, config = dist.get_rank(), self.config
        return BatchMaker(
            dataset,
            parts.augmentation,
            have[rank],
            config.seed,
            config.loader.workers,
            masks_of=want[rank],
        )

    def _taught_by(self, backbone: nn.Module, heads: nn.ModuleDict, parts: Parts) -> Teaching:
        have, want = ([layout.places(0, 0) for layout in each] for each in self._layouts())
        exchange = Exchange.between(dist.get_rank(), have, want)
        return SharedTeaching(
            backbone, self._frozen.images, heads, exchange, by_output(self._needs(parts))
        )

    def _anybody(self, wants: bool) -> bool:
        return self._peers.share(wants)

    def _needs(self, parts: Parts) -> Sequence[Collection[str]]:
        """Which of the teacher's outputs each process wants, by rank."""
        with collectives.within(None):
            everyone = collectives.all_gather_object(outputs_of(parts.losses.values()))
        return cast("list[set[str]]", everyone)

    def _restorable(self, store: CheckpointStore) -> list[int]:
        """Iterations of which every student has a checkpoint, the newest first."""
        own = set(store.steps())
        with collectives.within(None):
            everyone = cast("list[set[int]]", collectives.all_gather_object(own))
        return sorted(set.intersection(*everyone), reverse=True)

    def _resume(self, trainer: Trainer) -> bool:
        steps = self._restorable(trainer.store)
        for step in steps:
            try:
                found, complaint = trainer.resume(step), ""
            except CheckpointError as error:
                found, complaint = False, str(error)
            with collectives.within(None):
                words = collectives.all_gather_object((found, self._name, complaint))
            if all(cast("tuple[bool, str, str]", word)[0] for word in words):
                return True
            trouble = {f"{n}: {text}" for ok, n, text in cast(Any, words) if not ok}
            log.warning("Iteration %d cannot be gone on from: %s", step, "; ".join(sorted(trouble)))
        if steps:
            raise CheckpointError(
                "there is no iteration of which every student has a sound checkpoint; start in "
                "another output folder"
            )
        return False


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


def _placed(problem: Problem, name: str, config: MultiDistillConfig) -> Problem:
    """A student's problem at the key of the whole recipe that it is about."""
    first = problem.where.partition(".")[0]
    if first in _OWN and getattr(config.students[name], first) is not None:
        return Problem(
            f"students.{name}.{problem.where}", problem.message, problem.hint, problem.source
        )
    return problem


# ------------------------------------------------------------------ folders
@contextmanager
def _own_folder(folder: Path, student: Distill, registry: Registry) -> Iterator[None]:
    """A student's folder, with its recipe and its log; by its main process."""
    with ExitStack() as held:

        def prepare() -> None:
            if collectives.is_main():
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise unwritable(error, folder) from error
                write_aside(folder / RECIPE, to_toml(unstructure(registry, student.config)))
                held.enter_context(log_file(folder))

        try:
            together(prepare)
        except RankFailure as failure:
            raise failure.for_process() from failure.own
        yield
