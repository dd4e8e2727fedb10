"""Tasks, launchers and observers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.networks import Backbone
from dinov3_framework.errors import UserError


@attrs.frozen
class Job:
    """What a launcher is to get done."""

    command: Sequence[str]  # runs one process of the job, found by its environment variables
    output_dir: Path
    run: Callable[[], int]  # the same, in this process


class Launcher(abc.ABC):
    """Gets processes for a job."""

    @abc.abstractmethod
    def launch(self, job: Job) -> int:
        """Run the job to its end (or hand it over) and return the exit code."""

    def describe(self) -> str:
        """One line: what would be started."""
        return type(self).__name__

    def world_size(self) -> int:
        """How many processes there will be."""
        return 1


@attrs.frozen
class Report:
    """What a task has to say of itself before it runs: sections of (label, value) rows.

    ``missing`` lists what the recipe may well be right about and this machine does not have, such
    as a dataset: a check says so, a run refuses to start.
    """

    sections: Mapping[str, Sequence[tuple[str, str]]]
    missing: Sequence[str] = ()


class Task(abc.ABC):
    """What a recipe runs."""

    @abc.abstractmethod
    def check(self, world_size: int) -> Report:
        """Build everything on the meta device, raise every mistake, write and allocate nothing."""

    def rehearse(self, world_size: int, accelerator: str) -> Report:
        """Say what a step on so many processes takes, without doing it; only training can.

        ``accelerator`` names what times are estimated for. Mistakes are raised as by ``check``.
        """
        raise UserError(
            f"a {type(self).__name__} cannot be rehearsed: only tasks that train can; --check says "
            "what this recipe would do"
        )

    @abc.abstractmethod
    def run(self, output_dir: Path) -> None:
        """Do the work. Called in each process, after the process group is up."""

    def stand_in(self, folder: Path) -> bool:
        """Put into an empty folder what the run will leave for others, all but tensors' values.

        Names, shapes and types are right, so that a recipe that reads the run's folder can be
        checked before there is one. What the run will have removed again by its end is not there.
        False, and nothing written, if that cannot be told beforehand.
        """
        return False


class Run(Protocol):
    """A training run as an observer sees it: to read, not to change."""

    @property
    def output_dir(self) -> Path: ...
    @property
    def images(self) -> ImagesConfig: ...
    @property
    def total_iterations(self) -> int: ...
    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def patch_size(self) -> int: ...

    def build(self, config: Any, **runtime: Any) -> Any:
        """Build any component, as ``Registry.build`` does."""
        ...

    def teacher_backbone(self) -> Backbone:
        """The momentum teacher's backbone, in eval mode; call it on every process or on none."""
        ...

    def initial_backbone(self) -> Backbone:
        """A backbone as it was before the first iteration, whole, in eval mode."""
        ...

    def sample_batch(self, count: int) -> Mapping[str, Tensor]:
        """The crops of the stream's first ``count`` samples, [crops, count, C, size, size] by view
        (uint8 or normalised float, as the augmentation of step 0 gives them), and ``masks`` if
        any."""
        ...


@attrs.frozen
class StepRecord:
    """One finished step."""

    iteration: int  # from 1: how many are done
    metrics: Mapping[str, float]  # averaged over processes


class Observer:
    """Watches a training run. Every method is called on every process; each may be left out."""

    def check(self, build: Callable[..., Any], images: ImagesConfig) -> None:
        """Before anything is written: raise ``UserError`` for what would fail later.

        ``build`` is ``Registry.build``; data that this machine lacks are a ``DataError``.
        """

    def on_start(self, run: Run, iteration: int) -> Mapping[str, float] | None:
        """Before the first step of this process; ``iteration`` steps are already done."""

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float] | None:
        """After every ``every``-th step and the last; what it returns is added to the metrics."""

    def on_end(self, run: Run) -> Mapping[str, Any] | None:
        """After the last step; what it returns is added to ``results.json``.

        A value that is a list of flat dicts is shown as a table at the end of the run.
        """
