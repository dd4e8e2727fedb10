"""Choose C of a logistic regression on images that were held out, and fit it to all."""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dinov3_classify.logistic import Solution, solve
from dinov3_framework import Model


@frozen(eq=False)
class Labeled:
    """Features [n, D] and labels int64 [n]."""

    features: Tensor
    labels: Tensor

    def at(self, places: Tensor) -> Labeled:
        return Labeled(self.features[places], self.labels[places])

    def __add__(self, other: Labeled) -> Labeled:
        return Labeled(
            torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels])
        )


@frozen(eq=False)
class Fitted:
    """The classifier, and how it came about: a row for each C that was tried, and the refit's."""

    solution: Solution
    rows: list[dict[str, Any]]

    @property
    def converged(self) -> bool:
        return all(row["converged"] for row in self.rows)


def fit(
    train: Labeled,
    val: Labeled | None,
    whole: Labeled,
    n_classes: int,
    strengths: tuple[float, ...],
    *,
    tolerance: float,
    max_iterations: int,
    device: torch.device,
) -> Fitted:
    """Choose C by the accuracy on ``val``, the smallest of equally good ones; fit to ``whole``."""
    options: dict[str, Any] = {
        "tolerance": tolerance,
        "max_iterations": max_iterations,
        "device": device,
    }
    rows: list[dict[str, Any]] = []
    best: tuple[float, Solution] | None = None
    if val is not None and len(strengths) > 1:
        held, truth = val.features.to(device), val.labels.to(device)
        for solution in solve(train.features, train.labels, n_classes, strengths, **options):
            accuracy = float((solution.scores(held).argmax(dim=1) == truth).double().mean())
            rows.append(_row(solution, round(100 * accuracy, 4)))
            if best is None or accuracy > best[0]:
                best = accuracy, solution
    c, start = (strengths[0], None) if best is None else (best[1].c, best[1])
    (solution,) = solve(whole.features, whole.labels, n_classes, [c], start=start, **options)
    return Fitted(solution.to("cpu"), [*rows, _row(solution, None)])


def _row(solution: Solution, accuracy: float | None) -> dict[str, Any]:
    return {
        "C": solution.c,
        "fitted to": "train" if accuracy is not None else "all",
        "accuracy on held-out": accuracy,
        "objective": solution.objective,
        "gradient": solution.gradient,
        "iterations": solution.iterations,
        "converged": solution.converged,
    }


def fitting_device(model: Model) -> torch.device:
    """The model's, where it computes in float64."""
    device = next((parameter.device for parameter in model.backbone.parameters()), None)
    return device if device is not None and device.type == "cuda" else torch.device("cpu")
