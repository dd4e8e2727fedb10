"""Color jitter, grayscale, blur and solarization of a stack of crops.

First everything random is drawn, for all crops of a view at once; then it is applied. Crops are
worked on in float in groups that fit the processor's cache: one by one when they are large, all
together when they are so small that the cost of calling an operation dominates.

The four jitters come in random order, in each crop another. Brightness, contrast and saturation
are all of one form, ``factor * pixels + something``, so any mix of them is one step for a group.
Hue is not; it is done once for the whole group, between the steps that precede it in each crop and
those that follow it.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray

from dinov3_crops.blur import gaussian_blur
from dinov3_crops.color import (
    Floats,
    blend,
    column,
    luminance,
    mean_luminance,
    shift_hue,
    solarize,
)
from dinov3_crops.configs import DistortionsConfig

Pixels = NDArray[np.uint8]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NEUTRAL = np.array((1.0, 1.0, 1.0, 0.0))
IDLE = np.array([[1], [0], [0]], np.float32)  # the factors of a step that changes nothing
GROUP_VALUES = 1 << 16  # values (pixels times channels) of a group


@attrs.frozen
class Jitter:
    """Color jitter and grayscale of N crops; a crop that is not jittered has neutral numbers."""

    # [2, steps, 3, N]: the steps before and after hue; in each the factors of the pixels, of their
    # mean luminance (contrast) and of their luminance (saturation)
    steps: Floats
    hue: Floats  # [N], in turns
    gray: NDArray[np.bool_]  # [N]

    def of(self, crops: slice) -> Jitter:
        return Jitter(self.steps[..., crops], self.hue[crops], self.gray[crops])


def draw_jitter(
    rng: np.random.Generator, count: int, channels: int, config: DistortionsConfig
) -> Jitter:
    """Jitter for ``count`` crops, each independent of the others."""
    strength = np.array((config.brightness, config.contrast, config.saturation, config.hue))
    low = np.maximum(NEUTRAL - strength, (0, 0, 0, -0.5))
    factors = low + (NEUTRAL + strength - low) * rng.random((count, 4))
    order = rng.random((count, 4)).argsort(axis=1)
    jittered, gray = rng.random((2, count)) < [
        [config.jitter_probability],
        [config.grayscale_probability],
    ]
    factors[~jittered] = NEUTRAL
    if channels != 3:  # what needs red, green and blue is left out
        order = order[order < SATURATION].reshape(count, 2)
        factors[:, HUE] = 0
        gray[:] = False
    return make_jitter(order, factors, gray)


def make_jitter(
    order: NDArray[np.int64], factors: NDArray[np.float64], gray: NDArray[np.bool_]
) -> Jitter:
    """Jitter by each crop's ``order`` of the jitters [N, J] and ``factors`` by jitter [N, 4].

    ``order[n]`` holds some of BRIGHTNESS, CONTRAST, SATURATION, HUE, the first to be applied first.
    """
    is_hue = order == HUE
    late = is_hue.cumsum(axis=1)
    crop, step = np.nonzero(~is_hue)
    jitter, side = order[crop, step], late[crop, step]
    factor = factors[crop, jitter]
    steps = np.zeros((2, order.shape[1], 3, len(order)), np.float32)
    steps[:, :, 0] = 1
    # CONTRAST and SATURATION are also the places of what they blend with; brightness has black.
    steps[side, step, jitter, crop] = 1 - factor
    steps[side, step, 0, crop] = factor
    return Jitter(steps, factors[:, HUE].astype(np.float32), gray)


def apply_jitter(crops: Pixels, jitter: Jitter) -> None:
    """Jitter and grayscale crops [N, C, H, W], in place."""
    for group in _groups(crops):
        pixels = crops[group].astype(np.float32)
        _jitter(pixels, jitter.of(group))
        _store(pixels, crops[group])


@attrs.frozen
class Blur:
    """Blur and solarization of N crops."""

    sigma: NDArray[np.float64]  # [N] in pixels, 0 where a crop is not blurred
    solarize: NDArray[np.bool_]  # [N]


def draw_blur(
    rng: np.random.Generator,
    config: DistortionsConfig,
    blur_probability: NDArray[np.float64],
    solarize_probability: NDArray[np.float64],
) -> Blur:
    """Blur and solarization for as many crops as there are probabilities."""
    chance, place, solar = rng.random((3, len(blur_probability)))
    low, high = config.blur_sigma
    sigma = np.where(chance < blur_probability, low + (high - low) * place, 0.0)
    return Blur(sigma, solar < solarize_probability)


def distort(crops: Pixels, jitter: Jitter | None, blur: Blur, config: DistortionsConfig) -> None:
    """Jitter, grayscale, blur and solarize crops [N, C, H, W], in that order, in place."""
    for group in _groups(crops):
        pixels = crops[group].astype(np.float32)
        if jitter is not None:
            _jitter(pixels, jitter.of(group))
        _store(_blur(pixels, blur.sigma[group], config.blur_kernel), crops[group])
    for index in np.flatnonzero(blur.solarize):
        solarize(crops[index], config.solarize_threshold)


def _groups(crops: Pixels) -> Iterator[slice]:
    size = max(GROUP_VALUES // crops[0].size, 1)
    return (slice(start, start + size) for start in range(0, len(crops), size))


def _store(pixels: Floats, crops: Pixels) -> None:
    np.copyto(crops, np.rint(pixels, out=pixels), casting="unsafe")


def _jitter(pixels: Floats, jitter: Jitter) -> None:
    early, late = jitter.steps
    _blends(pixels, early)
    if jitter.hue.any():
        shift_hue(pixels, jitter.hue)
    _blends(pixels, late)
    for index in np.flatnonzero(jitter.gray):
        pixels[index] = luminance(pixels[index : index + 1])[0]


def _blends(pixels: Floats, steps: Floats) -> None:
    needed = (steps != IDLE).any(axis=2).tolist()
    for (factor, of_mean, of_gray), (needs_factor, needs_mean, needs_gray) in zip(
        steps, needed, strict=True
    ):
        others = []
        if needs_mean:
            others.append(column(mean_luminance(pixels) * of_mean))
        if needs_gray:
            others.append(luminance(pixels) * column(of_gray))
        if needs_factor:
            blend(pixels, factor, *others)


def _blur(pixels: Floats, sigma: NDArray[np.float64], kernel: int) -> Floats:
    chosen = np.flatnonzero(sigma)
    if len(chosen) == len(sigma):
        return gaussian_blur(pixels, sigma, kernel)
    if len(chosen):
        pixels[chosen] = gaussian_blur(pixels[chosen], sigma[chosen], kernel)
    return pixels
