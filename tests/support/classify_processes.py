"""Evaluations and searches to be run by several processes: importing it is quick."""

from __future__ import annotations

from typing import Any

import torch
from classify_support import GRAY, ClustersConfig, knn, registry, regression, tiny
from dinov3_classify.search import nearest
from torch import Tensor

from dinov3_framework.contracts.running import Model

FULL: dict[str, Any] = {
    "test": ClustersConfig(count=80, seed=1, noise=150.0),
    "tests": {"v2": ClustersConfig(count=11, seed=2)},
    "tries": 3,
}
FULL_KNN = FULL | {"n_per_class": (1, 2), "percent": (50.0,), "class_mean": True}
FULL_REGRESSION = FULL | {"n_per_class": (2, 5)}


def measure(config: Any) -> dict[str, Any]:
    """Everything that an evaluation gives for a tiny backbone."""
    model = Model(tiny(1).eval(), GRAY)
    evaluation = registry().build(config)
    evaluation.prepare(registry().build, GRAY)
    metrics = evaluation.run(model)
    details = evaluation.details()
    return {
        "metrics": metrics,
        "intervals": details.intervals,
        "tables": details.tables,
        "arrays": {name: array.tolist() for name, array in details.arrays.items()},
        "protocol": evaluation.protocol(model),
    }


def measure_knn(**options: Any) -> dict[str, Any]:
    return measure(knn(**{**FULL_KNN, **options}))


def measure_regression(**options: Any) -> dict[str, Any]:
    return measure(regression(**{**FULL_REGRESSION, **options}))


def search_share(queries: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbors, found by each of two processes in every other training vector."""
    places = torch.arange(len(train))[torch.distributed.get_rank() :: 2]
    return nearest(queries, train[places], k, places=places)
