"""The order of samples: whole passes, other every time, any place at once."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from dinov3_framework.data.sampling import ShuffledStream

SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 1024, 1025, 4099]


def order(stream: ShuffledStream, epoch: int) -> list[int]:
    first = epoch * stream.size
    return [stream[place] for place in range(first, first + stream.size)]


@pytest.mark.parametrize("size", SIZES)
def test_each_pass_has_every_sample_once(size: int) -> None:
    stream = ShuffledStream(size, seed=3)
    for epoch in (0, 1, 2, 1_000_000):
        assert sorted(order(stream, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [17, 100, 1024])
def test_each_pass_and_each_seed_has_an_order_of_its_own(size: int) -> None:
    orders = [order(ShuffledStream(size, seed), epoch) for seed in range(3) for epoch in range(3)]
    orders.append(list(range(size)))
    assert len({tuple(each) for each in orders}) == 10


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    stream, fresh = ShuffledStream(100, 0), ShuffledStream(100, 0)
    walked = [stream[place] for place in range(1000)]
    places = [999, 0, 500, 101, 99, 998]
    assert [fresh[place] for place in places] == [walked[place] for place in places]


def test_any_place_of_a_huge_dataset_is_found_at_once() -> None:
    stream = ShuffledStream(1_700_000_003, seed=0)
    started = time.perf_counter()
    found = {stream[10**15 + place] for place in range(1000)}
    assert time.perf_counter() - started < 1.0
    assert len(found) == 1000
    assert all(0 <= index < stream.size for index in found)
    assert not any(isinstance(value, list | np.ndarray) for value in vars(stream).values())


def test_samples_stand_anywhere() -> None:
    """Chi-square of (tenth of the pass, tenth of the dataset), 81 degrees of freedom."""
    size, passes = 1000, 40
    stream = ShuffledStream(size, seed=1)
    counts = np.zeros((10, 10))
    for epoch in range(passes):
        for place, index in enumerate(order(stream, epoch)):
            counts[place * 10 // size, index * 10 // size] += 1
    expected = size * passes / 100
    assert ((counts - expected) ** 2 / expected).sum() < 140  # p = 5e-5


def test_neighbors_do_not_stay_together() -> None:
    size = 4000
    numbers = np.array(order(ShuffledStream(size, seed=2), 0))
    correlation = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(correlation) < 4 / size**0.5
    steps = np.diff(numbers)
    assert (np.abs(steps) == 1).sum() < 12  # 2 expected


def test_two_passes_are_independent() -> None:
    size = 4000
    stream = ShuffledStream(size, seed=5)
    one, other = order(stream, 0), order(stream, 1)
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / size**0.5
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 9  # 1 expected


def test_all_orders_of_three_samples_are_about_as_likely() -> None:
    stream = ShuffledStream(3, seed=0)
    counts = Counter(tuple(order(stream, epoch)) for epoch in range(3000))
    assert set(counts) == set(itertools.permutations(range(3)))
    assert min(counts.values()) > 400  # 500 expected
