"""What is drawn of patch features: principal components, foreground, similarities."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_figures.configs import VisualizeConfig
from dinov3_figures.sheet import Mark, Pixels

BACKDROP = 232  # gray value of the background's patches, where only the foreground has colors
_REFERENCES = 512  # patches whose similarities the error of codes is measured on
# A component with a smaller share of the first one's variance is rounding, not structure.
_NEGLIGIBLE = 1e-6
_RING = 0.1  # of an image's side: how wide its border is, at least one patch


def principal_components(tokens: Tensor, count: int = 3) -> tuple[Tensor, tuple[float, ...]]:
    """The first ``count`` principal components of tokens [m, D].

    Returns scores [m, count] in the order of their variance, and the share of it that each holds.
    Each has the sign that makes its distribution lean to the right. Components that do not exist
    (fewer tokens or dimensions, or no variance left) are 0.
    """
    centered = tokens - tokens.mean(0)
    scores, variances = leading(centered, count)
    scores = torch.where(scores.pow(3).sum(0) < 0, -scores, scores)
    total = centered.square().sum().clamp_min(torch.finfo(scores.dtype).tiny)
    return scores, tuple((variances / total).tolist())


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
    leaning = 0.0
    for mask in masks:
        if min(mask.shape) >= 3:
            rows, columns = (max(round(side * _RING), 1) for side in mask.shape)
            inside = torch.zeros_like(mask)
            inside[rows:-rows, columns:-columns] = True
            leaning += float(mask[inside].double().mean() - mask[~inside].double().mean())
    share = torch.cat([mask.flatten() for mask in masks]).double().mean()
    return leaning > 0 if leaning else bool(share <= 0.5)


# --------------------------------------------------------------------------- maps of an image
@attrs.frozen(eq=False)
class Maps:
    """All that is drawn of one image's patch features."""

    pca: Pixels  # uint8 [h, w, 3]
    pca_shares: tuple[float, ...]  # of the variance, by component
    foreground: np.ndarray  # bool [h, w]
    foreground_pca: Pixels  # uint8 [h, w, 3], the background in gray
    foreground_shares: tuple[float, ...]
    marks: tuple[Mark, ...]

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.foreground.shape
        return height, width

    @property
    def lowest(self) -> float:
        """Where the colors of the similarities begin; they end at 1."""
        low = min((float(mark.similarity.min()) for mark in self.marks), default=0.0)
        return low if low < 1 - 1e-4 else 0.0


@attrs.frozen(eq=False)
class Codes:
    """Patch features of one image in few numbers, for similarities to any patch.

    The cosine of patches i and j is about ``sum(weights * values[i] * values[j])``.
    """

    values: np.ndarray  # int8 [P, K]
    weights: np.ndarray  # float64 [K]
    error: float  # root mean square of what the cosines are off


def maps_of(features: Sequence[Tensor], config: VisualizeConfig) -> list[Maps]:
    """The maps of every image's features [h, w, D]."""
    if config.pca == "image":
        return [_joint_maps([each], config)[0] for each in features]
    return _joint_maps(features, config)


def _joint_maps(features: Sequence[Tensor], config: VisualizeConfig) -> list[Maps]:
    """Maps of images that share their principal components."""
    shapes = [each.shape[:2] for each in features]
    tokens = torch.cat([each.flatten(0, 1) for each in features])

    def by_image(rows: Tensor) -> list[Tensor]:
        """Rows [m, ...] of all patches as [h, w, ...] of each image."""
        parts = rows.split([height * width for height, width in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    scores, shares = principal_components(tokens)
    masks = foreground(by_image(scores[:, 0]))
    chosen = torch.cat([mask.flatten() for mask in masks])
    part_scores, part_shares = principal_components(tokens[chosen])
    painted = torch.full((len(tokens), 3), BACKDROP, dtype=torch.uint8)
    painted[chosen] = to_colors(part_scores)
    colors = by_image(to_colors(scores))
    return [
        Maps(
            pca=color.numpy(),
            pca_shares=shares,
            foreground=mask.numpy(),
            foreground_pca=over.numpy(),
            foreground_shares=part_shares,
            marks=_marks(each, mask, config) if "similarity" in config.maps else (),
        )
        for each, mask, color, over in zip(features, masks, colors, by_image(painted), strict=True)
    ]


def _marks(features: Tensor, mask: Tensor, config: VisualizeConfig) -> tuple[Mark, ...]:
    height, width = mask.shape
    unit = F.normalize(features.flatten(0, 1), dim=1)
    places = {
        f"[{x:g}, {y:g}]": patch_at(y, height) * width + patch_at(x, width)
        for x, y in config.points
    }
    sides = {"foreground": mask.flatten(), "background": ~mask.flatten()}
    for what, side in list(sides.items())[: config.typical]:
        if side.any():
            places[what] = most_typical(unit, side)
    return tuple(
        Mark(number, *divmod(at, width), what, (unit @ unit[at]).view(mask.shape).numpy())
        for number, (what, at) in enumerate(places.items(), start=1)
    )


def patch_at(place: float, count: int) -> int:
    """Which of ``count`` patches along a side lies at ``place`` in 0..1."""
    return min(int(place * count), count - 1)


def most_typical(unit: Tensor, mask: Tensor) -> int:
    """The patch of a mask [P] with the largest mean cosine to all of it; ``unit`` is [P, D]."""
    towards = unit @ unit[mask].mean(0)
    return int(torch.where(mask, towards, -torch.inf).argmax())


def encode(features: Tensor, dims: int) -> Codes:
    """Features [h, w, D] in ``dims`` 8-bit numbers a patch.

    The leading singular vectors of the unit features give the cosines with the smallest squared
    error that ``dims`` numbers can.
    """
    unit = F.normalize(features.flatten(0, 1), dim=1)
    scores, _ = leading(unit, min(dims, *unit.shape))
    step = scores.abs().amax(0).clamp_min(torch.finfo(scores.dtype).tiny) / 127
    values = (scores / step).round().clamp(-127, 127)
    weights = step.double().square()
    # Evenly spread ones: the full table of cosines grows with the square of the patches.
    count = min(_REFERENCES, len(unit))
    picked = torch.arange(count) * len(unit) // count
    decoded = (values.double() * weights) @ values[picked].double().T
    error = (decoded - (unit @ unit[picked].T).double()).square().mean().sqrt()
    return Codes(values.to(torch.int8).numpy(), weights.numpy(), float(error))
