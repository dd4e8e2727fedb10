"""Some rows of a bilinear resize, without the others.

Scores of many classes at the size of an image are most of the memory of a dense prediction; whoever
needs them only a few rows at a time never has them whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor


@frozen
class RowWeights:
    """Rows ``start`` .. ``stop`` of a source, and their weights [rows of the result, k].

    ``weights`` is None where the rows are taken as they are.
    """

    start: int
    stop: int
    weights: Tensor | None


def row_weights(source: int, size: int, start: int, stop: int) -> RowWeights:
    """What rows ``start`` .. ``stop`` are made of when ``source`` rows are resized to ``size``.

    Bilinear, pixels' centers at halves (``align_corners=False``), without antialias: the rows
    before the first and after the last center repeat those.
    """
    if source == size:
        return RowWeights(start, stop, None)
    centers = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * (source / size) - 0.5
    centers = centers.clamp_(0, source - 1)
    lower = centers.floor().long()
    upper = (lower + 1).clamp_(max=source - 1)
    share = centers - lower
    first, last = int(lower[0]), int(upper[-1]) + 1
    weights = torch.zeros(stop - start, last - first, dtype=torch.float64)
    rows = torch.arange(stop - start)
    weights[rows, lower - first] += 1 - share
    weights[rows, upper - first] += share
    return RowWeights(first, last, weights.float())


def weighted_rows(rows: Tensor, weights: Tensor | None, width: int) -> Tensor:
    """Rows [..., k, w] of a source to rows [..., n, width] of the result, in float32.

    ``rows`` are those that ``row_weights`` names, ``weights`` theirs.
    """
    rows = rows.float()
    if rows.shape[-1] != width:
        flat = rows.reshape(1, -1, *rows.shape[-2:])
        size = (rows.shape[-2], width)
        flat = F.interpolate(flat, size, mode="bilinear", align_corners=False)
        rows = flat.view(*rows.shape[:-1], width)
    return rows if weights is None else weights.to(rows.device) @ rows


def bilinear_rows(maps: Tensor, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Rows ``start`` .. ``stop`` of ``maps`` [..., h, w] resized to ``size``, in float32.

    [..., stop - start, W]: the same as those rows of ``F.interpolate(maps, size, mode="bilinear",
    align_corners=False)``, to rounding.
    """
    part = row_weights(maps.shape[-2], size[0], start, stop)
    return weighted_rows(maps[..., part.start : part.stop, :], part.weights, size[1])
