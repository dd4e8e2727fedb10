"""Errors of one depth map, as they are published, and how a prediction is aligned before.

Predictions and truths here are flat: the pixels of an image whose truth is known.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

# By name, in the order of tables. In the unit of the depth: rmse, sq_rel and mae.
METRICS = (
    *("rmse", "abs_rel", "a1", "a2", "a3"),
    *("log10", "rmse_log", "silog", "sq_rel", "mae"),
)


def depth_metrics(prediction: Values, truth: Values) -> dict[str, float]:
    """Errors of an image by name; of no pixel at all they are NaN.

    After Eigen et al. 2014 (arXiv:1406.2283): ``a1``, ``a2`` and ``a3`` are shares of pixels whose
    ratio, or its inverse, is below 1.25, 1.25^2 and 1.25^3. ``silog`` is 100 times the standard
    deviation of the error of logarithms, as KITTI has it. All values must be above 0.
    """
    if not len(truth):
        return dict.fromkeys(METRICS, float("nan"))
    error = prediction - truth
    logs = np.log(prediction) - np.log(truth)
    ratio = np.maximum(prediction / truth, truth / prediction)
    values = {
        "rmse": np.sqrt(np.mean(error**2)),
        "abs_rel": np.mean(np.abs(error) / truth),
        "a1": np.mean(ratio < 1.25),
        "a2": np.mean(ratio < 1.25**2),
        "a3": np.mean(ratio < 1.25**3),
        "log10": np.mean(np.abs(logs)) / np.log(10),
        "rmse_log": np.sqrt(np.mean(logs**2)),
        "silog": 100 * np.std(logs),
        "sq_rel": np.mean(error**2 / truth),
        "mae": np.mean(np.abs(error)),
    }
    return {name: float(value) for name, value in values.items()}


def alignment(mode: str, prediction: Values, truth: Values) -> tuple[float, float]:
    """(scale, shift) that a prediction is multiplied by and moved, from the truth of its image.

    ``scale_shift`` is the least-squares solution (MiDaS, arXiv:1907.01341, section 5, here in
    depth); of a prediction that is one value all over, the shift alone. ``scale`` is the ratio of
    medians (Zhou et al. 2017, arXiv:1704.07813). ``none`` is (1, 0).
    """
    if mode == "none" or not len(truth):
        return 1.0, 0.0
    if mode == "scale":
        median = float(np.median(prediction))
        return (float(np.median(truth)) / median if median > 0 else 1.0), 0.0
    # Around the mean, where the two unknowns do not depend on each other.
    center, spread = prediction.mean(), prediction - prediction.mean()
    square = float(spread @ spread)
    if square <= 1e-12 * max(float(prediction @ prediction), 1e-300):
        return 1.0, float(truth.mean() - center)
    scale = float(spread @ truth) / square
    return scale, float(truth.mean() - scale * center)
