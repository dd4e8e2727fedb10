"""The schedule of the published linear evaluation of depth."""

from __future__ import annotations

import math

import pytest

from dinov3_framework.schedules import OneCycle, Share

NYU = OneCycle(start=3e-7, peak=3e-4, end=1.2e-8, warmup=12_800)


def test_the_cosine_spans_the_run_and_the_warm_up_is_a_factor() -> None:
    assert NYU.at(0, 38_400) == 3e-7
    halfway = 3e-7 + 3e-4 * (1 + math.cos(math.pi / 6)) / 2 / 2
    assert NYU.at(6400, 38_400) == pytest.approx(halfway, rel=1e-12)
    assert NYU.at(12_800, 38_400) == pytest.approx(2.25e-4, rel=1e-3)  # not its peak
    assert NYU.at(38_399, 38_400) == pytest.approx(1.2e-8, rel=1e-12)
    assert NYU.at(50_000, 38_400) == pytest.approx(1.2e-8, rel=1e-12)


def test_without_a_warm_up_it_is_half_a_cosine() -> None:
    plain = OneCycle(peak=2.0)
    assert [plain.at(n, 4) for n in (1, 3)] == pytest.approx([1.0, 0.0])


def test_a_larger_batch_scales_all_of_it() -> None:
    for iteration in (0, 50, 127, 128, 383):
        schedule = OneCycle(start=1e-3, peak=1.0, end=1e-2, warmup=128)
        assert schedule.scaled(3.0).at(iteration, 384) == pytest.approx(
            3 * schedule.at(iteration, 384)
        )


def test_a_warm_up_that_is_longer_than_the_run() -> None:
    assert "warmup" in NYU.problems(10_000)[0]
    assert not OneCycle(peak=1.0, warmup=Share(0.5)).problems(10)


def test_the_warm_up_of_the_published_linear_segmentation() -> None:
    """From a millionth of the rate, under a line that falls over the run; then the same cosine."""
    ade20k = OneCycle(peak=1e-3, warmup=1500, ratio=1e-6)
    assert ade20k.at(0, 40_000) == pytest.approx(1e-9, rel=1e-9)
    halfway = 1e-3 * (0.5 + 0.5e-6) * (1 - 750 / 40_000)
    assert ade20k.at(750, 40_000) == pytest.approx(halfway, rel=1e-12)
    later = 1e-3 * (1 + math.cos(math.pi * 20_001 / 40_000)) / 2
    assert ade20k.at(20_000, 40_000) == pytest.approx(later, rel=1e-12)
    assert ade20k.at(39_999, 40_000) == pytest.approx(0.0, abs=1e-15)
