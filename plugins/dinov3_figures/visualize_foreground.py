"""Which patches show the subject of an image.

As in DINOv2 (Oquab et al. 2023, arXiv:2304.07193, "PCA of patch features"), the first principal
component is thresholded. The threshold is Otsu's (1979, "A threshold selection method from
gray-level histograms"), taken over the values themselves, since 0, the mean, only parts the two
where each fills half of the images. A component has no sign: which side is the background is told
from the images' borders, most of which a background covers (the boundary prior of Wei et al. 2012,
"Geodesic saliency using background priors").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RING = 0.1  # of an image's side: how wide its border is, at least one patch


def foreground(scores: Sequence[Tensor]) -> list[Tensor]:
    """Masks bool [h, w] of the foreground from first components [h, w] of images seen together.

    Everything is foreground where the scores do not differ at all.
    """
    threshold = otsu(torch.cat([each.flatten() for each in scores]))
    if threshold is None:
        return [torch.ones_like(each, dtype=torch.bool) for each in scores]
    high = [each > threshold for each in scores]
    return high if _is_foreground(high) else [~mask for mask in high]


def otsu(values: Tensor) -> float | None:
    """The threshold between two groups of values [m] with the largest variance between them.

    Half-way between the two values that it parts; None where all are equal.
    """
    ordered = values.double().sort().values
    below = torch.arange(1, len(ordered), dtype=torch.float64)
    sums = ordered.cumsum(0)
    above = len(ordered) - below
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / above
    between = below * above * (means[1] - means[0]).square()
    # No threshold parts equal values.
    between[ordered[1:] <= ordered[:-1]] = -1
    if not len(between) or between.max() < 0:
        return None
    place = int(between.argmax())
    return float(ordered[place] + ordered[place + 1]) / 2


def _is_foreground(masks: Sequence[Tensor]) -> bool:
    """Whether a side covers more of the images' insides than of their borders.

    The smaller side, where that cannot be told: no image has an inside, or both are covered alike.
    """
    leanings = [_leaning(mask) for mask in masks if min(mask.shape) >= 3]
    leaning = sum(leanings) / len(leanings) if leanings else 0.0
    if leaning:
        return leaning > 0
    share = torch.cat([mask.flatten() for mask in masks]).double().mean()
    return bool(share <= 0.5)


def _leaning(mask: Tensor) -> float:
    """The share of the inside of a mask [h, w] that is set, less that of its border."""
    rows, columns = (max(round(side * _RING), 1) for side in mask.shape)
    inside = torch.zeros_like(mask)
    inside[rows:-rows, columns:-columns] = True
    share = mask.double()
    return float(share[inside].mean() - share[~inside].mean())
