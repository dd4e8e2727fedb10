"""What is drawn of patch features: principal components, foreground, similarities."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_figures.components import foreground, leading, principal_components, to_colors
from dinov3_figures.configs import VisualizeConfig
from dinov3_figures.sheet import Mark, Pixels

BACKDROP = 232  # gray value of the background's patches, where only the foreground has colors
_REFERENCES = 512  # patches whose similarities the error of codes is measured on


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

    whole = principal_components(tokens)
    masks = foreground(by_image(whole.scores[:, 0]))
    chosen = torch.cat([mask.flatten() for mask in masks])
    part = principal_components(tokens[chosen])
    painted = torch.full((len(tokens), 3), BACKDROP, dtype=torch.uint8)
    painted[chosen] = to_colors(part.scores)
    colors = by_image(to_colors(whole.scores))
    return [
        Maps(
            pca=color.numpy(),
            pca_shares=whole.shares,
            foreground=mask.numpy(),
            foreground_pca=over.numpy(),
            foreground_shares=part.shares,
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
