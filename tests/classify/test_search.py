"""The nearest neighbors themselves, against all similarities in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dinov3_classify.search import nearest
from process_groups import run_processes
from torch import Tensor


def vectors(count: int, seed: int, dim: int = 12) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (count, dim))).float()


def cosines(queries: Tensor, train: Tensor) -> Tensor:
    """[n, m], float64."""
    a, b = queries.double(), train.double()
    return a / a.norm(dim=1, keepdim=True) @ (b / b.norm(dim=1, keepdim=True)).T


def assert_nearest(queries: Tensor, train: Tensor, k: int, tolerance: float = 1e-6) -> None:
    similarity, place = nearest(queries, train, k)
    every = cosines(queries, train)
    best = every.topk(k, dim=1).values
    torch.testing.assert_close(every.gather(1, place), best, rtol=0, atol=tolerance)
    assert all(len(set(row)) == k for row in place.tolist())
    gaps = similarity[:, :1] - similarity  # up to a constant of the query
    torch.testing.assert_close(gaps.double(), best[:, :1] - best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 20, 200])
@pytest.mark.parametrize("count", [200, 1025, 20_001])
def test_they_are_the_nearest_of_all(count: int, k: int) -> None:
    assert_nearest(vectors(50, 1), vectors(count, 2), k)


def test_many_queries() -> None:
    assert_nearest(vectors(2100, 1, dim=4), vectors(3000, 2, dim=4), 3)


def test_every_block_nearer_than_the_last() -> None:
    """Sorted by class, a training set may well be so; there nothing can be passed over."""
    queries = torch.eye(4)[:1].repeat(30, 1) + 0.01 * vectors(30, 1, dim=4)
    train = vectors(20_000, 2, dim=4)
    train = train[cosines(queries[:1], train)[0].argsort()]
    assert_nearest(queries, train, 7)


def test_equally_near_ones_come_in_order() -> None:
    base = vectors(5, 3)
    _, place = nearest(base[:2], base.repeat(1000, 1), 4)
    assert place.tolist() == [[0, 5, 10, 15], [1, 6, 11, 16]]


def test_vectors_that_are_all_the_same() -> None:
    _, place = nearest(vectors(3, 1), torch.ones(40_000, 12), 5)
    assert place.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_vectors_that_nearly_coincide() -> None:
    """As class tokens of a barely trained backbone do: cosines differ by 1e-10."""
    common = vectors(1, 8)
    queries, train = (common + 1e-5 * vectors(*each) for each in ((60, 1), (3000, 2)))
    _, place = nearest(queries, train, 10)
    expected = cosines(queries, train).topk(10, dim=1).indices
    shared = [len({*a} & {*b}) for a, b in zip(place.tolist(), expected.tolist(), strict=True)]
    assert sum(shared) > 0.97 * 600


# --------------------------------------------------------------------------- processes
def search_share(queries: Tensor, train: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rank = torch.distributed.get_rank()
    places = torch.arange(len(train))[rank::2]
    return nearest(queries, train[places], k, places=places)


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    train = vectors(2000, 2)
    train[1000:] = train[:1000]  # ties across processes
    queries = vectors(40, 1)
    similarity, place = nearest(queries, train, 30)
    for found in run_processes(2, tmp_path, search_share, queries, train, 30):
        assert torch.equal(found[1], place)
        torch.testing.assert_close(found[0], similarity)


def test_a_process_with_fewer_than_k(tmp_path: Path) -> None:
    train, queries = vectors(21, 2), vectors(4, 1)
    _, place = nearest(queries, train, 20)
    for found in run_processes(2, tmp_path, search_share, queries, train, 20):
        assert torch.equal(found[1], place)
