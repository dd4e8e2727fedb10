"""Steps to feed losses with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from dinov3_framework import StepOutputs, ViewFeatures


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(
    crops: int = 2,
    samples: int = 4,
    grid: tuple[int, int] = (3, 3),
    dim: int = 8,
    seed: int = 0,
    **given: Tensor,
) -> ViewFeatures:
    """Random features of a view, but for those given."""
    values: dict[str, Any] = {
        "cls": randn(crops, samples, dim, seed=seed),
        "storage": randn(crops, samples, 2, dim, seed=seed + 1),
        "patches": randn(crops, samples, grid[0] * grid[1], dim, seed=seed + 2),
    }
    return ViewFeatures(grid=grid, **{**values, **given})


def identity(tokens: Tensor) -> Tensor:
    return tokens


def step(
    *,
    student: dict[str, ViewFeatures] | None = None,
    teacher: ViewFeatures | None = None,
    anchor: ViewFeatures | None = None,
    masks: Tensor | None = None,
    project: Callable[[Tensor], Tensor] = identity,
    project_teacher: Callable[[Tensor], Tensor] = identity,
    iteration: int = 0,
    total_iterations: int = 10,
) -> StepOutputs:
    """A step of random features and of projectors that give back what they get."""
    return StepOutputs(
        iteration=iteration,
        total_iterations=total_iterations,
        student={"global": features(seed=10)} if student is None else student,
        teacher={"global": features(seed=20) if teacher is None else teacher},
        anchor=anchor,
        masks=masks,
        project=project,
        project_teacher=project_teacher,
    )


Results = dict[str, Any]
Work = Callable[[int, Path], Results]


def results_of(work: Work, folder: Path, processes: int) -> list[Results]:
    """What ``work(rank, folder)`` gives on each of some processes of one group."""
    multiprocessing.spawn(_run, args=(work, folder, processes), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _run(rank: int, work: Work, folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()
