"""The real trainer on the tiny recipe, in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from dinov3_ssl.configs import PretrainConfig
from run_support import HERE, TINY
from torch import Tensor

from dinov3_framework import Registry
from dinov3_framework.data.loader import TrainingLoader
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.runtime.processes import process_group
from dinov3_framework.training.task import TrainingTask
from dinov3_framework.training.trainer import Trainer

torch.set_num_threads(1)

NO_LOSSES = 'drop=["losses.dino", "losses.ibot", "losses.koleo"]'


@cache
def registry() -> Registry:
    """All plugins, and the one that breaks things."""
    folder = str(HERE / "faults_plugin")
    sys.path.insert(0, folder)
    try:
        import dinov3_faults_parts  # noqa: F401  (found only while its folder is known)

        return Registry.load()
    finally:
        sys.path.remove(folder)


def tiny_config(*overrides: str) -> PretrainConfig:
    config = structure_recipe(registry(), compose(TINY, overrides))
    assert isinstance(config, PretrainConfig)
    return config


def pretrain(*overrides: str) -> TrainingTask:
    task = registry().build(tiny_config(*overrides), registry=registry())
    assert isinstance(task, TrainingTask)
    return task


def dataset_of(task: TrainingTask) -> Any:
    return registry().build(task.config.dataset, channels=task.config.images.channels)


def trainer_of(task: TrainingTask, output: Path) -> Trainer:
    """The trainer of a task before its first step, among the processes that are connected."""
    output.mkdir(exist_ok=True)
    return task.trainer(task.method.prepare(), dataset_of(task), output)


@contextmanager
def trainer(output: Path, *overrides: str) -> Iterator[Trainer]:
    """A trainer before its first step, in a process group of one."""
    with process_group(torch.device("cpu"), timeout=60):
        yield trainer_of(pretrain(*overrides), output)


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    """Take steps without saving; the metrics of each."""
    loader = TrainingLoader(
        trainer.maker, trainer.config.loader, trainer.done, trainer.done + count, pin_memory=False
    )
    batches, figures = iter(loader), []
    for _ in range(count):
        figures.append(trainer.step(batches).check.metrics)
        trainer.done += 1
    return figures


def save(trainer: Trainer) -> None:
    """Save a checkpoint as a run does."""
    trainer._save()


def snapshot(trainer: Trainer, prefixes: Sequence[str] = ("",)) -> dict[str, Tensor]:
    """Copies of the state whose names start so."""
    return {
        name: tensor.clone()
        for name, tensor in trainer.tensors().items()
        if name.startswith(tuple(prefixes))
    }


def changed(before: dict[str, Tensor], trainer: Trainer) -> set[str]:
    """Names of tensors that are not what they were, bit for bit."""
    now = trainer.tensors()
    return {
        name
        for name, tensor in before.items()
        if not torch.equal(_bits(tensor), _bits(now[name].detach()))
    }


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor
