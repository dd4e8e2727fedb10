"""Which pixels of an image count, and how its prediction is scored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor

from dinov3_depth.configs_evaluation import DepthConfig
from dinov3_depth.metrics import Values, alignment, depth_metrics
from dinov3_framework import DataError

# Of rows and of columns, as (numerator, denominator): 45 of 480 and so on.
_NYU_EIGEN = ((45, 480), (471, 480), (41, 640), (601, 640))
# Garg et al. 2016 (arXiv:1603.04992), as code for KITTI has it.
_GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)


@frozen
class ImageScore:
    """Errors of one image."""

    index: int
    name: str
    pixels: int  # whose truth is known and counts
    scale: float = 1.0  # that the prediction was multiplied by
    shift: float = 0.0
    errors: dict[str, float] = field(factory=dict)  # by name; empty where nothing is known


def cropped(crop: str, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of a truth that count."""
    if crop == "nyu_eigen":
        sides = (height, height, width, width)
        pairs = zip(_NYU_EIGEN, sides, strict=True)
        top, bottom, left, right = (place * side // whole for (place, whole), side in pairs)
    elif crop == "garg":
        sides = (height, height, width, width)
        top, bottom, left, right = (int(p * s) for p, s in zip(_GARG, sides, strict=True))
    else:
        top, bottom, left, right = 0, height, 0, width
    return slice(top, bottom), slice(left, right)


def known_pixels(config: DepthConfig, truth: Tensor) -> Tensor:
    """bool [H, W]: which pixels of a truth [H, W] count."""
    inside = torch.zeros(truth.shape, dtype=torch.bool)
    inside[cropped(config.crop, truth.shape[0], truth.shape[1])] = True
    known = (truth > config.least) & inside  # not so for NaN
    return known if config.most is None else known & (truth < config.most)


def truth_of(config: DepthConfig, targets: Any) -> Tensor:
    """The depth of a sample, float32 [H, W]; ``DataError`` where it has none."""
    truth = targets.get(config.target)
    if not isinstance(truth, Tensor) or truth.ndim != 2:
        raise DataError(f"has no map {config.target!r}")
    return truth.as_subclass(Tensor).float()


def score(
    config: DepthConfig, index: int, name: str, prediction: Tensor, truth: Tensor
) -> ImageScore:
    """Errors of a prediction [H, W] by the pixels that count.

    Raises ``DataError`` where it is not finite there.
    """
    known = known_pixels(config, truth)
    found, true = (each[known].double().numpy() for each in (prediction, truth))
    if not len(true):
        return ImageScore(index, name, 0)
    if not np.isfinite(found).all():
        raise DataError("the prediction is not finite; has the training diverged?")
    return score_values(config, index, name, found, true)


def score_values(
    config: DepthConfig, index: int, name: str, found: Values, true: Values
) -> ImageScore:
    """The same of the values of the pixels that count."""
    scale, shift = alignment(config.align, found, true)
    clamped = np.clip(found * scale + shift, config.least, config.most)
    return ImageScore(index, name, len(true), scale, shift, depth_metrics(clamped, true))
