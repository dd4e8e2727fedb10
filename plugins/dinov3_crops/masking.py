"""Block masks of a global batch (BEiT, Bao et al. 2021, arXiv 2106.08254; iBOT, arXiv 2111.07832).

Of the ``total`` global crops of a batch, ``int(total * probability)`` are masked, chosen anew each
step. How much of each is hidden runs evenly over ``ratio`` (as DINOv2 spreads it), so that a batch
always hides the same number of patches. Within a crop, blocks of random area and aspect ratio are
hidden until the number is reached or no block fits; single patches make it exact.

The choice of crops is keyed by (seed, step), each crop's blocks by (seed, step, row). A process
makes only its own rows, and they are the same however the batch is spread over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov3_crops.configs import MaskingConfig
from dinov3_framework import keyed_rng

TRIES = 10


def batch_masks(
    config: MaskingConfig, grid: int, rows: Sequence[int], total: int, seed: int, step: int
) -> Tensor:
    """Hidden patches of ``rows`` among ``total``, bool [len(rows), grid * grid], row-major."""
    counts = hidden_counts(config, grid * grid, total)
    place = keyed_rng(seed, "masks", step).permutation(total)
    masks = np.zeros((len(rows), grid, grid), bool)
    for mask, row in zip(masks, rows, strict=True):
        if place[row] < len(counts):
            rng = keyed_rng(seed, "masks", step, row)
            mask[...] = block_mask(rng, config, grid, counts[place[row]])
    return torch.from_numpy(masks.reshape(len(rows), -1))


def hidden_counts(config: MaskingConfig, patches: int, total: int) -> list[int]:
    """How many patches each masked crop of a batch of ``total`` hides, increasing."""
    masked = int(total * config.probability)
    # float32, since that is what decides the published counts where a product is near a whole
    ratios = torch.linspace(*config.ratio, masked + 1, dtype=torch.float32)[1:]
    return (ratios * patches).to(torch.int64).tolist()


def block_mask(
    rng: np.random.Generator, config: MaskingConfig, grid: int, count: int
) -> NDArray[np.bool_]:
    """A mask [grid, grid] that hides exactly ``count`` patches."""
    mask = np.zeros((grid, grid), bool)
    greatest = config.block_max_share * grid * grid
    missing = count
    while missing > 0:
        added = _add_block(rng, config, mask, min(missing, greatest))
        if added == 0:
            break
        missing -= added
    if missing:
        visible = np.flatnonzero(~mask)
        mask.flat[rng.choice(visible, size=missing, replace=False)] = True
    if config.circular_shift:
        down, right = rng.integers(grid, size=2)
        mask = np.roll(mask, (down, right), axis=(0, 1))
    return mask


def _add_block(
    rng: np.random.Generator, config: MaskingConfig, mask: NDArray[np.bool_], room: float
) -> int:
    """Hide one block that adds at most ``room`` patches; returns how many it added, perhaps 0."""
    grid = len(mask)
    low, high = map(math.log, config.block_aspect)
    for area, aspect, down, right in rng.random((TRIES, 4)).tolist():
        wanted = config.block_min_patches + area * (room - config.block_min_patches)
        ratio = math.exp(low + aspect * (high - low))
        height, width = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if height >= grid or width >= grid:
            continue
        top, left = int(down * (grid - height + 1)), int(right * (grid - width + 1))
        block = mask[top : top + height, left : left + width]
        added = height * width - int(np.count_nonzero(block))
        if 0 < added <= room:
            block[...] = True
            return added
    return 0
