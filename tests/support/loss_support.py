"""Steps to feed losses with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
