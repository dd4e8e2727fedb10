"""Bins: where they are, and what their scores come to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dinov3_depth.bins import bin_centers, depth_of_scores
from dinov3_depth.configs_heads import BinsConfig

from dinov3_framework import InvalidOption

RANGE: dict[str, Any] = {"bins": 8, "min_depth": 0.5, "max_depth": 40.0}


@pytest.mark.parametrize("spacing", ["linear", "log", "sid", "mixed_log"])
def test_centers_increase_within_the_range(spacing: Any) -> None:
    centers = bin_centers(BinsConfig(spacing=spacing, **RANGE)).numpy()
    high = 40 / 8 if spacing == "mixed_log" else 40
    assert (np.diff(centers) > 0).all()
    assert centers[0] >= 0.4999
    assert centers[-1] <= high * 1.0001
    if spacing != "sid":
        np.testing.assert_allclose(centers[[0, -1]], [0.5, high], rtol=1e-6)


def test_intervals_of_sid_grow_by_one_factor() -> None:
    """DORN's t_i = exp(log(a) + i log(b / a) / K), a and b shifted so that a is 1."""
    shift = 0.5
    ends = np.exp(np.arange(9) / 8 * np.log(40.5)) - shift
    expected = (ends[1:] + ends[:-1]) / 2
    centers = bin_centers(BinsConfig(spacing="sid", **RANGE)).numpy()
    np.testing.assert_allclose(centers, expected, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["linear", "softmax", "sigmoid", "mixed_log"])
def test_one_sure_bin_is_its_depth(weighting: Any) -> None:
    config = BinsConfig(weighting=weighting, **RANGE)
    scores = torch.full((1, 8, 2, 3), -1e4)
    scores[:, 5] = 1e4
    depth = depth_of_scores(config, scores)
    assert depth.shape == (1, 2, 3)
    torch.testing.assert_close(depth, bin_centers(config)[5].expand(1, 2, 3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weighting", ["linear", "softmax", "sigmoid", "mixed_log"])
def test_equal_scores_are_the_mean_of_all(weighting: Any) -> None:
    config = BinsConfig(weighting=weighting, spacing="mixed_log", **RANGE)
    depth = depth_of_scores(config, torch.zeros(1, 8, 1, 1))
    torch.testing.assert_close(float(depth), 8 * float(bin_centers(config).mean()))


def test_one_bin_is_regression() -> None:
    scores = torch.tensor([-3.0, 0.0, 2.0]).view(1, 1, 1, 3)
    found = depth_of_scores(BinsConfig(bins=1, min_depth=0.5), scores)
    assert found.flatten().tolist() == [0.5, 0.5, 2.5]


def test_half_precision_is_computed_in_single() -> None:
    config = BinsConfig(**RANGE)
    scores = torch.randn(2, 8, 3, 4)
    half = depth_of_scores(config, scores.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, depth_of_scores(config, scores), rtol=0.02, atol=0.1)


def test_ranges_that_make_no_sense() -> None:
    with pytest.raises(InvalidOption, match="max_depth"):
        BinsConfig(min_depth=5.0, max_depth=5.0)
    with pytest.raises(InvalidOption, match="8 x min_depth"):
        BinsConfig(min_depth=1.0, max_depth=8.0, spacing="mixed_log")
