"""The suites of what runs: observers, launchers, tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import define
from broken_units import TRAINING, UNITS, toy_registry

from dinov3_framework import (
    Job,
    JobHandle,
    Launcher,
    LauncherConfig,
    Observer,
    ObserverConfig,
    Plan,
    Registry,
    Resources,
    Run,
    StepRecord,
    Task,
    TaskConfig,
    config,
)
from dinov3_framework.testing import (
    ContractError,
    LauncherSuite,
    ObserverSuite,
    TaskSuite,
    TrainUnitSuite,
)


# --------------------------------------------------------------------------- observers
@config
class ToyObserverConfig(ObserverConfig):
    """Config of the observers below."""


class SoundObserver(Observer):
    def __init__(self, config: ToyObserverConfig) -> None:
        pass

    def on_step(self, run: Run, step: StepRecord) -> Mapping[str, float]:
        if run.is_main:
            (run.output_dir / "note").write_text(str(step.iteration))
        return {"seen": step.metrics["loss"]}

    def on_end(self, run: Run) -> Mapping[str, Any]:
        crops = run.sample_batch(2)["global"]
        tokens = run.model().backbone(crops[0].float())
        same = torch.equal(tokens, run.initial_model().backbone(crops[0].float()))
        return {"rows": [{"differs": not same}]}


class ChangesModel(SoundObserver):
    def on_start(self, run: Run, iteration: int) -> None:
        next(run.model().backbone.parameters()).data.fill_(1)


class LeavesTraining(SoundObserver):
    def on_start(self, run: Run, iteration: int) -> None:
        run.model().backbone.train()


class WritesEverywhere(SoundObserver):
    def on_end(self, run: Run) -> None:  # type: ignore[override]
        (run.output_dir / "figure.png").touch()


class Words(SoundObserver):
    def on_step(self, run: Run, step: StepRecord) -> Any:
        return {"state": "fine"}


class NoJson(SoundObserver):
    def on_end(self, run: Run) -> Mapping[str, Any]:
        return {"tokens": torch.zeros(2)}


class CannotClose(SoundObserver):
    def on_start(self, run: Run, iteration: int) -> None:
        self.started = True

    def on_close(self, run: Run, error: BaseException | None) -> None:
        assert self.started, "closed before it began"


class TestSoundObserver(ObserverSuite):
    config = ToyObserverConfig()
    factory = SoundObserver


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (ChangesModel, "changes the model that it watches: mask_token"),
        (LeavesTraining, "leaves the model in training mode"),
        (WritesEverywhere, r"writes \['figure.png'\] in a process"),
        (Words, "on_step.. must give None or numbers"),
        (NoJson, "test_run: raised TypeError: .*JSON"),
        (CannotClose, "test_failed_run: raised AttributeError"),
    ],
)
def test_broken_observers_are_caught(factory: Any, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        ObserverSuite.check(ToyObserverConfig(), factory=factory)


# --------------------------------------------------------------------------- launchers
@config
class ToyLauncherConfig(LauncherConfig):
    """Config of the launchers below."""


@define
class Handle(JobHandle):
    """A job that was run when it was submitted."""

    code: int

    def wait(self) -> int:
        return self.code


class InThisProcess(Launcher):
    def __init__(self, config: ToyLauncherConfig) -> None:
        pass

    def submit(
        self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
    ) -> JobHandle:
        failed = [handle.wait() for handle in after if handle.wait()]
        return Handle(failed[0] if failed else job.run())


class HidesExitCodes(InThisProcess):
    def submit(
        self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
    ) -> JobHandle:
        job.run()
        return Handle(0)


class DoesNotWait(InThisProcess):
    def submit(
        self, job: Job, resources: Resources | None = None, *, after: Sequence[JobHandle] = ()
    ) -> JobHandle:
        return Handle(job.run())


class TwoProcesses(InThisProcess):
    def world_size(self) -> int:
        return 2


class NoProcess(InThisProcess):
    def world_size(self) -> int:
        return 0


class Mute(InThisProcess):
    def preview(self, job: Job, resources: Resources | None = None) -> str:
        return ""


class Eager(InThisProcess):
    def preview(self, job: Job, resources: Resources | None = None) -> str:
        job.run()
        return "this process"


class TestSoundLauncher(LauncherSuite):
    config = ToyLauncherConfig()
    factory = InThisProcess


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (HidesExitCodes, "wait.. gave 0 where the processes ended with 2"),
        (DoesNotWait, r"one after it ran \['first', 'second'\]"),
        (TwoProcesses, "ran as rank: world size {'0': '1'}"),
        (NoProcess, "must be at least 1, is 0"),
        (Mute, "gives no text"),
        (Eager, "starts the job"),
    ],
)
def test_broken_launchers_are_caught(factory: Any, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        LauncherSuite.check(ToyLauncherConfig(), factory=factory)


def test_a_launcher_that_hands_jobs_over_is_not_run() -> None:
    LauncherSuite.check(ToyLauncherConfig(), factory=HidesExitCodes, launch=False)


# --------------------------------------------------------------------------- tasks
@config
class ToyTaskConfig(TaskConfig):
    """Config of the tasks below."""


class SoundTask(Task):
    def __init__(self, config: ToyTaskConfig, *, registry: Registry) -> None:
        self.checks = 0

    def check(self, world_size: int) -> Plan:
        return Plan({"split": [("processes", str(world_size))]})

    def run(self, output_dir: Path, plan: Plan | None = None) -> None:
        raise RuntimeError("a check must not run the task")


class Litters(SoundTask):
    def check(self, world_size: int) -> Plan:
        Path("left_behind").touch()
        return super().check(world_size)


class Wavers(SoundTask):
    def check(self, world_size: int) -> Plan:
        self.checks += 1
        return Plan({"checks": [("so far", str(self.checks))]})


class Numbers(SoundTask):
    def check(self, world_size: int) -> Plan:
        return Plan({"split": [("processes", world_size)]})  # type: ignore[list-item]


class Surprises(SoundTask):
    def write_expected_artifacts(self, folder: Path) -> bool:
        (folder / "weights").touch()
        return False


class TestSoundTask(TaskSuite):
    config = ToyTaskConfig()
    factory = SoundTask
    world_size = 3


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (Litters, r"check\(\) wrote into"),
        (Wavers, "something else when asked again"),
        (Numbers, "rows of text"),
        (Surprises, r"gave False and wrote \['weights'\]"),
    ],
)
def test_broken_tasks_are_caught(
    factory: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ContractError, match=words):
        TaskSuite.check(ToyTaskConfig(), factory=factory)


# --------------------------------------------------------------------------- train units
class TestSoundUnit(TrainUnitSuite):
    config = TRAINING
    registry = toy_registry()


@pytest.mark.parametrize(
    ("factory", "words"), [pytest.param(*case, id=name) for name, case in UNITS.items()]
)
def test_broken_units_are_caught(factory: Any, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        TrainUnitSuite.check(TRAINING, factory=factory, registry=toy_registry())
