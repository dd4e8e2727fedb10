"""Teachers for tiny distillations, and the distillations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from run_support import HERE
from trainer_support import registry, trainer_of

from dinov3_framework.recipes.compose import compose
from dinov3_framework.recipes.structure import structure_recipe
from dinov3_framework.runtime.processes import process_group
from dinov3_framework.training.task import TrainingTask
from dinov3_framework.training.trainer import Trainer

DISTILL = HERE / "tiny_distill.toml"
MULTI = HERE / "tiny_multi_distill.toml"
# Another backbone than the tiny recipe's, with projectors of other widths.
TEACHER = (
    "backbone.embed_dim=48",
    "backbone.num_heads=4",
    "backbone.patch_size=14",
    "losses.dino.head.hidden_dim=20",
)
HEAD = "losses.dino.teacher_head={n_prototypes=32, bottleneck_dim=8, hidden_dim=20}"


def distill(teacher: Path, *overrides: str) -> TrainingTask:
    words = [f"teacher.weights={teacher}", *overrides]
    task = registry().build(
        structure_recipe(registry(), compose(DISTILL, words)), registry=registry()
    )
    assert isinstance(task, TrainingTask)
    return task


@contextmanager
def student(teacher: Path, output: Path, *overrides: str) -> Iterator[Trainer]:
    """A trainer before its first step, in a process group of one."""
    task = distill(teacher, *overrides)
    with process_group(torch.device("cpu"), timeout=60):
        ours = trainer_of(task, output)
        if not ours.resume():
            task.method.begin(ours, task.method.prepare())
        yield ours
