"""Values of maps at points between their pixels, and the choice of points.

Points are (x, y) in 0..1 of width and height. The letters in shapes: N maps, P points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_segment.draws import uniform


def values_at(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values [N, C, P] of maps [N, C, h, w] at points [N, P, 2], in float32.

    The center of the first pixel lies at half a pixel; beyond the outer centers values fade to 0,
    as in the published losses (PointRend, arXiv:1912.08193).
    """
    places = 2 * points[:, :, None] - 1
    return F.grid_sample(maps.float(), places, align_corners=False)[..., 0]


@torch.no_grad()
def uncertain_points(
    logits: Tensor,
    weights_at: Callable[[Tensor], Tensor | None],
    generator: torch.Generator,
    *,
    count: int,
    oversample: float,
    importance: float,
) -> Tensor:
    """Points [N, count, 2] of masks' logits [N, h, w], most of them where a mask is uncertain.

    Of ``count * oversample`` points those nearest to logit 0 are taken, ``importance`` of all;
    the rest are drawn anywhere (PointRend, section 4.1). ``weights_at`` gives the weights [N, P]
    of points, or None where all weigh 1; a point without weight is taken last.
    """
    drawn = uniform(generator, len(logits), int(count * oversample), 2)
    certainty = values_at(logits[:, None], drawn)[:, 0].abs()
    weights = weights_at(drawn)
    if weights is not None:
        certainty = certainty.masked_fill(weights <= 0, float("inf"))
    uncertain = int(count * importance)
    chosen = certainty.topk(uncertain, dim=1, largest=False).indices
    points = drawn.gather(1, chosen[..., None].expand(-1, -1, 2))
    if uncertain == count:
        return points
    return torch.cat([points, uniform(generator, len(logits), count - uncertain, 2)], dim=1)
