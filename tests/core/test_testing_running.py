"""The contract checks of what runs: observers, launchers, tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3_framework import (
    ImagesConfig,
    Job,
    Launcher,
    LauncherConfig,
    Observer,
    ObserverConfig,
    Plan,
    Registry,
    Run,
    StepRecord,
    Task,
    TaskConfig,
    config,
)
from dinov3_framework.recipes.structure import structure_component
from dinov3_framework.testing import (
    ContractError,
    check_launcher,
    check_observer,
    check_task,
)

HEAD = {"n_prototypes": 32, "bottleneck_dim": 8, "hidden_dim": 16}
VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def installed() -> Registry:
    return Registry.load()


@pytest.mark.parametrize("processes", [1, 2])
def test_the_local_launcher_passes(
    installed: Registry, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = structure_component(installed, "launcher", "local", {"processes": processes})
    check_launcher(settings, tmp_path, registry=installed)


def test_the_knn_observer_passes(installed: Registry, tmp_path: Path) -> None:
    few = {"use": "fashion_mnist", "split": "test"}
    settings = structure_component(installed, "observer", "knn", {"train": few, "test": few})
    grey = ImagesConfig(channels=1, mean=(0.3,), std=(0.3,))
    check_observer(settings, tmp_path, registry=installed, images=grey)


def test_the_pretrain_task_passes(installed: Registry, tmp_path: Path) -> None:
    values = {
        "iterations": 3,
        "batch_size": 4,
        "images": {"channels": 1, "mean": [0.3], "std": [0.3]},
        "dataset": {"use": "fashion_mnist"},
        "augmentation": {"use": "multi_crop", "global_size": 16, "local_size": 8},
        "backbone": {"use": "vit", **VIT},
        "losses": {"dino": {"use": "dino", "head": HEAD}},
        "teacher": {"momentum": 0.9},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "output_dir": str(tmp_path / "run"),
    }
    check_task(structure_component(installed, "task", "pretrain", values), registry=installed)


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


class ChangesTeacher(SoundObserver):
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


def test_observers(tmp_path: Path) -> None:
    check_observer(ToyObserverConfig(), tmp_path / "sound", factory=SoundObserver)
    for factory, words in (
        (ChangesTeacher, "changes the teacher that it watches: mask_token"),
        (LeavesTraining, "leaves the teacher in training mode"),
        (WritesEverywhere, r"writes \['figure.png'\] in a process"),
        (Words, "on_step.. must give None or numbers"),
        (NoJson, "as JSON raised TypeError"),
    ):
        with pytest.raises(ContractError, match=words):
            check_observer(ToyObserverConfig(), tmp_path / factory.__name__, factory=factory)


# --------------------------------------------------------------------------- launchers, tasks
@config
class ToyLauncherConfig(LauncherConfig):
    """Config of the launchers below."""


class InThisProcess(Launcher):
    def __init__(self, config: ToyLauncherConfig) -> None:
        pass

    def launch(self, job: Job) -> int:
        return job.run()


class HidesExitCodes(InThisProcess):
    def launch(self, job: Job) -> int:
        job.run()
        return 0


class Promises2(InThisProcess):
    def world_size(self) -> int:
        return 2


class NoProcess(InThisProcess):
    def world_size(self) -> int:
        return 0


class Mute(InThisProcess):
    def describe(self) -> str:
        return ""


def test_launchers(tmp_path: Path) -> None:
    check_launcher(ToyLauncherConfig(), tmp_path / "sound", factory=InThisProcess)
    check_launcher(ToyLauncherConfig(), tmp_path, factory=HidesExitCodes, launch=False)
    for factory, words in (
        (HidesExitCodes, "gave exit code 0 where the processes ended with 2"),
        (Promises2, "ran as rank: world size {'0': '1'}"),
        (NoProcess, "must be at least 1, is 0"),
        (Mute, "must give one line of text"),
    ):
        with pytest.raises(ContractError, match=words):
            check_launcher(ToyLauncherConfig(), tmp_path / factory.__name__, factory=factory)


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


def test_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_task(ToyTaskConfig(), factory=SoundTask, world_size=3)
    assert os.listdir() == []
    for factory, words in (
        (Litters, r"check\(\) wrote into"),
        (Wavers, "something else when asked again"),
        (Numbers, "rows of text"),
    ):
        with pytest.raises(ContractError, match=words):
            check_task(ToyTaskConfig(), factory=factory)
