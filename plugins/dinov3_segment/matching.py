"""Which query stands for which true mask: the assignment of least cost.

The letters in shapes: Q queries, N true masks, K classes, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_framework import DataError
from dinov3_segment.configs_masks import MaskClassificationConfig
from dinov3_segment.draws import is_simulated, uniform
from dinov3_segment.points import values_at
from dinov3_segment.segments import Segments

_WORST = 1e10  # a cost that is not finite; the loss itself is not either, and says so

Pairs = tuple[Tensor, Tensor]  # indices of queries and of the true masks that they stand for


@torch.no_grad()
def matching_costs(
    config: MaskClassificationConfig,
    class_logits: Tensor,
    mask_logits: Tensor,
    truth: Segments,
    generator: torch.Generator,
) -> Tensor:
    """What it costs each query to stand for each true mask of an image, [Q, N] in float32.

    Class logits are [Q, K + 1], masks' logits [Q, h, w]. Costs are those of Mask2Former: minus the
    class's probability, binary cross-entropy and Dice loss at points drawn anywhere, the same for
    all pairs.
    """
    points = uniform(generator, 1, config.points, 2)
    wanted, weights = truth.at(points)  # [N, P], [1, P]
    given = values_at(mask_logits[None], points)[0]  # [Q, P]
    chance = class_logits.float().softmax(-1)[:, list(truth.classes)]
    shares = weights / weights.sum().clamp(min=1e-6)
    inside, outside = F.softplus(-given) * shares, F.softplus(given) * shares
    entropy = inside @ wanted.T + outside @ (1 - wanted).T
    probable, true = given.sigmoid() * weights, wanted * weights
    overlap = 2 * probable @ wanted.T + 1
    dice = 1 - overlap / (probable.sum(1)[:, None] + true.sum(1) + 1)
    return config.mask_weight * entropy + config.dice_weight * dice - config.class_weight * chance


def match(costs: Sequence[Tensor]) -> list[Pairs]:
    """The pairs of least cost of each matrix [Q, N]: min(Q, N) of them, no query or mask twice.

    Costs go to the CPU in one transfer; the assignment is found in float64. One that is not finite
    is taken only where nothing else is left. Raises ``DataError`` where scipy is missing.
    """
    device = costs[0].device
    if any(is_simulated(each) for each in costs):
        sizes = [min(each.shape) for each in costs]
        return [(torch.arange(n, device=device),) * 2 for n in sizes]
    assign = _linear_sum_assignment()
    flat = torch.cat([each.flatten() for each in costs]).double().cpu().numpy()
    flat = np.nan_to_num(flat, nan=_WORST, posinf=_WORST, neginf=_WORST)
    ends = np.cumsum([each.numel() for each in costs])
    pairs = [
        assign(part.reshape(each.shape))
        for part, each in zip(np.split(flat, ends[:-1]), costs, strict=True)
    ]
    return [
        (torch.as_tensor(queries).to(device), torch.as_tensor(masks).to(device))
        for queries, masks in pairs
    ]


def _linear_sum_assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise DataError(
            "heads that classify masks need scipy to be trained; "
            "pip install 'dinov3-framework[dense]'"
        ) from error
    return linear_sum_assignment
