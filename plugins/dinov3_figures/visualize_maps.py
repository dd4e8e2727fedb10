"""What is drawn of patch features: principal components, foreground, similarities."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_figures.components import leading, principal_components, to_colours
from dinov3_figures.configs import VisualizeConfig
from dinov3_figures.pixels import Pixels
from dinov3_figures.visualize_foreground import foreground

BACKDROP = 232  # grey value of the background's patches, where only the foreground has colours
_REFERENCES = 512  # patches whose similarities the error of codes is measured on


@attrs.frozen(eq=False)
class Marked:
    """A marked patch, and how similar the others are to it."""

    row: int
    column: int
    what: str  # which it is: "[0.5, 0.5]", "foreground" or "background"
    similarity: np.ndarray  # cosines, float32 [h, w]

    @property
    def given(self) -> bool:
        """Whether the recipe names its place."""
        return self.what.startswith("[")


@attrs.frozen(eq=False)
class Maps:
    """All that is drawn of one image's patch features."""

    pca: Pixels  # uint8 [h, w, 3]
    pca_shares: tuple[float, ...]  # of the variance, by component
    foreground: np.ndarray  # bool [h, w]
    foreground_pca: Pixels  # uint8 [h, w, 3], the background in grey
    foreground_shares: tuple[float, ...]
    marked: tuple[Marked, ...]

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.foreground.shape
        return height, width

    @property
    def foreground_share(self) -> float:
        return float(self.foreground.mean())


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
    if config.pca == "joint":
        return _together(features, config)
    return [maps for each in features for maps in _together([each], config)]


def _together(features: Sequence[Tensor], config: VisualizeConfig) -> list[Maps]:
    """Maps of images that share their principal components."""
    sizes = [each.shape[0] * each.shape[1] for each in features]
    tokens = torch.cat([each.flatten(0, 1) for each in features])
    whole = principal_components(tokens)
    first = whole.scores[:, 0].split(sizes)
    masks = foreground([s.view(f.shape[:2]) for s, f in zip(first, features, strict=True)])
    chosen = torch.cat([mask.flatten() for mask in masks])
    part = principal_components(tokens[chosen])
    painted = torch.full((len(tokens), 3), BACKDROP, dtype=torch.uint8)
    painted[chosen] = to_colours(part.scores)
    pictures = zip(
        features, masks, to_colours(whole.scores).split(sizes), painted.split(sizes), strict=True
    )
    return [
        Maps(
            pca=colours.view(*mask.shape, 3).numpy(),
            pca_shares=whole.shares,
            foreground=mask.numpy(),
            foreground_pca=over.view(*mask.shape, 3).numpy(),
            foreground_shares=part.shares,
            marked=_mark(each, mask, config) if "similarity" in config.maps else (),
        )
        for each, mask, colours, over in pictures
    ]


def _mark(features: Tensor, mask: Tensor, config: VisualizeConfig) -> tuple[Marked, ...]:
    height, width = mask.shape
    unit = F.normalize(features.flatten(0, 1), dim=1)
    places = [
        (patch_at(y, height) * width + patch_at(x, width), f"[{x:g}, {y:g}]")
        for x, y in config.points
    ]
    sides = ((mask, "foreground"), (~mask, "background"))
    for side, what in sides[: config.typical]:
        if side.any():
            places.append((most_typical(unit, side.flatten()), what))
    return tuple(
        Marked(index // width, index % width, what, (unit @ unit[index]).view(mask.shape).numpy())
        for index, what in places
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
