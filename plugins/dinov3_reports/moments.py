"""Means and deviations of what does not fit into memory, put together from parts."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import numpy as np
import torch
from torch import Tensor

_CHUNK = 2**15  # pixels that are float64 at a time
_WHITE = {torch.uint16: 65535.0}


@attrs.frozen(eq=False)
class Moments:
    """Count, means [C] and sums of squared deviations [C] of values by channel, float64."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """Standard deviations, of the values themselves (divided by their count)."""
        deviation: np.ndarray = np.sqrt(self.squares / self.count)
        return deviation

    def merged(self, other: Moments) -> Moments:
        """Of the values of both (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        squares = self.squares + other.squares + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, squares)

    def as_one(self) -> Moments:
        """The same means and deviations, with the weight of a single value."""
        return Moments(1, self.mean, self.squares / self.count)


def image_moments(image: Tensor) -> Moments:
    """Of an image [C, H, W]: integers count as shares of white, floats as they are."""
    if image.dtype == torch.uint8:
        return _side_by_side(_of_bytes(channel) for channel in image)
    parts = image.flatten(1).split(_CHUNK, dim=1)
    return merge(_moments(part.double() / _WHITE.get(image.dtype, 1.0)) for part in parts)


def _side_by_side(channels: Iterable[Moments]) -> Moments:
    """Moments of one channel each, as those of one image."""
    found = list(channels)
    means, squares = [each.mean for each in found], [each.squares for each in found]
    return Moments(found[0].count, np.concatenate(means), np.concatenate(squares))


def _of_bytes(channel: Tensor) -> Moments:
    """By way of how often each value is there: exact, and three times as fast as floats."""
    times = np.bincount(channel.numpy().ravel(), minlength=256)
    values, count = np.arange(256), channel.numel()
    mean = (values @ times) / count
    squares = ((values - mean) ** 2) @ times
    return Moments(count, np.array([mean / 255]), np.array([squares / 255**2]))


def merge(parts: Iterable[Moments]) -> Moments:
    """Of all values of at least one part, in their order."""
    first, *rest = parts
    for part in rest:
        first = first.merged(part)
    return first


def _moments(values: Tensor) -> Moments:
    mean = values.mean(1, keepdim=True)
    squares = (values - mean).square_().sum(1)
    return Moments(values.shape[1], mean[:, 0].numpy(), squares.numpy())
