"""Gaussian blur of a stack of crops, each with a standard deviation of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dinov3_crops.color import Floats, column

# A tap below this weight moves no pixel by a hundredth of a level.
NEGLIGIBLE = 1e-5


def kernel_taps(sigma: NDArray[np.float64], radius: int) -> Floats:
    """Weights at distance 0, 1 .. radius, [radius + 1, N]; with both sides they sum to 1.

    ``sigma`` is in pixels, [N]. Distances that weigh nothing in all N kernels are cut off.
    """
    distance = np.arange(radius + 1)[:, None]
    taps = np.exp(-0.5 * (distance / sigma) ** 2)
    taps /= 2 * taps.sum(axis=0) - taps[0]
    reach = int(np.flatnonzero((taps > NEGLIGIBLE).any(axis=1))[-1])
    return taps[: reach + 1].astype(np.float32)


def gaussian_blur(pixels: Floats, sigma: NDArray[np.float64], kernel: int) -> Floats:
    """Pixels [N, C, H, W] convolved with Gaussians of ``sigma`` [N], borders reflected.

    ``kernel`` is the width of the window in pixels. Reflection cannot reach further than the
    crop's other border, so in tiny crops the window is narrower.
    """
    radius = min(kernel // 2, min(pixels.shape[-2:]) - 1)
    taps = kernel_taps(sigma, radius)
    return _along_rows(_along_columns(pixels, taps), taps)


def _along_columns(pixels: Floats, taps: Floats) -> Floats:
    reach, height = len(taps) - 1, pixels.shape[2]
    padded = np.empty((*pixels.shape[:2], height + 2 * reach, pixels.shape[3]), np.float32)
    padded[:, :, reach : reach + height] = pixels
    padded[:, :, :reach] = pixels[:, :, 1 : reach + 1][:, :, ::-1]
    padded[:, :, reach + height :] = pixels[:, :, height - 1 - reach : height - 1][:, :, ::-1]
    shifted = [padded[:, :, at : at + height] for at in range(2 * reach + 1)]
    return _weighted_sum(shifted, taps)


def _along_rows(pixels: Floats, taps: Floats) -> Floats:
    reach, width = len(taps) - 1, pixels.shape[3]
    padded = np.empty((*pixels.shape[:3], width + 2 * reach), np.float32)
    padded[..., reach : reach + width] = pixels
    padded[..., :reach] = pixels[..., 1 : reach + 1][..., ::-1]
    padded[..., reach + width :] = pixels[..., width - 1 - reach : width - 1][..., ::-1]
    return _weighted_sum([padded[..., at : at + width] for at in range(2 * reach + 1)], taps)


def _weighted_sum(shifted: list[Floats], taps: Floats) -> Floats:
    # Sums of shifted copies: for nine taps quicker on one core than torch's convolutions.
    middle = len(taps) - 1
    total: Floats = shifted[middle] * column(taps[0])
    pair = np.empty_like(total)
    for distance in range(1, len(taps)):
        np.add(shifted[middle - distance], shifted[middle + distance], out=pair)
        pair *= column(taps[distance])
        total += pair
    return total
