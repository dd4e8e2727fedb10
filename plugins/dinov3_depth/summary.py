"""Errors of a data set from those of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from dinov3_depth.metrics import METRICS
from dinov3_depth.scoring import ImageScore
from dinov3_framework.randomness import keyed_rng

POOLED = "rmse_pooled"

_RESAMPLES = 2000
_AT_ONCE = 2**22  # counts of resampled images in memory


@frozen
class Summary:
    """Metrics of a data set with their 95 % bootstrap intervals; images are what is drawn."""

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


def summarize(scores: Sequence[ImageScore], seed: int) -> Summary:
    """Means over images with known depth, of which there is at least one."""
    names = [*METRICS, POOLED]
    rows = np.array([[score.errors[name] for name in METRICS] for score in scores])
    pixels = np.array([score.pixels for score in scores], dtype=np.float64)
    squares = pixels * rows[:, METRICS.index("rmse")] ** 2
    sums = np.column_stack([rows, squares, pixels])  # [images, metrics + 2]

    def of(totals: np.ndarray) -> np.ndarray:
        pooled = np.sqrt(totals[:, -2] / totals[:, -1])
        return np.column_stack([totals[:, :-2] / len(scores), pooled])

    rng = keyed_rng(seed, "bootstrap depth")
    shares = np.full(len(scores), 1 / len(scores))
    drawn: list[np.ndarray] = []
    left, size = _RESAMPLES, max(_AT_ONCE // len(scores), 1)
    while left:
        count = min(left, size)
        drawn.append(of(rng.multinomial(len(scores), shares, size=count) @ sums))
        left -= count
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
    means = of(sums.sum(axis=0, keepdims=True))[0]
    return Summary(
        dict(zip(names, map(float, means), strict=True)),
        dict(zip(names, zip(map(float, low), map(float, high), strict=True), strict=True)),
    )


def image_rows(scores: Sequence[ImageScore]) -> list[dict[str, Any]]:
    """A row for each image; errors are None where nothing is known of its depth."""
    return [
        {
            "index": score.index,
            "image": score.name,
            "pixels": score.pixels,
            **{name: _rounded(score.errors.get(name)) for name in METRICS},
            "scale": _rounded(score.scale),
            "shift": _rounded(score.shift),
        }
        for score in scores
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
