"""Principal components of patch features, their colors, and the foreground that they show."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

# A component with a smaller share of the first one's variance is rounding, not structure.
_NEGLIGIBLE = 1e-6
_RING = 0.1  # of an image's side: how wide its border is, at least one patch


@attrs.frozen(eq=False)
class Components:
    """Scores [m, count] in the order of their variance, and the share of it that each holds."""

    scores: Tensor
    shares: tuple[float, ...]

    @property
    def explained(self) -> float:
        """The share of the variance that the components hold together, in 0..1."""
        return min(sum(self.shares), 1.0)


def principal_components(tokens: Tensor, count: int = 3) -> Components:
    """The first ``count`` principal components of tokens [m, D].

    Each has the sign that makes its distribution lean to the right. Components that do not exist
    (fewer tokens or dimensions, or no variance left) are 0.
    """
    centered = tokens - tokens.mean(0)
    scores, variances = leading(centered, count)
    lean = scores.pow(3).sum(0)
    scores = torch.where(lean < 0, -scores, scores)
    total = float(centered.square().sum())
    shares = (variances / total if total > 0 else torch.zeros_like(variances)).tolist()
    return Components(scores, tuple(shares))


def leading(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``rows @ rows.T`` by ``count`` columns: scores @ scores.T.

    ``rows`` [m, D] are taken as they are, not centered. Returns scores [m, count] and the sum of
    squares of each, in falling order; columns past the rank are 0.
    """
    few = len(rows) < rows.shape[1]
    # Whichever is smaller: both have the same eigenvalues but for zeros.
    squares, vectors = torch.linalg.eigh(rows @ rows.T if few else rows.T @ rows)
    squares = squares.clamp_min(0).flip(0)[:count]
    vectors = vectors.flip(1)[:, :count]
    scores = vectors * squares.sqrt() if few else rows @ vectors
    real = squares > _NEGLIGIBLE * squares[:1].clamp_min(torch.finfo(scores.dtype).tiny)
    missing = 0, count - scores.shape[1]
    return F.pad(torch.where(real, scores, 0), missing), F.pad(
        torch.where(real, squares, 0), missing
    )


def to_colors(scores: Tensor) -> Tensor:
    """Scores [m, 3] as red, green and blue, uint8 [m, 3].

    A component runs from its 2nd to its 98th percentile; one without variance is mid-gray.
    """
    ordered = scores.sort(0).values  # torch.quantile refuses more than 16 million values
    low, high = (ordered[round(part * (len(scores) - 1))] for part in (0.02, 0.98))
    flat = high - low <= 0
    values = torch.where(flat, 0.5, (scores - low) / torch.where(flat, 1.0, high - low))
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


# --------------------------------------------------------------------------- foreground
def foreground(scores: Sequence[Tensor]) -> list[Tensor]:
    """Masks bool [h, w] of the foreground from first components [h, w] of images seen together.

    As in DINOv2 (Oquab et al. 2023, arXiv:2304.07193), the component is thresholded. The threshold
    is Otsu's (1979), since 0, the mean, only parts the two where each fills half of the images. A
    component has no sign: the side that covers more of the images' insides than of their borders
    counts as the foreground (the boundary prior of Wei et al. 2012, "Geodesic saliency using
    background priors"). Everything is foreground where the scores do not differ at all.
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
