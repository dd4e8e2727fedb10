"""From scores of bins to depth.

The letters in shapes: B images, K bins, h and w positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinov3_depth.configs_heads import BinsConfig

_SHARE = 0.1  # added to scores, so that their sum is never 0
_CHMV2_SCALE = 8.0  # CHMv2 learned an eighth of its heights
_CHMV2_SHARE = 1e-8
_CHMV2_LEAST = 1e-12


def bin_centers(config: BinsConfig, device: torch.device | None = None) -> Tensor:
    """Depths that bins stand for, float32 [K], increasing.

    - ``linear``: evenly from the least to the largest depth;
    - ``log``: their logarithms evenly;
    - ``sid``: the middles of K intervals whose ends are spaced evenly by the logarithm of the
      depth, shifted so that the least is 1 (DORN, arXiv:1806.02446, equation 1);
    - ``mixed_log``: from ``log`` at the least to ``linear`` at the largest, of an eighth of the
      range (CHMv2); what is averaged of them is 8 times as much.
    """
    low, high, count = config.min_depth, config.max_depth, config.bins

    def even(start: float, stop: float, steps: int = count) -> Tensor:
        return torch.linspace(start, stop, steps, device=device)

    if config.spacing == "linear":
        return even(low, high)
    if config.spacing == "log":
        return even(math.log(low), math.log(high)).exp()
    if config.spacing == "sid":
        shift = 1 - low
        ends = even(math.log(low + shift), math.log(high + shift), count + 1).exp() - shift
        return (ends[1:] + ends[:-1]) / 2
    high /= _CHMV2_SCALE
    share = even(1, 0)
    return share * even(math.log(low), math.log(high)).exp() + (1 - share) * even(low, high)


def depth_of_scores(config: BinsConfig, scores: Tensor) -> Tensor:
    """Depth [B, h, w] from scores [B, K, h, w], in float32; with one bin, by regression."""
    scores = scores.float()
    if scores.shape[1] == 1:
        return scores[:, 0].relu() + config.min_depth
    centers = bin_centers(config, scores.device)
    if config.weighting == "mixed_log":
        positive = scores.relu() + _CHMV2_SHARE
        weights = positive / positive.sum(1, keepdim=True).clamp(min=_CHMV2_LEAST)
    elif config.weighting == "softmax":
        weights = scores.softmax(1)
    else:
        linear = config.weighting == "linear"
        positive = scores.relu() + _SHARE if linear else scores.sigmoid()
        weights = positive / positive.sum(1, keepdim=True)
    depth = torch.einsum("bkhw,k->bhw", weights, centers)
    return depth * _CHMV2_SCALE if config.spacing == "mixed_log" else depth
