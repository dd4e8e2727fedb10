"""Tasks, launchers, evaluations and observers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
import torch
from torch import Tensor

from dinov3_framework.configs import ImagesConfig
from dinov3_framework.contracts.data import Dataset
from dinov3_framework.contracts.networks import Backbone, Head
from dinov3_framework.errors import Problem

Build = Callable[..., Any]  # Registry.build: any component from its config
Rows = Sequence[tuple[str, str]]  # (label, value)


# --------------------------------------------------------------------------- launchers
@attrs.frozen
class Job:
    """What a launcher is to get done."""

    # Runs one process of the job and submits nothing; torchrun's variables say which one it is.
    command: Sequence[str]
    output_dir: Path
    run: Callable[[], int]  # the same, in this process
    name: str = "dinov3"


@attrs.frozen
class Resources:
    """What a job needs; what is left out is as the launcher's config says."""

    nodes: int | None = None
    processes_per_node: int | None = None


class JobHandle(abc.ABC):
    """A job that was submitted."""

    id: str = ""  # by which others can wait for it, where the launcher has such names

    @abc.abstractmethod
    def wait(self) -> int:
        """Wait for its end; the exit code. A job that was handed over to a queue is 0 at once."""

    def describe(self) -> str:
        """What to tell a person: where logs are, how to watch and to cancel it; "" for nothing."""
        return ""

    def cancel(self) -> None:
        """End it, if it can be."""


class Launcher(abc.ABC):
    """Gets processes for a job."""

    # Whether they run on other machines, which may have what this one, a login node, lacks.
    elsewhere: bool = False

    @abc.abstractmethod
    def submit(
        self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
    ) -> JobHandle:
        """Start a job, or hand it over to a queue; it begins when all ``after`` ended well."""

    def preview(self, job: Job, resources: Resources | None = None) -> str:
        """What would be started, for ``--check``: one line, or the text of a batch script."""
        return type(self).__name__

    def world_size(self) -> int:
        """How many processes there will be."""
        return 1


# --------------------------------------------------------------------------- tasks
@attrs.frozen
class Plan:
    """What a check came to: sections of (label, value) rows, and what ``run`` need not make again.

    ``missing`` lists what the recipe may well be right about and this machine does not have, such
    as a dataset: a check reports it, a run refuses to start.
    """

    sections: Mapping[str, Rows]
    missing: Sequence[str] = ()
    prepared: Any = attrs.field(default=None, eq=False, repr=False)  # the task's own business


class Task(abc.ABC):
    """What a recipe runs."""

    @abc.abstractmethod
    def check(self, world_size: int) -> Plan:
        """Build everything on the meta device, raise every mistake, write and allocate nothing."""

    @abc.abstractmethod
    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        """Do the work. Called in each process, after the process group is up.

        ``plan`` is what :meth:`check` gave in this process; None in a process that was launched
        after a check elsewhere.
        """

    def progress(self) -> str:
        """How far the run in the recipe's output folder has come, such as "iteration 12"."""
        return ""

    def write_expected_artifacts(self, folder: Path) -> bool:
        """Put into an empty folder what the run will leave for others, all but tensors' values.

        Names, shapes and types are right, so that a recipe that reads the run's folder can be
        checked before there is one. What the run will have removed again by its end is not there.
        False, and nothing written, if that cannot be told beforehand.
        """
        return False


# --------------------------------------------------------------------------- evaluations
class FeatureStore(Protocol):
    """Keeps features that several evaluations want: ``dinov3_framework.data.feature_cache``."""

    @property
    def also(self) -> Sequence[str]:
        """Outputs to extract besides those wanted, as others may want them later."""
        ...

    def features(
        self,
        backbone: Backbone,
        dataset: Dataset,
        seen: Mapping[str, Any],
        wanted: Sequence[str],
        extract: Callable[[], Any],
    ) -> Any:
        """Features with at least the tokens ``wanted``, kept from before or extracted.

        ``seen`` is how images are seen. To be called by every process.
        """
        ...


@attrs.frozen
class Model:
    """A backbone that is evaluated, alone or with a head on it, in eval mode."""

    backbone: Backbone
    images: ImagesConfig
    head: Head | None = None
    size: int | None = None  # pixels of its training, where that is known
    name: str = "backbone"
    cache: FeatureStore | None = None  # to be handed to extract_features


@attrs.frozen
class ChosenHead:
    """A head that an evaluation found among those that it measured, with all its values."""

    component: str
    config: Mapping[str, Any]  # plain values, as in a recipe
    head: Head


@attrs.frozen
class Details:
    """What an evaluation found besides its metrics."""

    # 95 % confidence intervals, by metric.
    intervals: Mapping[str, tuple[float, float]] = attrs.field(factory=dict)
    # Flat rows, each a file <evaluation>_<table>.csv.
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = attrs.field(factory=dict)
    # Each a file <evaluation>_<array>.npy; "confusion" is [classes, classes], rows the truth.
    arrays: Mapping[str, np.ndarray[Any, Any]] = attrs.field(factory=dict)
    head: ChosenHead | None = None  # a file <evaluation>_head.safetensors


class Evaluation(abc.ABC):
    """Measures a model. Called on every process; results are the same on all of them."""

    # Where it may leave files of its own, such as predictions, of the next ``run``; None: nowhere.
    folder: Path | None = None

    @abc.abstractmethod
    def prepare(self, build: Build, images: ImagesConfig) -> None:
        """Build the data; called once, before anything else.

        Raises ``DataError`` for data that this machine lacks and ``RecipeError`` for a mistake.
        """

    def problems(self, model: Model) -> Sequence[Problem]:
        """Why such a model cannot be measured; it may be on the meta device.

        Called after ``prepare``. Raises ``DataError`` for what this machine lacks.
        """
        return ()

    @abc.abstractmethod
    def run(self, model: Model) -> Mapping[str, float]:
        """Metrics by name. No sample counts twice, however many processes there are."""

    def details(self) -> Details:
        """What the last ``run`` found besides; on the process that writes, at least."""
        return Details()

    def protocol(self, model: Model) -> Mapping[str, Any]:
        """Every switch that changes what the metrics mean, for the record of results."""
        return {}

    def data(self) -> str:
        """One line on what is measured on."""
        return ""

    def baselines(self, model: Model) -> Mapping[str, Mapping[str, float]]:
        """Metrics, by name, of what any model has to beat, such as raw pixels."""
        return {}


# --------------------------------------------------------------------------- observers
class Run(Protocol):
    """A training run as an observer sees it: to read, not to change."""

    @property
    def output_dir(self) -> Path: ...
    @property
    def config(self) -> Any:
        """The whole recipe, a ``TrainingConfig``."""
        ...

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

    def build(self, config: Any, **runtime: Any) -> Any:
        """Build any component, as ``Registry.build`` does."""
        ...

    def model(self) -> Model:
        """What is trained, as it is evaluated now; call it on every process or on none."""
        ...

    def initial_model(self) -> Model:
        """The same as it was before the first iteration, whole."""
        ...

    def sample_batch(self, count: int) -> Mapping[str, Tensor]:
        """What the training makes of the stream's first ``count`` samples, by name.

        Of self-supervision the crops by view, [crops, count, C, size, size] (uint8 or normalized
        float), and ``masks`` if any.
        """
        ...


@attrs.frozen
class StepRecord:
    """One finished step."""

    iteration: int  # from 1: how many are done
    metrics: Mapping[str, float]  # averaged over processes


class Observer:
    """Watches a training run. Every method is called on every process; each may be left out.

    An observer that ``follows_metrics`` comes after all others and sees what they added, too.
    """

    follows_metrics: bool = False

    def check(self, build: Build, images: ImagesConfig) -> None:
        """Before anything is written: raise ``UserError`` for what would fail later.

        ``build`` is ``Registry.build``; data that this machine lacks are a ``DataError``.
        """

    def check_model(self, model: Model) -> None:
        """After ``check``, with what is to be trained, on the meta device: raise ``UserError``."""

    def rows(self, model: Model) -> Rows:
        """After ``check_model``: what a check shows of it, (label, value)."""
        return ()

    def on_start(self, run: Run, iteration: int) -> Mapping[str, float] | None:
        """Before the first step of this process; ``iteration`` steps are already done."""

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float] | None:
        """After every ``every``-th step and the last; what it returns is added to the metrics."""

    def on_checkpoint(self, run: Run, iteration: int, path: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, run: Run) -> Mapping[str, Any] | None:
        """After the last step; what it returns is added to ``results.json``.

        A value that is a list of flat dicts is shown as a table at the end of the run.
        """

    def on_close(self, run: Run, error: BaseException | None) -> None:
        """When the run ends in this process, well (``error`` is None) or not; last of all."""
