"""The real trainer on the tiny recipe, in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from dinov3_ssl.configs import PretrainConfig
from dinov3_ssl.pretrain import Pretrain
from run_support import HERE, TINY
from torch import Tensor

from dinov3_framework import Registry
from dinov3_framework.data.loader import TrainingLoader
from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.runtime.processes import process_group
from dinov3_framework.training.trainer import Trainer

torch.set_num_threads(1)

NO_LOSSES = 'drop=["losses.dino", "losses.ibot", "losses.koleo"]'


@cache
def registry() -> Registry:
    """All plugins, and the one that breaks things."""
    folder = str(HERE / "faults_plugin")
    sys.path.insert(0, folder)
    try:
        return Registry.load()
    finally:
        sys.path.remove(folder)


def tiny_config(*overrides: str) -> PretrainConfig:
    config = structure_recipe(registry(), compose(TINY, overrides))
    assert isinstance(config, PretrainConfig)
    return config


def pretrain(*overrides: str) -> Pretrain:
    return Pretrain(tiny_config(*overrides), registry=registry())


@contextmanager
def trainer(output: Path, *overrides: str) -> Iterator[Trainer]:
    """A trainer before its first step, in a process group of one."""
    task, device = pretrain(*overrides), torch.device("cpu")
    output.mkdir(exist_ok=True)
    with process_group(device, timeout=60):
        yield task._trainer(task._parts(), task._dataset(), output, device)


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    """Take steps without saving; the figures of each."""
    loader = TrainingLoader(
        trainer.maker, trainer.config.loader, trainer.done, trainer.done + count, pin_memory=False
    )
    batches, figures = iter(loader), []
    for _ in range(count):
        agreement, _ = trainer._step(batches, stop=False)
        trainer.done += 1
        figures.append(agreement.metrics)
    return figures


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
