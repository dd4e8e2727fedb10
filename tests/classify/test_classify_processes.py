"""Two processes, each with its share of the training features, find what one finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classify_processes import measure_knn, measure_regression, search_share
from dinov3_classify.search import nearest
from process_groups import run_processes
from torch import Tensor


def vectors(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (count, 12))).float()


def test_neighbors(tmp_path: Path) -> None:
    train = vectors(2000, 2)
    train[1000:] = train[:1000]  # ties across processes
    queries = vectors(40, 1)
    similarity, place = nearest(queries, train, 30)
    for found in run_processes(2, tmp_path, search_share, queries, train, 30):
        assert torch.equal(found[1], place)
        torch.testing.assert_close(found[0], similarity)


def test_fewer_vectors_than_neighbors_in_each(tmp_path: Path) -> None:
    train, queries = vectors(21, 2), vectors(4, 1)
    _, place = nearest(queries, train, 20)
    for found in run_processes(2, tmp_path, search_share, queries, train, 20):
        assert torch.equal(found[1], place)


@pytest.mark.parametrize("evaluate", [measure_knn, measure_regression])
def test_evaluations(evaluate: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    alone = evaluate()
    for found in run_processes(2, tmp_path, evaluate):
        assert found == alone
